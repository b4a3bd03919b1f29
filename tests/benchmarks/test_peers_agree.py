"""What is timed side by side is one and the same thing."""

import pytest
import torch

from benchmarks import peers, small_models
from benchmarks.problems import HeadShape, ListShape, Prefix, Setting, problem
from benchmarks.test_linear_loss import chosen_first, liger_pairs, ours
from benchmarks.test_shared_prefix import dense
from benchmarks.test_step import Step
from perpo.model import sharing
from perpo.prefix.attention import prefix_attention
from perpo.prefix.layout import prefix_layout

CPU = Setting("cpu", "tiny")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def slow_marked(peer):
    return pytest.param(peer, id=f"{peer.task}-{peer.name}", marks=[pytest.mark.slow] if peer.slow_start else [])


def loaded(peer):
    fn, reason = peers.load(peer, DEVICE)
    if reason:
        pytest.skip(reason)
    return fn


def values(peer, fn, inputs, labels):
    """Log-probs (or their sum) and the gradients for a weight of its own on every token (or on the sum)."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    found = fn(*leaves, labels)
    upstream = torch.linspace(-1, 2, len(labels), device=DEVICE)
    total = -2 * found if peer.sums else (found * upstream).sum()
    return found, *torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("peer", [slow_marked(p) for p in peers.PEERS if p.task != "list_loss"])
def test_a_peer_computes_the_log_probs_and_gradients_of_plain_pytorch(peer):
    fn = loaded(peer)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    p = problem(HeadShape("", 1024, 256), ListShape(2, 4, 16), Setting(DEVICE, "gpu" if DEVICE == "cuda" else "tiny"))
    if peer.task == "linear_log_probs":
        inputs, plain = (p.hidden, p.weight), peers.plain_linear_log_probs
    else:
        inputs, plain = ((p.hidden @ p.weight.t()),), peers.plain_token_log_probs
    if peer.sums:
        exact = values(peer, lambda *xs: -plain(*xs).sum(), inputs, p.labels)
    else:
        exact = values(peer, plain, inputs, p.labels)
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
    for found, expected in zip(values(peer, fn, inputs, p.labels), exact, strict=True):
        torch.testing.assert_close(found.float(), expected.float(), **tolerance)


@pytest.mark.parametrize("peer", [slow_marked(p) for p in peers.for_task("list_loss")])
def test_a_peer_computes_the_list_loss_and_gradient_of_plain_pytorch(peer):
    fn = loaded(peer)
    log_probs = torch.randn(3, 6, device=DEVICE).requires_grad_()
    rewards = torch.rand(3, 6, device=DEVICE).sort(descending=True).values
    ref = torch.randn(3, 6, device=DEVICE)
    found, exact = fn(log_probs, rewards, ref), peers.plain_list_loss(log_probs, rewards, ref)
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(torch.autograd.grad(found, log_probs), torch.autograd.grad(exact, log_probs))


def test_pairs_for_liger_are_the_pairs_that_ours_learns_from():
    """Better answers first, then worse ones, is the same loss; and Liger's, where it is installed."""
    torch.manual_seed(0)
    lists = ListShape(5, 2, 6)
    p = problem(HeadShape("", 256, 32), lists, CPU, trainable_head=True)
    p = p._replace(ref_log_probs=torch.zeros_like(p.ref_log_probs))
    pairs = chosen_first(p)
    tokens = peers.plain_linear_log_probs(pairs.hidden, pairs.weight, pairs.labels).view(2, 5, -1).sum(-1)
    loss = -torch.nn.functional.logsigmoid(0.1 * (tokens[0] - tokens[1])).mean()
    d_hidden, d_weight = torch.autograd.grad(loss, (pairs.hidden, pairs.weight))
    (ours_hidden, ours_weight) = ours(p, True)()
    torch.testing.assert_close(d_weight, ours_weight, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(d_hidden.norm(), ours_hidden.norm())
    try:
        run = liger_pairs(pairs, compiled=False)
    except ImportError as error:
        pytest.skip(str(error))
    for found, expected in zip(run(), (loss, d_hidden, d_weight), strict=True):
        torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_a_shared_step_a_row_an_answer_and_the_authors_way_have_one_loss_and_gradient(family):
    torch.manual_seed(0)
    step = Step(family, Prefix(40, 4, 4), CPU)
    sharing.prepare(step.model, "on")
    loss, gradients = step.ours(step.packed())
    for other_loss, others in (step.ours(step.rows()), step.authors(step.rows())):
        torch.testing.assert_close(other_loss, loss, atol=1e-5, rtol=1e-4)
        for gradient, other in zip(gradients, others, strict=True):
            torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("family", small_models.FAMILIES)
@pytest.mark.parametrize("prefix", [Prefix(40, 4, 3), Prefix(91, 7, 2)])
def test_prompts_have_the_length_they_are_asked_for_and_the_picture_matters(family, prefix):
    torch.manual_seed(0)
    step = Step(family, prefix, CPU)
    assert step.prompt["input_ids"].shape == (1, prefix.n_prompt)
    before = step.model(**step.rows().inputs).logits
    step.prompt["pixel_values"] = -step.prompt["pixel_values"]
    assert not torch.equal(step.model(**step.rows().inputs).logits, before)


def test_only_the_layers_of_the_language_model_are_trained():
    model, _ = small_models.build("llava", "tiny", 40)
    trained = {name for name, x in model.named_parameters() if x.requires_grad}
    assert trained
    assert all("language_model.layers" in name or name.endswith("language_model.norm.weight") for name in trained)


def test_attention_under_a_dense_mask_is_that_of_the_layout():
    torch.manual_seed(0)
    layout = prefix_layout([24], [[5, 5, 5]])
    q, k, v = (torch.randn(1, n, 39, 8, dtype=torch.float64) for n in (4, 2, 2))
    torch.testing.assert_close(dense(layout, "cpu")(q, k, v), prefix_attention(q, k, v, layout))
