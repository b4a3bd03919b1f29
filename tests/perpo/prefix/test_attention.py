"""Attention over shared prompts against a row of its own for every answer."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

from perpo.prefix import flash_attention, flex_attention
from perpo.prefix.attention import masked_prefix_attention, prefix_attention
from perpo.prefix.layout import PrefixLayout, Range, prefix_layout

SHAPES = st.lists(
    st.tuples(st.integers(1, 12), st.lists(st.integers(0, 6), max_size=4)), min_size=1, max_size=3
)  # of each prompt its length and its answers'


def tensors(
    layout: PrefixLayout, dtype: torch.dtype = torch.float64, heads: int = 4, keys: int = 2, dim: int = 8
) -> Any:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, n, layout.n_tokens, dim) for n in (heads, keys, keys)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def separately(query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, **options: Any) -> Tensor:
    """A row [prompt | answer] for every answer; the prompt's outputs come from a row without answer."""
    out = torch.zeros_like(query)
    for prompt, answers, blocks in zip(layout.prompts, layout.answers, layout.blocks, strict=True):
        for answer in [(0, 0), *answers]:
            index = torch.cat((torch.arange(*prompt), torch.arange(*answer)))
            n = len(index)
            mask = torch.ones(n, n, dtype=torch.bool).tril()
            for start, end in blocks:
                mask[start:end, start:end] = True
            q, k, v = query[:, :, index], key[:, :, index], value[:, :, index]
            rows = sdpa(q, k, v, attn_mask=mask, enable_gqa=True, **options)
            new = index if answer == (0, 0) else index[prompt[1] - prompt[0] :]
            out = out.index_copy(2, new, rows[:, :, -len(new) :] if len(new) else rows[:, :, :0])
    return out


def with_gradients(function: Any, *inputs: Tensor) -> list[Tensor]:
    out = function(*inputs)
    towards = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).sin()  # fp16 would overflow
    return [out, *torch.autograd.grad(out, inputs, towards.to(out.dtype))]


def layout_of(shapes: Sequence[tuple[int, Sequence[int]]], blocks: Any = None) -> PrefixLayout:
    return prefix_layout([n for n, _ in shapes], [answers for _, answers in shapes], blocks)


@settings(max_examples=20, deadline=None)
@given(shapes=SHAPES)
def test_outputs_and_gradients_are_those_of_separate_rows(shapes: Any) -> None:
    layout = layout_of(shapes)
    inputs = tensors(layout)
    ours = with_gradients(lambda *x: prefix_attention(*x, layout, scale=0.3), *inputs)
    theirs = with_gradients(lambda *x: separately(*x, layout, scale=0.3), *inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-12)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_tokens_of_an_image_see_each_other(data: Any) -> None:
    shapes, blocks = data.draw(SHAPES), []
    for length, _ in shapes:
        ends = sorted(data.draw(st.sets(st.integers(0, length), max_size=4)))
        blocks.append([(a, b) for a, b in zip(ends[::2], ends[1::2], strict=False)])
    layout = layout_of(shapes, blocks)
    inputs = tensors(layout)
    ours = with_gradients(lambda *x: prefix_attention(*x, layout), *inputs)
    theirs = with_gradients(lambda *x: separately(*x, layout), *inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-13, rtol=1e-12)


@settings(max_examples=20, deadline=None)
@given(shapes=SHAPES, window=st.integers(1, 20))
def test_a_window_counts_along_prompt_and_answer(shapes: Any, window: int) -> None:
    layout = layout_of(shapes)
    query, key, value = tensors(layout)
    ours = prefix_attention(query, key, value, layout, window=window)
    for prompt, answers in zip(layout.prompts, layout.answers, strict=True):
        for answer in answers:
            index = torch.cat((torch.arange(*prompt), torch.arange(*answer)))
            n = len(index)
            mask = torch.ones(n, n, dtype=torch.bool).tril().triu(1 - window)
            alone = sdpa(query[:, :, index], key[:, :, index], value[:, :, index], attn_mask=mask, enable_gqa=True)
            torch.testing.assert_close(ours[:, :, index], alone)


