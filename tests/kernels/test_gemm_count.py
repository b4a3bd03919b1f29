"""Work and memory: how many T × V × H products are made, and what is kept for the backward pass."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

import perpo_kernels as pk

from .problems import ragged_lists, random_head

T, H, V = 64, 16, 128
LENGTHS = [[8, 8]] * 4  # lists of 16 tokens
ROW_BYTES = V * 4
PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}  # where the two factors start among the arguments


def products(run) -> list[tuple[int, int, int]]:
    """(m, k, n) of every product of [m, k] and [k, n] in `run`."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run()
    factors = [e.input_shapes[PRODUCTS[e.name] :][:2] for e in profiler.events() if e.name in PRODUCTS]
    return [(m, k, n) for (m, k), (_, n) in factors]


def count(run) -> float:
    """Multiply-adds of all matrix products in `run`, in units of T · V · H."""
    total = sum(m * k * n for m, k, n in products(run) if n > 1)  # a bias is a matrix times a vector
    return total / (T * V * H)


@pytest.fixture
def problem(device):
    lists = ragged_lists(LENGTHS, device)
    return random_head(T, H, V, device, torch.float32), lists._replace(
        cu_seqlens=lists.cu_seqlens.cpu(), cu_lists=lists.cu_lists.cpu()
    )


def loss_and_backward(problem, trainable, grad=True, backend="eager", **options):
    head, lists = problem
    leaves = {
        name: getattr(head, name).clone().requires_grad_(name in trainable) for name in ("hidden", "weight", "bias")
    }

    def run():
        with torch.set_grad_enabled(grad):
            loss = pk.linear_perpo_loss(
                **leaves, labels=head.labels, **lists._asdict(), backend=backend, **options
            ).loss
            if loss.requires_grad:
                loss.sum().backward()

    return run


def tokens_and_backward(problem, trainable, grad=True, backend="eager"):
    head, _ = problem
    leaves = {
        name: getattr(head, name).clone().requires_grad_(name in trainable) for name in ("hidden", "weight", "bias")
    }

    def run():
        with torch.set_grad_enabled(grad):
            log_probs = pk.linear_token_log_probs(**leaves, labels=head.labels, backend=backend)
            if log_probs.requires_grad:
                log_probs.sum().backward()

    return run


ALL = ("hidden", "weight", "bias")


def test_one_product_under_no_grad(problem):
    assert count(loss_and_backward(problem, ALL, grad=False)) == 1
    assert count(tokens_and_backward(problem, ALL, grad=False)) == 1
    assert count(loss_and_backward(problem, ())) == 1


def test_two_products_with_a_frozen_head(problem):
    assert count(loss_and_backward(problem, ("hidden",))) == 2
    assert count(tokens_and_backward(problem, ("hidden",))) == 2
    assert count(loss_and_backward(problem, ("hidden",), max_chunk_bytes=10 * ROW_BYTES)) == 2


@pytest.mark.parametrize("chunk", [None, 2**20, 16 * ROW_BYTES, 33 * ROW_BYTES])
def test_three_products_with_a_trainable_head(problem, chunk):
    assert count(loss_and_backward(problem, ALL, max_chunk_bytes=chunk)) == 3


def test_four_products_when_a_list_does_not_fit_the_budget(problem):
    assert count(loss_and_backward(problem, ALL, max_chunk_bytes=15 * ROW_BYTES)) == 4


def test_four_products_for_a_trainable_head_under_an_unknown_loss(problem):
    assert count(tokens_and_backward(problem, ALL)) == 4
    assert count(loss_and_backward(problem, ALL, reduction="none")) == 4


@pytest.mark.parametrize("trainable", [("hidden",), ("weight",)])
def test_chunks_are_even(problem, trainable):
    """64 tokens in chunks of at most 30: three of 22, 22 and 20, and not two of 30 with 4 that are left."""
    head, _ = problem
    leaves = {name: getattr(head, name).clone().requires_grad_(name in trainable) for name in ALL}
    sizes = [m for m, k, n in products(lambda: pk.linear_token_log_probs(
        **leaves, labels=head.labels, backend="eager", max_chunk_bytes=30 * ROW_BYTES
    )) if (k, n) == (H, V)]  # fmt: skip
    assert sizes == [22, 22, 20]


def test_two_products_when_only_the_weight_is_trainable(problem):
    assert count(loss_and_backward(problem, ("weight",))) == 2


def test_ignored_tokens_are_not_multiplied_on_the_cpu(problem, device):
    if device.type != "cpu":
        pytest.skip("leaving rows out needs a synchronisation on a device")
    head, lists = problem
    head.labels[:32] = -100
    assert count(tokens_and_backward((head, lists), ("hidden",))) == 1


def saved_elements(run) -> list[int]:
    sizes = []
    with saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
        run()
    return sizes


@pytest.mark.parametrize("chunk", [None, 10 * ROW_BYTES])
def test_a_frozen_head_keeps_u_and_little_else(problem, chunk):
    """U [T, H], a coefficient a token, the layout. No logits, no hidden states, no weight."""
    sizes = saved_elements(loss_and_backward(problem, ("hidden",), max_chunk_bytes=chunk))
    assert sizes.count(T * H) == 1
    assert max(size for size in sizes if size != T * H) <= T
    assert sum(sizes) < T * H + 4 * T


def test_nothing_of_the_size_of_the_logits_is_kept(problem):
    for run in (loss_and_backward(problem, ALL), tokens_and_backward(problem, ALL)):
        assert max(saved_elements(run)) < T * V


def test_nothing_is_kept_under_no_grad(problem):
    assert saved_elements(loss_and_backward(problem, ALL, grad=False)) == []


def test_no_tensor_larger_than_a_chunk_is_made(problem):
    """Peak size of a single allocation, forward and backward, with 64 tokens of logits and a budget of 10."""
    run = loss_and_backward(problem, ("hidden",), max_chunk_bytes=10 * ROW_BYTES)
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    allocations = [max(e.self_cpu_memory_usage, e.self_device_memory_usage) for e in profiler.key_averages()]
    events = [max(e.self_cpu_memory_usage, e.self_device_memory_usage) for e in profiler.events()]
    assert allocations
    assert max(events) <= max(10 * ROW_BYTES, T * H * 4)
