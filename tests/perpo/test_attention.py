"""Attention over shared prompts against a row of its own for every answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from perpo import flash_parts
from perpo.attention import masked_prefix_attention, prefix_attention
from perpo.prefix_layout import PrefixLayout, Range, prefix_layout

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
    towards = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).sin()
    return [out, *torch.autograd.grad(out, inputs, towards)]


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


def test_a_soft_cap_bends_the_scores() -> None:
    layout = layout_of([(5, [3, 2])])
    query, key, value = tensors(layout, heads=2)
    ours = prefix_attention(query, key, value, layout, scale=1.0, softcap=0.5)
    scores = 0.5 * torch.tanh(query[0, :, 7:8] @ key[0].transpose(1, 2) / 0.5)  # the last token of the first answer
    expected = scores[:, :, :8].softmax(-1) @ value[0, :, :8]
    torch.testing.assert_close(ours[0, :, 7:8], expected)


@pytest.mark.parametrize(
    ("dtype", "dim"),  # not float16 at 256: there PyTorch's own backward gives NaN on the CPU
    [(torch.bfloat16, 32), (torch.bfloat16, 256), (torch.float16, 40), (torch.float32, 40), (torch.float32, 256)],
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
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    out, lse = torch.full_like(q, torch.nan), torch.full((q.shape[1], q.shape[0]), torch.nan, dtype=q.dtype)
    for a, b in ranges(cu_q, cu_k):
        o, log_sum = flash_parts._CPU_FORWARD(
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
        parts = flash_parts._CPU_BACKWARD(
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
    monkeypatch.setattr(flash_parts, "_CUDA_FORWARD", varlen_forward)
    monkeypatch.setattr(flash_parts, "_CUDA_BACKWARD", varlen_backward)
    monkeypatch.setattr(flash_parts, "of", lambda query: flash_parts._Cuda())
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
    with pytest.raises(ValueError, match="prompt_lengths must be ≥ 1"):
        prefix_layout([0], [[1]])
    with pytest.raises(ValueError, match="expected one list for each of 2 prompts"):
        prefix_layout([1, 2], [[1]])
