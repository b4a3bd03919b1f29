"""Attention over a packed row in which many answers share their prompt, exactly, without a mask.

A row [prompts | answers] holds every prompt once. An answer's tokens see their prompt and the answer up to themselves,
as in a row of their own. That is a sum of plain attentions, here called parts, over contiguous ranges of the row:

    prompt × its own tokens, causal          answers × their prompt, all of it          answer × itself, causal

(and a few more where the tokens of an image see each other). Where two parts give outputs o_a, o_b with log-sum-exps
l_a, l_b for the same queries, attention over both key ranges is

    l = log(e^l_a + e^l_b)          o = o_a e^(l_a − l) + o_b e^(l_b − l)

In the backward pass each part's own flash backward, called with the merged o and l, gives its exact share of dQ, dK and
dV: P_ij = exp(q_i k_j − l_i) and Σ_j P_ij dP_ij = dO_i · O_i hold for the merged attention, and it uses nothing else.

`install` makes a Hugging Face model use it in its language model when a forward pass is given `prefix_layout`; every
other call runs as scaled dot product attention, masks included. The layout has to be a keyword of the forward pass, as
it then reaches the layers again when gradient checkpointing recomputes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from perpo import flash_parts
from perpo.flash_parts import Gradients, Row
from perpo.prefix_layout import PrefixLayout

NAME = "perpo_prefix"
PACKED = "perpo_prefix_packed"  # the same attention; transformers makes no mask for a name that has none registered


def install(core: Any) -> None:
    """Let the language model inside a Hugging Face model (`PreTrainedModel`) take `prefix_layout`."""
    AttentionInterface.register(NAME, _attention)
    AttentionInterface.register(PACKED, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    text = core.config.get_text_config()
    if text is core.config:
        core.set_attn_implementation(NAME)
    else:
        core.set_attn_implementation({"text_config": NAME})


@contextmanager
def packed_forward(core: Any) -> Iterator[None]:
    """Inside, the model builds no mask, and does not look for one in position ids, which would wait for the GPU."""
    config = core.get_decoder().config
    config._attn_implementation = PACKED
    try:
        yield
    finally:
        config._attn_implementation = NAME


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
        softcap: scores become softcap · tanh(score / softcap). Takes the slow way: a mask for each list.
        window: a token sees only so many tokens back, counted along its own prompt and answer. The slow way too,
            unless all lists fit into the window.

    Raises:
        ValueError: shapes that do not fit the layout.
    """
    n_tokens = layout.n_tokens
    if query.shape[0] != 1 or query.shape[2] != n_tokens or key.shape[2] != n_tokens:
        raise ValueError(
            f"prefix_layout: made for one row of {n_tokens} tokens, got queries {tuple(query.shape)} and keys "
            f"{tuple(key.shape)} [rows, heads, tokens, D]"
        )
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    device, dtype = query.device.type, query.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if window is not None and window >= layout.longest:
        window = None
    if softcap is None and window is None and flash_parts.supports(query):
        return _PrefixAttention.apply(query, key, value, layout, scale)
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
    groups = query.shape[1] // key.shape[1]
    rows, outputs = [], []
    for index, visible in layout.masks(window, query.device):
        q, k, v = query[0][:, index], key[0][:, index], value[0][:, index]  # [heads, n, D]
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores = (q @ k.transpose(1, 2)).to(_wide(q.dtype)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        rows.append(index)
        outputs.append(weights.to(v.dtype) @ v)
    order = torch.cat(rows).argsort()
    return torch.cat(outputs, 1)[:, order].unsqueeze(0)


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, scale: float) -> Tensor:
        lse = query.new_empty(query.shape[1], query.shape[2], dtype=_wide(query.dtype))
        row = Row(query, key, value, torch.empty_like(query), lse)
        for part in layout.parts:
            flash_parts.of(query).forward(row, part, scale)
        ctx.save_for_backward(*row)
        ctx.layout, ctx.scale = layout, scale
        return row.out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        row = Row(*ctx.saved_tensors)
        d = Gradients(grads[0], *(torch.zeros_like(x) for x in (row.query, row.key, row.value)))
        for part in ctx.layout.parts:
            flash_parts.of(row.query).backward(row, d, part, ctx.scale)
        return d.query, d.key, d.value, None, None


def _attention(
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
) -> tuple[Tensor, None]:
    """What transformers calls in every attention layer."""
    if prefix_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if dropout:
        raise ValueError(
            f"attention_dropout={dropout}: attention over a shared prompt has no dropout; set it to 0 in the model's "
            "config, or prefix_sharing='off'"
        )
    if kwargs.get("s_aux") is not None:
        raise ValueError("attention sinks are not supported with a shared prompt; set prefix_sharing='off'")
    out = prefix_attention(query, key, value, prefix_layout, scale=scaling, softcap=softcap, window=sliding_window)
    return out.transpose(1, 2), None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
