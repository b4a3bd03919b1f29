"""What the losses are about: the map from a head's outputs to logits, the lists, and what a solution of them holds.

These objects travel whole through every layer. A torch operator takes plain values only: `pack` turns a problem into a
list of tensors, `numbers` an objective or a map into a list of floats, and `unpack` and `from_numbers` turn them back.
A new number of an objective is one line in `Objective`, a new tensor of the data is one line in `ListProblem`; no
operator, fake implementation or backward pass spells them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perpo_kernels.objectives import Objective

PERPO = Objective()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pack_numbers(values: Sequence[float]) -> tuple[list[float], Tensor | None]:
    """What an operator is given for floats: themselves; or, while torch.compile traces, one fp64 tensor on the CPU.

    A float that changes from call to call is symbolic in a trace. An operator that takes it as a float is compiled anew
    for every value, and a float that was computed from a symbolic one arrives with the value it had when it was traced
    (inductor keeps the first one). A tensor has neither fault, if it is made by arithmetic on a tensor, as here.
    """
    if not torch.compiler.is_compiling():
        return list(values), None
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return [0.0], torch.stack([one * value for value in values])  # an empty list is taken for one of tensors


@functools.lru_cache(64)
def _numbers_of(item: "LogitMap | Objective") -> list[float]:
    return item.numbers()


def packed(*items: "LogitMap | Objective") -> tuple[list[float], Tensor | None]:
    """The numbers of maps and objectives, as `pack_numbers` gives them; found once where nothing is traced."""
    of = (lambda item: item.numbers()) if torch.compiler.is_compiling() else _numbers_of
    return pack_numbers([x for item in items for x in of(item)])


def unpack_numbers(numbers: Sequence[float], traced: Tensor | None) -> list[float]:
    return list(numbers) if traced is None else traced.tolist()


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

    @property
    def scale(self) -> float:
        """z = scale · u, where u is the raw value, or tanh(pre · raw) under a soft cap."""
        return self.post if self.softcap else self.pre

    def numbers(self) -> list[float]:
        return [self.temperature, 0.0 if self.softcap is None else self.softcap, self.logit_scale]

    @staticmethod
    def from_numbers(numbers: Sequence[float], ignore_index: int) -> "LogitMap":
        temperature, softcap, logit_scale = numbers
        return LogitMap(temperature, softcap or None, logit_scale, ignore_index)


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
    list_weights: Tensor | None = None  # [G]
    delta: Tensor | None = None  # [1]
    objective: Objective = PERPO
    ignore_index: int = -100

    def pack(self) -> list[Tensor | None]:
        """The tensors, in the order of the fields; `unpack` gives the problem back."""
        return list(self[: len(TENSORS)])  # type: ignore[arg-type]  # tensors come first

    @staticmethod
    def unpack(
        tensors: Sequence[Tensor | None], ignore_index: int = -100, objective: Objective = PERPO
    ) -> "ListProblem":
        """A fake implementation, which wants shapes, has no numbers to make the objective of."""
        assert len(tensors) == len(TENSORS)
        fields: list[Any] = [*tensors, objective, ignore_index]
        return ListProblem(*fields)

    def each(self, change: Callable[[Tensor], Tensor]) -> "ListProblem":
        """The problem with every tensor changed."""
        changed: list[Any] = [change(x) if isinstance(x, Tensor) else x for x in self]
        return ListProblem(*changed)


TENSORS = ListProblem._fields[: ListProblem._fields.index("objective")]  # the objective and numbers come last


class ListResult(NamedTuple):
    """What the list loss writes; fp32, or fp64 for fp64 log-probs."""

    losses: Tensor  # [G]
    coefficients: Tensor  # [T] or [S]: ∂(Σ losses)/∂log_probs; tokens outside every list keep what they held
    candidates: Tensor  # [3, S]: Σ ω log π, score s, reward (NaN for an invalid candidate)
    active: Tensor  # [G]: 1 if the list has a preferred pair, else 0
