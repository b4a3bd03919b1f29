"""In a training loop: autocast, accumulation of micro-batches, activation checkpointing, repeatability."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import perpo_kernels as pk
from perpo_kernels import backends
from perpo_kernels.problem import LogitMap

from .accuracy import assert_equal_to_rounding
from .problems import RAGGED, ragged_lists, random_head


@pytest.fixture
def problem(device):
    lists = ragged_lists(RAGGED, device)
    return random_head(lists.n_tokens, 5, 17, device, torch.float32, ignored=0.2), lists


def leaves_of(head, *names):
    return {name: getattr(head, name).detach().clone().requires_grad_() for name in names}


# ----------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("names", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "trainable"])
def test_autocast_equals_casting_by_hand(backend, device, problem, names, dtype):
    """Inputs are cast as linear would; the loss is fp32; gradients arrive in the dtype of the parameter."""
    head, lists = problem
    results = []
    for by_hand in (False, True):
        leaves = {"weight": head.weight, "bias": head.bias, **leaves_of(head, *names)}

        def inputs(leaves=leaves, by_hand=by_hand):
            return {name: x.to(dtype) for name, x in leaves.items()} if by_hand else leaves

        with torch.autocast(device.type, dtype=dtype, enabled=not by_hand):
            out = pk.linear_perpo_loss(**inputs(), labels=head.labels, **lists._asdict(), backend=backend)
            tokens = pk.linear_token_log_probs(**inputs(), labels=head.labels, backend=backend)
        assert out.loss.dtype == tokens.dtype == torch.float32
        (out.loss + tokens.sum()).backward()
        assert all(leaves[name].grad.dtype == torch.float32 for name in names)
        results.append((out.loss.detach(), tokens.detach(), *(leaves[name].grad for name in names)))
    for automatic, by_hand in zip(*results, strict=True):
        assert torch.equal(automatic, by_hand)


def test_autocast_leaves_the_losses_on_log_probs_alone(backend, device):
    scores, rewards = torch.randn(2, 4, device=device), torch.rand(2, 4, device=device)
    logits, labels = torch.randn(3, 17, device=device), torch.randint(17, (3,), device=device)
    expected = pk.perpo_loss(scores, rewards, backend=backend), pk.token_log_probs(logits, labels, backend=backend)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = pk.perpo_loss(scores, rewards, backend=backend), pk.token_log_probs(logits, labels, backend=backend)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_autocast_takes_a_low_precision_hidden_state_and_an_fp32_head(backend, device, problem):
    head, _ = problem
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = pk.linear_token_log_probs(head.hidden.bfloat16(), head.weight, head.labels, backend=backend)
    expected = pk.linear_token_log_probs(head.hidden.bfloat16(), head.weight.bfloat16(), head.labels, backend=backend)
    assert torch.equal(got, expected)


# ------------------------------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize("names", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "trainable"])
def test_micro_batches_of_lists_add_up_to_one_batch(backend, device, problem, names):
    """The mean is over lists, inactive ones too: micro-batches are weighted by their number of lists."""
    head, lists = problem
    n_lists = len(RAGGED)
    whole = {"weight": head.weight, "bias": head.bias, **leaves_of(head, *names)}
    loss = pk.linear_perpo_loss(**whole, labels=head.labels, **lists._asdict(), backend=backend).loss
    loss.backward()

    parts = {"weight": head.weight, "bias": head.bias, **leaves_of(head, *names)}
    total = 0.0
    for a, b in ((0, 1), (1, 3), (3, n_lists)):
        i, j = lists.cu_lists[a].item(), lists.cu_lists[b].item()
        t, u = lists.cu_seqlens[i].item(), lists.cu_seqlens[j].item()
        part = pk.linear_perpo_loss(
            **{**parts, "hidden": parts["hidden"][t:u]},
            labels=head.labels[t:u],
            rewards=lists.rewards[i:j],
            ref_log_probs=lists.ref_log_probs[i:j],
            cu_seqlens=lists.cu_seqlens[i : j + 1] - t,
            cu_lists=lists.cu_lists[a : b + 1] - i,
            backend=backend,
        ).loss * ((b - a) / n_lists)
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss.item(), rel=1e-6)
    for name in names:
        size = whole[name].grad.abs().max().item()
        assert_equal_to_rounding(parts[name].grad, whole[name].grad, scale=size)


# ------------------------------------------------------------------------------------------------------ checkpointing


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("names", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "trainable"])
def test_activation_checkpointing_changes_nothing(backend, device, problem, names, use_reentrant):
    head, lists = problem

    def loss_of(hidden, weight, bias):
        hidden = torch.tanh(hidden)
        out = pk.linear_perpo_loss(hidden, weight, head.labels, **lists._asdict(), bias=bias, backend=backend)
        tokens = pk.linear_token_log_probs(hidden, weight, head.labels, bias, backend=backend)
        logits = pk.token_log_probs(hidden @ weight.t(), head.labels, backend=backend)
        return out.loss + tokens.square().sum() + logits.sum()

    results = []
    for checkpointed in (False, True):
        leaves = {"weight": head.weight, "bias": head.bias, **leaves_of(head, *names)}
        args = (leaves["hidden"], leaves["weight"], leaves["bias"])
        loss = checkpoint(loss_of, *args, use_reentrant=use_reentrant) if checkpointed else loss_of(*args)
        loss.backward()
        results.append((loss.detach(), *(leaves[name].grad for name in names)))
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


# ------------------------------------------------------------------------------------------------------ repeatability


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [None, 3 * 128], ids=["one sweep", "two sweeps"])
def test_the_same_input_gives_bitwise_the_same_output(backend, device, problem, dtype, chunk):
    head, lists = problem
    head = type(head)(*(x.to(dtype) if x.is_floating_point() else x for x in head))
    results = []
    for _ in range(2):
        leaves = leaves_of(head, "hidden", "weight", "bias")
        out = pk.linear_perpo_loss(
            **leaves, labels=head.labels, **lists._asdict(), max_chunk_bytes=chunk, backend=backend
        )
        out.loss.backward()
        results.append((out.loss.detach(), out.log_probs, out.scores, out.active, *(x.grad for x in leaves.values())))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_a_row_does_not_depend_on_its_neighbours(backend, device):
    """Batch invariance of the row kernels: the same row alone and among others, bit for bit."""
    logits, labels = torch.randn(5, 301, device=device), torch.randint(301, (5,), device=device)
    kernels = backends.load(backend)
    together, _ = kernels.log_prob_rows(logits, labels, LogitMap())
    alone = torch.cat([kernels.log_prob_rows(logits[i : i + 1], labels[i : i + 1], LogitMap())[0] for i in range(5)])
    assert torch.equal(together, alone)


def test_a_list_does_not_depend_on_its_neighbours(backend, device):
    scores, rewards = torch.randn(3, 20, device=device), torch.rand(3, 20, device=device)
    together = pk.perpo_loss(scores, rewards, reduction="none", backend=backend)
    for i in range(3):
        alone = pk.perpo_loss(scores[i : i + 1], rewards[i : i + 1], reduction="none", backend=backend)
        assert torch.equal(alone[0], together[i])
