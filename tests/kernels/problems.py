"""Inputs of the tests: random heads, ragged lists, and how a function is differentiated in a chosen dtype."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import perpo_kernels as pk

IGNORED = -100


def random_labels(n_vocab: int, *shape: int, device: torch.device, ignored: float = 0.0) -> Tensor:
    labels = torch.randint(n_vocab, shape, device=device)
    return labels.masked_fill_(torch.rand(shape, device=device) < ignored, IGNORED)


class Head(NamedTuple):
    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    bias: Tensor  # [V]
    labels: Tensor  # [T]


def random_head(
    n_tokens: int, n_hidden: int, n_vocab: int, device: torch.device, dtype: torch.dtype, ignored: float = 0.0
) -> Head:
    """Logits of standard deviation 2, rounded to `dtype`, so that every dtype sees the same numbers exactly."""
    hidden = torch.randn(n_tokens, n_hidden, device=device)
    weight = torch.randn(n_vocab, n_hidden, device=device) * (2 / n_hidden**0.5)
    bias = torch.randn(n_vocab, device=device)
    labels = random_labels(n_vocab, n_tokens, device=device, ignored=ignored)
    return Head(hidden.to(dtype), weight.to(dtype), bias.to(dtype), labels)


class Lists(NamedTuple):
    rewards: Tensor  # [S]
    ref_log_probs: Tensor  # [S]
    cu_seqlens: Tensor  # [S + 1]
    cu_lists: Tensor  # [G + 1]

    @property
    def n_tokens(self) -> int:
        return int(self.cu_seqlens[-1])


def ragged_lists(response_lengths: Sequence[Sequence[int]], device: torch.device) -> Lists:
    """One list for each inner sequence, one candidate for each length in it."""
    flat = [n for lengths in response_lengths for n in lengths]
    return Lists(
        torch.rand(len(flat), device=device),
        torch.randn(len(flat), device=device) - 3 * torch.tensor(flat, dtype=torch.float32, device=device),
        pk.layout.cumulative(flat, device=device),
        pk.layout.cumulative([len(lengths) for lengths in response_lengths], device=device),
    )


RAGGED = ((3, 1, 4), (2, 5), (6,), (1, 2, 0, 3, 2), (4, 4))  # a lone candidate and an empty response among them


def value_and_gradients(
    fn: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    trainable: Sequence[str],
    upstream: Tensor | float,
    **rest: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """fn(**inputs, **rest), and the gradient of (value · upstream).sum() in each of `trainable`."""
    leaves = {name: x.detach().clone().requires_grad_(name in trainable) for name, x in inputs.items()}
    value = fn(**leaves, **rest)
    if trainable:
        weight = upstream.to(value.dtype) if isinstance(upstream, Tensor) else upstream
        (value * weight).sum().backward()
    return value.detach(), {name: leaves[name].grad for name in trainable}