@pytest.mark.parametrize(("window", "softcap"), [(7, None), (None, 0.7), (7, 0.7)])
def test_windows_and_soft_caps_have_the_gradients_of_the_definition(window: int | None, softcap: float | None) -> None:
    layout = layout_of([(12, [6, 0, 3]), (9, [5])], [[(2, 6)], []])
    inputs = tensors(layout)
    options = {"softcap": softcap, "window": window}
    ours = with_gradients(lambda *x: prefix_attention(*x, layout, scale=0.3, **options), *inputs)
    expected = with_gradients(lambda *x: masked_prefix_attention(*x, layout, scale=0.3, **options), *inputs)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_windows_masks_are_made_once_for_all_layers() -> None:
    layout = layout_of([(12, [6, 0, 3]), (9, [5])])
    inputs = tensors(layout)
    prefix_attention(*inputs, layout, window=7)
    made = layout.masks(7, torch.device("cpu"))
    prefix_attention(*inputs, layout, window=7).sum().backward()
    assert layout.masks(7, torch.device("cpu")) is made
    assert layout.map(lambda x: x).made == {}  # on another device they are others


@settings(max_examples=20, deadline=None)
@given(shapes=SHAPES, window=st.none() | st.integers(1, 20), tile=st.sampled_from([4, 128]))
def test_flex_attention_leaves_out_no_tile_in_which_a_key_is_seen(shapes: Any, window: int | None, tile: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_attention, "TILE", tile)
        layout = layout_of(shapes)
        mask = flex_attention.block_mask(layout, window, torch.device("cpu"))
    n = layout.sight.shape[1]
    sees = torch.zeros(n, n, dtype=torch.bool)
    for index, visible in layout.masks(window, torch.device("cpu")):
        sees[index.unsqueeze(1), index] = visible
    added = torch.arange(layout.n_tokens, n)
    sees[added, added] = True  # they see themselves alone, so that no row is empty
    places = torch.arange(n)
    asked = mask.mask_mod(torch.tensor(0), torch.tensor(0), places.unsqueeze(1), places)
    assert torch.equal(asked, sees)
    tiles = sees.view(n // tile, tile, n // tile, tile).transpose(1, 2)
    assert torch.equal(mask.to_dense()[0, 0].bool(), tiles.any(-1).any(-1))
    full = torch.zeros(n // tile, n // tile, dtype=torch.bool)
    for row, (number, which) in enumerate(zip(mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0], strict=True)):
        full[row, which[:number].long()] = True
    assert torch.equal(full, full & tiles.all(-1).all(-1))


HALF, WIDE = torch.bfloat16, torch.float32
FLEX_CASES = [(None, None, None), (50, None, None), (None, 2.0, None), (50, 2.0, [[(10, 200)], [(0, 5), (20, 60)]])]


def flex_against_the_definition(dim: int = 32) -> None:
    for window, softcap, blocks in FLEX_CASES:
        layout = layout_of([(300, [24, 1, 60, 0]), (77, [40, 40])], blocks)
        query, key, value = (x.detach() for x in tensors(layout, torch.float32, dim=dim))
        ours = flex_attention.attention(query, key, value, layout, 0.3, softcap, window)
        torch.testing.assert_close(ours, masked_prefix_attention(query, key, value, layout, 0.3, softcap, window))


def test_flex_attention_is_the_definition(monkeypatch: Any) -> None:
    """Its maths, without its kernels; it has no backward pass on a CPU."""
    traced = torch.compile(torch_flex_attention, dynamic=True, backend="aot_eager")
    monkeypatch.setattr(flex_attention, "_compiled", lambda: traced)
    flex_against_the_definition()


def test_more_kernels_than_the_compilers_limit_are_made_and_none_runs_unfused_unnoticed(monkeypatch: Any) -> None:
    """Past its limit of recompilations the compiler would go on with plain attention and a warning."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    traced = torch.compile(torch_flex_attention, dynamic=True, fullgraph=True, backend="eager")
    monkeypatch.setattr(flex_attention, "_compiled", lambda: traced)
    layout = layout_of([(300, [24, 1, 60, 0]), (77, [40, 40])])
    kinds = [(dim, dtype, softcap) for dim in (16, 32, 48) for dtype in (HALF, WIDE) for softcap in (None, 2.0)]

    def run() -> None:
        for dim, dtype, softcap in kinds:
            inputs = (x.detach().to(dtype) for x in tensors(layout, torch.float32, dim=dim))
            flex_attention.attention(*inputs, layout, 0.3, softcap)

    run()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(kinds) > torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    monkeypatch.setattr(flex_attention, "MAX_KERNELS", 3)
    with pytest.raises(Exception, match="fullgraph"):
        run()


def test_flex_attention_is_traced_into_a_compiled_model() -> None:
    layout = layout_of([(300, [24, 1, 60, 0]), (77, [40, 40])])
    query, key, value = (x.detach() for x in tensors(layout, torch.float32, dim=32))

    def layers(*inputs: Tensor) -> Tensor:
        windowed = flex_attention.attention(*inputs, layout, 0.3, 2.0, 50)
        return windowed + flex_attention.attention(*inputs, layout, 0.3, 2.0)

    ours = torch.compile(layers, fullgraph=True, backend="aot_eager")(query, key, value)
    expected = sum(masked_prefix_attention(query, key, value, layout, 0.3, 2.0, window) for window in (50, None))
    torch.testing.assert_close(ours, expected)


@pytest.mark.slow
def test_flex_attentions_kernel_is_the_definition(monkeypatch: Any) -> None:
    """The kernel for a CPU, which skips tiles as that for a GPU does; its dynamic form does not compile in 2.13."""
    compiled = torch.compile(torch_flex_attention, dynamic=False)
    monkeypatch.setattr(flex_attention, "_compiled", lambda: compiled)
    flex_against_the_definition()


@pytest.mark.parametrize(
    ("capability", "dtype", "dim", "flash", "by_flex"),
    [
        ((8, 0), HALF, 128, True, True),
        ((8, 6), HALF, 256, True, True),
        ((8, 6), HALF, 208, False, True),
        ((9, 0), WIDE, 128, False, True),
        ((7, 5), torch.float16, 64, False, True),
        ((9, 0), HALF, 8, True, False),
        ((9, 0), HALF, 512, False, False),
        ((9, 0), torch.float64, 64, False, False),
    ],
)
def test_what_a_gpu_has_decides_what_is_called(
    capability: Any, dtype: torch.dtype, dim: int, flash: bool, by_flex: bool, monkeypatch: Any
) -> None:
    query: Any = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(1, 4, 10, dim))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(flex_attention, "has_triton", lambda: True)
    assert flash_attention.supports(query) is flash
    assert flex_attention.supports(query) is by_flex
    monkeypatch.setattr(torch.version, "hip", "7.0")  # lays the log-sum-exp out in another way
    assert not flash_attention.supports(query)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    monkeypatch.setattr(flex_attention, "has_triton", lambda: False)
    assert not flash_attention.supports(query)
    assert not flex_attention.supports(query)


def test_a_soft_cap_bends_the_scores() -> None:
    layout = layout_of([(5, [3, 2])])
    query, key, value = tensors(layout, heads=2)
    ours = prefix_attention(query, key, value, layout, scale=1.0, softcap=0.5)
    scores = 0.5 * torch.tanh(query[0, :, 7:8] @ key[0].transpose(1, 2) / 0.5)  # the last token of the first answer
    expected = scores[:, :, :8].softmax(-1) @ value[0, :, :8]
    torch.testing.assert_close(ours[0, :, 7:8], expected)


@pytest.mark.parametrize(
    ("dtype", "dim"),
    [
        (torch.bfloat16, 32),
        (torch.bfloat16, 256),
        (torch.float16, 40),
        (torch.float16, 256),
        (torch.float32, 40),
        (torch.float32, 256),
    ],
)
def test_in_low_precision_it_is_no_worse_than_pytorch(dtype: torch.dtype, dim: int) -> None:
    layout = layout_of([(150, [30, 70, 1]), (40, [9])])
    wide = tensors(layout, dim=dim)
    wide = [x.detach().to(dtype).double().requires_grad_() for x in wide]
    narrow = [x.detach().to(dtype).requires_grad_() for x in wide]
    exact = with_gradients(lambda *x: separately(*x, layout), *wide)
    ours = with_gradients(lambda *x: prefix_attention(*x, layout), *narrow)
    plain = with_gradients(lambda *x: separately(*x, layout), *narrow)
    for name, e, a, b in zip(("out", "query", "key", "value"), exact, ours, plain, strict=True):
        error, theirs = ((x.double() - e).norm() / e.norm() for x in (a, b))
        assert error <= 1.5 * theirs + torch.finfo(dtype).eps / 4, name


def test_no_tensor_of_all_pairs_of_tokens_is_made() -> None:
    layout = layout_of([(600, [100] * 20)])
    query, key, value = tensors(layout, torch.float32)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                if isinstance(x, Tensor):
                    largest = max(largest, x.numel())
            return out

    with Watch():
        prefix_attention(query, key, value, layout).sum().backward()
    assert largest == query.numel()  # [1, 4, T, 8], where a mask alone would be T × T


def test_gradients_pass_gradcheck() -> None:
    layout = layout_of([(3, [2, 1])], [[(0, 2)]])
    assert torch.autograd.gradcheck(lambda *x: prefix_attention(*x, layout), tensors(layout, dim=4))


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    layout = layout_of([(3, [2, 1])])
    query, key, value = tensors(layout)
    (first,) = torch.autograd.grad(prefix_attention(query, key, value, layout).square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_the_definition_is_the_definition() -> None:
    layout = layout_of([(4, [2, 0, 3]), (6, [1])], [[(1, 3)], []])
    query, key, value = tensors(layout)
    expected = separately(query, key, value, layout)
    torch.testing.assert_close(masked_prefix_attention(query, key, value, layout, 8**-0.5), expected)


def varlen_forward(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *rest: Any, scale: float) -> Any:
    """What `aten._flash_attention_forward` does on CUDA, range by range on the CPU; checks what it demands."""
    max_q, max_k, dropout, causal, debug = rest
    assert dropout == 0.0
    assert debug is False
    assert q.shape[-1] % 8 == 0
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (max_q, max_k) == (max(2, int(cu_q.diff().max())), int(cu_k.diff().max()))
    out, lse = torch.full_like(q, torch.nan), torch.full((q.shape[1], q.shape[0]), torch.nan, dtype=q.dtype)
    for a, b in ranges(cu_q, cu_k):
        o, log_sum = flash_attention._CPU_FORWARD(
            heads_first(q, a), heads_first(k, b), heads_first(v, b), 0.0, causal, scale=scale
        )
        out[slice(*a)], lse[:, slice(*a)] = o[0].transpose(0, 1), log_sum[0]
    return out, lse, None, None, None


def varlen_backward(
    d: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    *rest: Any,
    scale: float,
) -> Any:
    causal, state = rest[3], rest[4]
    assert lse.is_contiguous()
    assert lse.shape == (q.shape[1], q.shape[0])
    assert state.dtype == torch.uint64
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    for a, b in ranges(cu_q, cu_k):
        parts = flash_attention._CPU_BACKWARD(
            *(heads_first(d, a), heads_first(q, a), heads_first(k, b), heads_first(v, b), heads_first(out, a)),
            *(lse[None, :, slice(*a)], 0.0, causal),
            scale=scale,
        )
        for total, part, where in zip(grads, parts, (a, b, b), strict=True):
            total[slice(*where)] = part[0].transpose(0, 1)
    return tuple(grads)


def ranges(cu_q: Tensor, cu_k: Tensor) -> list[tuple[Range, Range]]:
    bounds = [list(zip(cu.tolist(), cu.tolist()[1:], strict=False)) for cu in (cu_q, cu_k)]
    return list(zip(*bounds, strict=True))


def heads_first(x: Tensor, r: Range) -> Tensor:
    return x[slice(*r)].transpose(0, 1).unsqueeze(0)


@pytest.mark.parametrize("dim", [16, 12])
@pytest.mark.parametrize("blocks", [None, [[(1, 4)], [(0, 2), (3, 6)]]])
def test_the_calls_for_cuda_are_right_on_an_imitated_kernel(dim: int, blocks: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(flash_attention, "_CUDA_FORWARD", varlen_forward)
    monkeypatch.setattr(flash_attention, "_CUDA_BACKWARD", varlen_backward)
    monkeypatch.setattr(flash_attention, "kernels_for", lambda query: flash_attention._Cuda())
    layout = layout_of([(5, [3, 0, 2]), (7, [1, 4])], blocks)
    inputs = tensors(layout, dim=dim)
    ours = with_gradients(lambda *x: prefix_attention(*x, layout), *inputs)
    theirs = with_gradients(lambda *x: separately(*x, layout), *inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_the_whole_prompts_of_all_lists_are_one_part_and_so_are_all_answers() -> None:
    layout = layout_of([(5, [3, 0, 2]), (7, [1, 4])])
    assert [(len(part.queries), part.causal, part.merge) for part in layout.parts] == [
        (2, True, False),
        (2, False, False),
        (4, True, True),
    ]


def test_what_does_not_fit_is_refused_by_name() -> None:
    layout = layout_of([(3, [2])])
    query, key, value = tensors(layout)
    with pytest.raises(ValueError, match="prefix_layout: made for one row of 5 tokens"):
        prefix_attention(query[:, :, :4], key, value, layout)
    with pytest.raises(ValueError, match="a multiple of them of queries; got"):
        prefix_attention(query[:, :3], key, value, layout)
    with pytest.raises(ValueError, match="query, key, value: expected one head size"):
        prefix_attention(query, key, value[..., :4], layout)
    with pytest.raises(ValueError, match="prompt_lengths must be ≥ 1"):
        prefix_layout([0], [[1]])
    with pytest.raises(ValueError, match="expected one list for each of 2 prompts"):
        prefix_layout([1, 2], [[1]])
