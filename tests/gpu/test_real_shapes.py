"""At the vocabulary and width of a real head, the error against float64 is no larger than plain PyTorch's."""

import pytest
import torch

import perpo_kernels as pk
from tests.gpu import shapes
from tests.kernels import plain
from tests.kernels.accuracy import assert_as_accurate_as_plain, one_more_rounding
from tests.kernels.problems import random_labels, value_and_gradients

BF16 = torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n_vocab", [shapes.N_VOCAB, shapes.N_VOCAB - 1], ids=["aligned", "odd"])
def test_log_probs_from_logits(device, need_memory, dtype, n_vocab):
    need_memory(8)
    logits = (3 * torch.randn(256, n_vocab, device=device)).to(dtype)
    labels = random_labels(n_vocab, 256, device=device, ignored=0.1)
    upstream = torch.randn(256, device=device)
    results = [
        value_and_gradients(fn, {"logits": logits.to(d)}, ["logits"], upstream, labels=labels)
        for fn, d in (
            (pk.token_log_probs, dtype),
            (plain.token_log_probs, dtype),
            (pk.reference.token_log_probs, torch.float64),
        )
    ]
    values, gradients = zip(*results, strict=True)
    assert values[0].dtype == torch.float32
    assert_as_accurate_as_plain(*values)
    assert_as_accurate_as_plain(*(g["logits"] for g in gradients))


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_fused_loss(device, need_memory, trainable):
    need_memory(30)
    batch = shapes.batch(device, shapes.N_NARROW if trainable else shapes.N_HIDDEN)
    leaves = ["hidden", "weight"] if trainable else ["hidden"]

    def run(fn, dtype):
        inputs = {"hidden": batch.head.hidden.to(dtype), "weight": batch.head.weight.to(dtype)}
        return value_and_gradients(fn, inputs, leaves, 1.0)

    def plainly(hidden, weight):
        return plain.linear_perpo_loss(
            hidden, weight, batch.head.labels, batch.lists.rewards, **layout, ref_log_probs=batch.lists.ref_log_probs
        ).mean()

    layout = {"cu_seqlens": batch.lists.cu_seqlens, "cu_lists": batch.lists.cu_lists}
    ours, our_gradients = run(lambda hidden, weight: batch.loss(hidden, weight).loss, BF16)
    simple, plain_gradients = run(plainly, BF16)
    exact, exact_gradients = run(plainly, torch.float64)
    assert_as_accurate_as_plain(ours, simple, exact)
    for name in leaves:
        assert_as_accurate_as_plain(
            our_gradients[name], plain_gradients[name], exact_gradients[name], one_more_rounding(BF16)
        )


def test_one_gemm_reference_pass_gives_the_same_log_probs(device):
    batch = shapes.batch(device)
    with torch.no_grad():
        reference = batch.loss(batch.head.hidden, batch.head.weight)
    trained = batch.loss(batch.head.hidden.requires_grad_(), batch.head.weight)
    assert torch.equal(reference.log_probs, trained.log_probs)
    assert torch.equal(reference.loss, trained.loss.detach())


@pytest.mark.parametrize(("n_lists", "k"), [(64, 20), (4, 1024), (4096, 2)])
def test_list_loss(device, need_memory, n_lists, k):
    need_memory(4)
    log_probs = (20 * torch.randn(n_lists, k, device=device) - 100).double()
    ref = (20 * torch.randn(n_lists, k, device=device) - 100).double()
    rewards = torch.rand(n_lists, k, device=device)
    valid = torch.ones(n_lists, k, dtype=torch.bool, device=device)

    def all_pairs(log_probs):  # [G, k, k] at once: plain.pair_loss is a loop over lists
        gap = rewards.double().unsqueeze(-1) - rewards.double().unsqueeze(-2)
        weight = torch.where(gap > 0, gap, 1.0).sqrt().to(log_probs.dtype) * (gap > 0)
        weight = weight / weight.sum((-1, -2), keepdim=True)
        score = log_probs - ref.to(log_probs.dtype)
        margin = 0.1 * (score.unsqueeze(-1) - score.unsqueeze(-2))
        return (weight * torch.nn.functional.softplus(-margin)).sum((-1, -2)).mean()

    def ours(log_probs):
        return pk.perpo_loss(log_probs, rewards, ref.float(), valid=valid)

    exact, exact_gradient = value_and_gradients(all_pairs, {"log_probs": log_probs}, ["log_probs"], 1.0)
    simple, plain_gradient = value_and_gradients(all_pairs, {"log_probs": log_probs.float()}, ["log_probs"], 1.0)
    got, gradient = value_and_gradients(ours, {"log_probs": log_probs.float()}, ["log_probs"], 1.0)
    # rounding the log-probs to fp32 is the input's: compare on what both were given
    assert_as_accurate_as_plain(got, simple, exact, extra=1e-6)
    assert_as_accurate_as_plain(
        gradient["log_probs"], plain_gradient["log_probs"], exact_gradient["log_probs"], extra=1e-6
    )
