"""What the losses are about: the map from a head's outputs to logits, the lists, and what a solution of them holds.

These objects travel whole through every layer. A torch operator takes plain values only: `pack` turns an object into a
list of numbers, or of tensors and numbers, and `unpack` turns it back. A new number of an objective is one line in
`Objective`, a new tensor of the data is one line in `ListProblem`; no operator, fake implementation or backward pass
spells them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perpo_kernels.objectives import Objective


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class LogitMap(NamedTuple):
    """From what the head's GEMM (or the user) gives to the logits of the softmax.

    z = softcap · tanh(logit_scale · raw / softcap) / temperature, or logit_scale · raw / temperature without a
    soft cap. Rows whose label is `ignore_index` are not read.
    """

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    ignore_index: int = -100

    @property
    def pre(self) -> float:
        """What raw values are multiplied by first (before tanh if there is a soft cap)."""
        return self.logit_scale / (self.softcap or self.temperature)

    @property
    def post(self) -> float:
        """What tanh is multiplied by; 1 and unused without a soft cap."""
        return self.softcap / self.temperature if self.softcap else 1.0

    def pack(self) -> list[float]:
        return [self.temperature, self.softcap or 0.0, self.logit_scale, float(self.ignore_index)]

    @staticmethod
    def unpack(numbers: Sequence[float]) -> "LogitMap":
        temperature, softcap, logit_scale, ignore_index = numbers
        return LogitMap(temperature, softcap or None, logit_scale, int(ignore_index))


class ListProblem(NamedTuple):
    """Everything that the list loss reads beside the log-probs, all of it constant.

    Log-probs are per token, [T], where `cu_seqlens` and `labels` are given, else per candidate, [S].
    """

    rewards: Tensor  # [S]
    cu_lists: Tensor  # int32 [G + 1]
    cu_seqlens: Tensor | None = None  # int32 [S + 1]
    labels: Tensor | None = None  # int64 [T]
    ref_log_probs: Tensor | None = None  # [S]
    valid: Tensor | None = None  # bool [S]
    lengths: Tensor | None = None  # [S], of candidates, where log-probs are sums already
    token_weights: Tensor | None = None  # [T]
    pair_weights: Tensor | None = None  # [G, k, k]
    flip_probs: Tensor | None = None  # [S]
    objective: Objective = Objective()
    ignore_index: int = -100

    def pack(self) -> tuple[list[Tensor | None], list[float]]:
        """The tensors, in the order of the fields, and the numbers; `unpack` gives the problem back."""
        fields = self._asdict()
        return [fields[name] for name in TENSORS], [float(self.ignore_index), *self.objective.numbers()]

    @staticmethod
    def unpack(tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> "ListProblem":
        ignore_index, *objective = numbers
        fields: dict[str, Any] = dict(zip(TENSORS, tensors, strict=True))
        return ListProblem(**fields, objective=Objective.from_numbers(objective), ignore_index=int(ignore_index))

    def each(self, change: Callable[[Tensor], Tensor]) -> "ListProblem":
        """The problem with every tensor changed."""
        changed: dict[str, Any] = {name: change(x) for name, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(**changed)


TENSORS = tuple(name for name in ListProblem._fields if name not in ("objective", "ignore_index"))


class ListResult(NamedTuple):
    """What the list loss writes; fp32, or fp64 for fp64 log-probs."""

    losses: Tensor  # [G]
    coefficients: Tensor  # [T] or [S]: ∂(Σ losses)/∂log_probs; tokens outside every list keep what they held
    candidates: Tensor  # [3, S]: Σ ω log π, score s, reward (NaN for an invalid candidate)
    active: Tensor  # [G]: 1 if the list has a preferred pair, else 0
