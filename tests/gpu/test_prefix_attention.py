"""Attention over shared prompts on the variable-length kernel: the numbers of the definition, and no waiting."""

from typing import Any

import pytest
import torch
from torch import Tensor

from perpo.attention import masked_prefix_attention, prefix_attention
from perpo.prefix_layout import prefix_layout

LISTS = [(300, [24, 1, 60, 0]), (77, [40, 40])]
BLOCKS = [[(10, 200)], [(0, 5), (20, 60)]]


def tensors(n_tokens: int, dtype: torch.dtype, dim: int, device: Any) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(1, heads, n_tokens, dim) for heads in (8, 2, 2)]
    made = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes]
    return [x.requires_grad_() for x in made]


def with_gradients(function: Any, inputs: list[Tensor]) -> list[Tensor]:
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out).cumsum(2) / out.shape[2])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 80, 128, 100])
@pytest.mark.parametrize("blocks", [None, BLOCKS], ids=["causal", "image blocks"])
def test_outputs_and_gradients_are_the_definitions(device, dtype, dim, blocks):
    layout = prefix_layout([n for n, _ in LISTS], [answers for _, answers in LISTS], blocks)
    inputs = tensors(layout.n_tokens, dtype, dim, device)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = with_gradients(lambda *x: masked_prefix_attention(*x, layout, dim**-0.5), exact)
    plain = with_gradients(lambda *x: masked_prefix_attention(*x, layout, dim**-0.5), inputs)
    ours = with_gradients(lambda *x: prefix_attention(*x, layout.map(lambda t: t.to(device))), inputs)
    for name, e, a, b in zip(("out", "query", "key", "value"), expected, ours, plain, strict=True):
        error, theirs = ((x.double() - e).norm() / e.norm() for x in (a, b))
        assert error <= 2 * theirs + torch.finfo(dtype).eps / 2, name


def test_nothing_waits_for_the_gpu(device):
    layout = prefix_layout([n for n, _ in LISTS], [answers for _, answers in LISTS], BLOCKS)
    inputs = tensors(layout.n_tokens, torch.bfloat16, 64, device)
    layout = layout.map(lambda t: t.to(device))
    with_gradients(lambda *x: prefix_attention(*x, layout), inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(lambda *x: prefix_attention(*x, layout), inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
