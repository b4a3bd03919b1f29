"""FlexAttention over a packed row, for what flash attention does not support: soft caps, short windows, fp32 on a GPU.

It skips tiles of 128 × 128 pairs in which nobody sees anybody and asks `mask_mod` only in tiles that are partly seen.
The two ranges that each token sees give these tiles in T · T/128 comparisons, so that no mask of all pairs is
made. Scale, soft cap and window are tensors: one kernel, compiled once for a type, head size and kind of score, serves
all layers and layouts.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import config as compiler
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad
from torch.utils._triton import has_triton

from perpo.prefix.layout import TILE, PrefixLayout

MAX_KERNELS = 64  # in one process; the compiler's own limit is 8


@torch.compiler.assume_constant_result
def available(device: torch.device) -> bool:
    """Whether it has a forward and a backward pass on this kind of device."""
    return device.type == "cuda" and has_triton()


def supports(query: Tensor) -> bool:
    """Whether it is there for this device, type and head size."""
    return (
        available(query.device)
        and query.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and 16 <= query.shape[-1] <= 256
    )


def attention(
    query: Tensor,  # [1, heads, T, D]
    key: Tensor,  # [1, key heads, T, D]
    value: Tensor,  # [1, key heads, T, D]
    layout: PrefixLayout,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:  # [1, heads, T, D]
    """See `perpo.prefix.attention.prefix_attention`."""
    n_tokens = layout.n_tokens
    missing = layout.sight.shape[1] - n_tokens
    query, key, value = (pad(x, (0, 0, 0, missing)) for x in (query, key, value))
    in_model = torch.compiler.is_compiling()  # which is compiled as a whole
    run: Any = flex_attention if in_model else _run_compiled
    out = run(
        query,
        key,
        value,
        score_mod=_score_mod(layout, scale, softcap, query.device),
        block_mask=block_mask(layout, window, query.device),
        scale=1.0,
        enable_gqa=True,
    )
    return out[:, :, :n_tokens]


def block_mask(layout: PrefixLayout, window: int | None, device: torch.device) -> BlockMask:
    """Who sees whom, for FlexAttention; made once a layout and window."""
    found = layout.made.get(("tiles", window, device))
    if found is None:
        found = layout.made["tiles", window, device] = _block_mask(layout.seen(window).to(device))
    return found


def _block_mask(seen: Tensor) -> BlockMask:
    start, end, own_start, own_end = seen

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        prompt = (start[query] <= key) & (key < end[query])
        return prompt | ((own_start[query] <= key) & (key < own_end[query]))

    low = torch.arange(0, seen.shape[1], TILE, device=seen.device)  # first key of each tile
    ranges = [(a.unsqueeze(1), b.unsqueeze(1)) for a, b in ((start, end), (own_start, own_end))]
    touched = torch.stack([(a < low + TILE) & (b > low) & (a < b) for a, b in ranges]).any(0)  # [T, tiles]
    covered = torch.stack([(a <= low) & (b >= low + TILE) for a, b in ranges]).any(0)
    some = touched.view(len(low), TILE, -1).any(1)  # [tiles, tiles]
    full = covered.view(len(low), TILE, -1).all(1)
    return BlockMask.from_kv_blocks(*_ordered(some & ~full), *_ordered(full), BLOCK_SIZE=TILE, mask_mod=mask_mod)


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:  # int32 [1, 1, tiles], [1, 1, tiles, tiles]
    """How many key tiles each query tile has, and which: those come first."""
    order = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


def _score_mod(layout: PrefixLayout, scale: float, softcap: float | None, device: torch.device) -> Any:
    found = layout.made.get(("score", scale, softcap, device))
    if found is None:
        numbers = [torch.full((), x, device=device) for x in (scale, softcap or 1.0)]
        found = layout.made["score", scale, softcap, device] = numbers
    by, cap = found

    def scaled(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score * by

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score * by / cap)

    return scaled if softcap is None else capped


def _run_compiled(*args: Any, **options: Any) -> Tensor:
    with compiler.patch(recompile_limit=MAX_KERNELS):
        return _compiled()(*args, **options)


@cache
def _compiled() -> Any:
    """fullgraph: one kernel too many is an error; the compiler would else go on unfused, with all scores in memory."""
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)
