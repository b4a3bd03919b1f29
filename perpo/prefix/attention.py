"""Attention over a packed row in which many answers share their prompt, exactly, without a mask.

A row [prompts | answers] holds every prompt once. An answer's tokens see their prompt and the answer up to themselves,
as in a row of their own. That is a sum of plain attentions, here called parts, over contiguous ranges of the row:

    prompt × its own tokens, causal          answers × their prompt, all of it          answer × itself, causal

(and a few more where the tokens of an image see each other). Where two parts give outputs o_a, o_b with log-sum-exps
l_a, l_b for the same queries, attention over both key ranges is

    l = log(e^l_a + e^l_b)          o = o_a e^(l_a − l) + o_b e^(l_b − l)

In the backward pass each part's own flash backward, called with the merged o and l, gives its exact share of dQ, dK and
dV: P_ij = exp(q_i k_j − l_i) and Σ_j P_ij dP_ij = dO_i · O_i hold for the merged attention, and it needs only these.

Soft caps, windows shorter than a list and fp32 on a GPU have no such kernel. There FlexAttention is used
(`perpo.prefix.flex_attention`), and where that is not either, as on a CPU, PyTorch's attention with a mask, list by
list.

`register_attention` makes a Hugging Face model use it in its language model when a forward pass is given
`prefix_layout`; every other call runs as before. The layout has to be a keyword of the forward pass, as it then reaches
the layers again when gradient checkpointing recomputes them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.utils import logging

from perpo.prefix import flash_attention, flex_attention
from perpo.prefix.flash_attention import Gradients, PackedRow
from perpo.prefix.layout import PrefixLayout
from perpo.prefix.states import register_states
from perpo_kernels.checks import WITH_AUTOCAST
from perpo_kernels.problem import accumulation_dtype

logger = logging.get_logger(__name__)

NAME = "perpo_prefix"  # other calls run as "sdpa"
OVER_EAGER = "perpo_prefix_over_eager"  # other calls run as "eager"
PACKED = "perpo_prefix_packed"  # the same attention; transformers makes no mask for a name that has none registered


def register_attention(core: Any) -> None:
    """Let the language model inside a Hugging Face model (`PreTrainedModel`) take `prefix_layout`."""
    register_states(core)
    for name, other, mask in ((NAME, sdpa_attention_forward, sdpa_mask), (OVER_EAGER, _eager, eager_mask)):
        AttentionInterface.register(name, partial(_attention, other))
        AttentionMaskInterface.register(name, mask)
    AttentionInterface.register(PACKED, partial(_attention, sdpa_attention_forward))
    text = core.config.get_text_config()
    before = text._attn_implementation
    if before in (NAME, OVER_EAGER):
        return
    if before not in ("sdpa", "eager"):
        logger.warning(
            f"attn_implementation={before!r}: what {type(core).__name__}'s language model computes without a shared "
            "prompt (generation, evaluation) runs as 'sdpa' from now on; prefix_sharing='off' leaves it as it is"
        )
    name = OVER_EAGER if before == "eager" else NAME
    core.set_attn_implementation(name if text is core.config else {"text_config": name})


@contextmanager
def packed_forward(core: Any) -> Iterator[None]:
    """Inside, the model builds no mask, and does not look for one in position ids, which would wait for the GPU."""
    config = core.get_decoder().config
    before = config._attn_implementation
    config._attn_implementation = PACKED
    try:
        yield
    finally:
        config._attn_implementation = before


_before_flash: Callable[[Callable[..., Tensor], Tensor, Tensor], None] | None = None


@contextmanager
def flash_calls(see: Callable[[Callable[..., Tensor], Tensor, Tensor], None]) -> Iterator[None]:
    """Inside, `see(attend, query, key)` runs before every attention that takes flash kernels."""
    global _before_flash
    _before_flash = see
    try:
        yield
    finally:
        _before_flash = None


def prefix_attention(
    query: Tensor,  # [1, heads, T, D]
    key: Tensor,  # [1, key heads, T, D]
    value: Tensor,  # [1, key heads, T, D]
    layout: PrefixLayout,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:  # [1, heads, T, D]
    """softmax(scale · q kᵀ over the keys that the layout lets a query see) v, for every query.

    Args:
        query, key, value: of one packed row; grouped heads (heads a multiple of key heads) are not expanded.
        layout: of the row's T tokens.
        scale: default 1 / √D.
        softcap: scores become softcap · tanh(score / softcap).
        window: a token sees only this many tokens back, itself included, along its own prompt and answer.

    Raises:
        ValueError: shapes that do not fit the layout or each other.
    """
    _check_shapes(query, key, value, layout)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    device, dtype = query.device.type, query.dtype
    if device in WITH_AUTOCAST and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if window is not None and window >= layout.longest:
        window = None
    plain = softcap is None and window is None
    if device == "meta" or (plain and flash_attention.supports(query)):
        if _before_flash is not None:
            _before_flash(lambda q, k, v: _PrefixAttention.apply(q, k, v, layout, scale), query, key)
        return _PrefixAttention.apply(query, key, value, layout, scale)
    if flex_attention.supports(query):
        return flex_attention.attention(query, key, value, layout, scale, softcap, window)
    if softcap is None:
        return _list_by_list(query, key, value, layout, window, partial(_sdpa, scale=scale))
    return masked_prefix_attention(query, key, value, layout, scale, softcap, window)


def masked_prefix_attention(
    query: Tensor,  # [1, heads, T, D]
    key: Tensor,  # [1, key heads, T, D]
    value: Tensor,  # [1, key heads, T, D]
    layout: PrefixLayout,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:  # [1, heads, T, D]
    """The definition: list by list, all scores and a mask. Float64-capable, differentiable by autograd, slow."""

    def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        scores = (q @ k.transpose(2, 3)).to(accumulation_dtype(q.dtype)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        return scores.masked_fill(~visible, -math.inf).softmax(-1).to(v.dtype) @ v

    return _list_by_list(query, key, value, layout, window, attend)


def _list_by_list(
    query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, window: int | None, attend: Callable[..., Tensor]
) -> Tensor:  # [1, heads, T, D]
    groups = query.shape[1] // key.shape[1]
    rows, outputs = [], []
    for index, visible in layout.masks(window, query.device):
        q, k, v = (x[:, :, index] for x in (query, key, value))  # [1, heads, n, D]
        outputs.append(attend(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), visible))
        rows.append(index)
    return torch.cat(outputs, 2)[:, :, torch.cat(rows).argsort()]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, scale: float) -> Tensor:
    return scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout) -> None:
    n_tokens = layout.n_tokens
    if query.shape[0] != 1 or query.shape[2] != n_tokens or key.shape[2] != n_tokens:
        raise ValueError(
            f"prefix_layout: made for one row of {n_tokens} tokens, got queries {tuple(query.shape)} and keys "
            f"{tuple(key.shape)} [rows, heads, tokens, D]"
        )
    if value.shape != key.shape or query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1]:
        raise ValueError(
            "query, key, value: expected one head size, as many heads of values as of keys, and a multiple of them of "
            f"queries; got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)} [rows, heads, tokens, D]"
        )


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, scale: float) -> Tensor:
        lse = query.new_empty(query.shape[1], query.shape[2], dtype=accumulation_dtype(query.dtype))
        row = PackedRow(query, key, value, torch.empty_like(query), lse)
        for part in layout.parts:
            flash_attention.kernels_for(query).forward(row, part, scale)
        ctx.save_for_backward(*row)
        ctx.layout, ctx.scale = layout, scale
        return row.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        row = PackedRow(*ctx.saved_tensors)
        d = Gradients(grads[0], *(torch.zeros_like(x) for x in (row.query, row.key, row.value)))
        for part in ctx.layout.parts:
            flash_attention.kernels_for(row.query).backward(row, d, part, ctx.scale)
        return d.query, d.key, d.value, None, None


def _attention(
    other: Callable[..., tuple[Tensor, Tensor | None]],  # what runs without a layout
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    prefix_layout: PrefixLayout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in every attention layer."""
    if prefix_layout is None:
        kwargs |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
        return other(module, query, key, value, attention_mask, **kwargs)
    if dropout:
        raise ValueError(
            f"attention_dropout={dropout}: attention over a shared prompt has no dropout; set it to 0 in the model's "
            "config, or prefix_sharing='off'"
        )
    if kwargs.get("s_aux") is not None:
        raise ValueError("attention sinks are not supported with a shared prompt; set prefix_sharing='off'")
    out = prefix_attention(query, key, value, prefix_layout, scale=scaling, softcap=softcap, window=sliding_window)
    return out.transpose(1, 2), None


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The model's own, which its source file holds under one name in all of transformers."""
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)
