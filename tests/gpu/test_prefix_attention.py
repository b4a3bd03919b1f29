"""Attention over shared prompts on the variable-length kernel: the numbers of the definition, and no waiting."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import attention as switch
from torch.profiler import ProfilerActivity, profile

from perpo.prefix import flash_attention, flash_impl, flex_attention
from perpo.prefix.attention import masked_prefix_attention, prefix_attention
from perpo.prefix.layout import prefix_layout

needs_ampere = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="no flash attention on this GPU"
)

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


def assert_as_good_as_the_definition(layout: Any, dtype: Any, dim: int, device: Any, **options: Any) -> None:
    """Error against the definition in float64, beside that of the definition at this type; and ours is fused."""
    inputs = tensors(layout.n_tokens, dtype, dim, device)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = with_gradients(lambda *x: masked_prefix_attention(*x, layout, dim**-0.5, **options), exact)
    plain = with_gradients(lambda *x: masked_prefix_attention(*x, layout, dim**-0.5, **options), inputs)
    on_device = layout.map(lambda t: t.to(device))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        ours = with_gradients(lambda *x: prefix_attention(*x, on_device, **options), inputs)
    assert not {event.name for event in profiler.events()} & {"aten::matmul", "aten::bmm", "aten::softmax"}
    for name, e, a, b in zip(("out", "query", "key", "value"), expected, ours, plain, strict=True):
        error, theirs = ((x.double() - e).norm() / e.norm() for x in (a, b))
        assert error <= 2 * theirs + torch.finfo(dtype).eps / 2, name


@needs_ampere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [32, 64, 80, 128, 100, 256])
@pytest.mark.parametrize("blocks", [None, BLOCKS], ids=["causal", "image blocks"])
def test_outputs_and_gradients_are_the_definitions(device, dtype, dim, blocks):
    layout = prefix_layout([n for n, _ in LISTS], [answers for _, answers in LISTS], blocks)
    assert flash_attention.supports(tensors(layout.n_tokens, dtype, dim, device)[0])
    assert_as_good_as_the_definition(layout, dtype, dim, device)


@needs_ampere
def test_answers_of_one_token_are_not_taken_for_grouped_heads(device):
    assert_as_good_as_the_definition(prefix_layout([40, 9], [[1] * 5, [1]]), torch.bfloat16, 64, device)
    assert_as_good_as_the_definition(prefix_layout([40, 9], [[1], [1]]), torch.bfloat16, 64, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
def test_flash_attention_4_gives_the_definitions_too(device, dtype, dim):
    pytest.importorskip("flash_attn.cute.interface", reason="flash-attn-4 is not installed")
    if torch.cuda.get_device_capability() not in [(9, 0), (10, 0)] or torch.__version__ < (2, 14):
        pytest.skip("flash-attn-4 is for Hopper and Blackwell, through PyTorch 2.14 and newer")
    layout = prefix_layout([n for n, _ in LISTS], [answers for _, answers in LISTS], BLOCKS)
    flash_impl.activate("FA4", torch.device(device), shared=True)
    try:
        assert_as_good_as_the_definition(layout, dtype, dim, device)
    finally:
        switch.restore_flash_attention_impl()


@pytest.mark.flex
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [32, 64, 256])
@pytest.mark.parametrize(
    ("window", "softcap"), [(None, None), (50, None), (None, 5.0), (50, 5.0)], ids=["plain", "window", "cap", "both"]
)
@pytest.mark.parametrize("blocks", [None, BLOCKS], ids=["causal", "image blocks"])
def test_flex_attention_serves_windows_soft_caps_and_fp32(device, dtype, dim, window, softcap, blocks):
    """Gemma's attention is both with image blocks."""
    layout = prefix_layout([n for n, _ in LISTS], [answers for _, answers in LISTS], blocks)
    assert flex_attention.supports(tensors(layout.n_tokens, dtype, dim, device)[0])
    assert_as_good_as_the_definition(layout, dtype, dim, device, window=window, softcap=softcap)


@pytest.mark.flex
def test_one_compiled_kernel_serves_all_layouts_windows_and_caps(device):
    def run(n: int, window: int | None, softcap: float) -> None:
        layout = prefix_layout([n, 77], [[24, 30], [40]])
        inputs = tensors(layout.n_tokens, torch.bfloat16, 64, device)
        layout = layout.map(lambda t: t.to(device))
        with_gradients(lambda *x: prefix_attention(*x, layout, window=window, softcap=softcap), inputs)

    run(300, 50, 5.0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(700, None, 30.0)
        run(1500, 200, 50.0)


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"window": 50, "softcap": 5.0}, marks=pytest.mark.flex)], ids=["parts", "flex"]
)
def test_nothing_waits_for_the_gpu(device, options):
    layout = prefix_layout([n for n, _ in LISTS], [answers for _, answers in LISTS], BLOCKS)
    inputs = tensors(layout.n_tokens, torch.bfloat16, 64, device)
    layout = layout.map(lambda t: t.to(device))
    with_gradients(lambda *x: prefix_attention(*x, layout, **options), inputs)
    torch.cuda.set_sync_debug_mode("error")
    layout = layout.map(lambda t: t)  # with no masks made
    try:
        with_gradients(lambda *x: prefix_attention(*x, layout, **options), inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
