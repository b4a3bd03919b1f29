"""The losses of `perpo_kernels` on fake CUDA tensors: one case is one call and its backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import perpo_kernels as pk

N_VOCAB, N_HIDDEN = 32_000, 256
LISTS, K, N_RESPONSE = 2, 20, 12
N_CANDIDATES, N_TOKENS = LISTS * K, LISTS * K * N_RESPONSE
CHUNK_ROWS = {"one chunk": None, "a list a chunk": K * N_RESPONSE, "lists swept twice": 128}


@dataclass(frozen=True)
class LossCase:
    """Of `linear_perpo_loss`."""

    dtype: torch.dtype = torch.bfloat16
    trainable: bool = False
    bias: bool = False
    softcap: float | None = None
    chunks: str = "one chunk"
    layout: str = "cpu"
    device: str = "cuda:0"
    reduction: str = "mean"
    logits_dtype: torch.dtype | None = None
    grad: bool = True

    def run(self) -> None:
        """Forward and backward; the gradients are where, and what, their leaves are."""

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=self.device)

        hidden = new(N_TOKENS, N_HIDDEN, dtype=self.dtype).requires_grad_()
        weight = new(N_VOCAB, N_HIDDEN, dtype=self.dtype).requires_grad_(self.trainable)
        bias = new(N_VOCAB, dtype=self.dtype).requires_grad_(self.trainable) if self.bias else None
        cu_seqlens, cu_lists = layouts(self.layout if self.layout == "cpu" else self.device)
        rows = CHUNK_ROWS[self.chunks]
        with torch.set_grad_enabled(self.grad):
            out = pk.linear_perpo_loss(
                hidden,
                weight,
                new(N_TOKENS, dtype=torch.int64),
                new(N_CANDIDATES),
                cu_seqlens=cu_seqlens,
                cu_lists=cu_lists,
                ref_log_probs=new(N_CANDIDATES),
                bias=bias,
                softcap=self.softcap,
                reduction=self.reduction,
                logits_dtype=self.logits_dtype,
                max_chunk_bytes=None if rows is None else rows * N_VOCAB * self.dtype.itemsize,
            )
        assert out.loss.shape == ((LISTS,) if self.reduction == "none" else ())
        if self.grad:
            differentiate(out.loss, [x for x in (hidden, weight, bias) if x is not None and x.requires_grad])

    def metrics(self) -> None:
        new = torch.empty(N_CANDIDATES, device=self.device)
        _, cu_lists = layouts(self.layout if self.layout == "cpu" else self.device)
        out = pk.LinearPerPOOutput(new.sum(), new, new, new, new[:LISTS], cu_lists, 0.1)
        assert all(x.device == new.device and x.dim() == 0 for x in out.metrics.values())


def layouts(device: str) -> tuple[Tensor, Tensor]:
    """cu_seqlens and cu_lists."""
    if device == "cpu":
        return pk.layout.cumulative([N_RESPONSE] * N_CANDIDATES), pk.layout.cumulative([K] * LISTS)
    new = partial(torch.empty, dtype=torch.int32, device=device)
    return new(N_CANDIDATES + 1), new(LISTS + 1)


def differentiate(loss: Tensor, leaves: list[Any]) -> None:
    gradients = torch.autograd.grad(loss.sum(), leaves)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert (gradient.shape, gradient.dtype, gradient.device) == (leaf.shape, leaf.dtype, leaf.device)
