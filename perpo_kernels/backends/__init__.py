"""Backends: the row and list primitives, and the choice among their implementations.

A backend is a module with the four functions of `Backend`. Everything above (GEMMs, chunking, autograd, layout) is
written once.
"""

import functools
import importlib
import importlib.util
import os
from typing import Protocol, cast

import torch
from torch import Tensor

from perpo_kernels.problem import ListProblem, ListResult, LogitMap

BACKENDS = ("auto", "triton", "eager", "reference")


class Backend(Protocol):
    """The primitives. logits: raw [N, V], or [B, N, V] of any row strides; labels int64 [rows]; results fp32 [rows]."""

    @staticmethod
    def log_prob_rows(logits: Tensor, labels: Tensor, z: LogitMap) -> tuple[Tensor, Tensor]:
        """log softmax(z)[label] of each row (0 where ignored, NaN for a label outside [0, V)), and its lse [2, rows].

        lse holds m, the maximum of u (z = z.scale · u), and l = log Σ exp(scale · (u − m)): the log-sum-exp is
        scale · m + l. At large logits the sum, and the product alone, have lost the digits that exp(z − lse) needs.
        """

    @staticmethod
    def fused_rows_(logits: Tensor, labels: Tensor, z: LogitMap) -> tuple[Tensor, Tensor]:
        """The same, and overwrites each row with D = ∂log_prob/∂raw = (onehot − softmax) · dz/draw; 0 where ignored."""

    @staticmethod
    def grad_rows_(
        logits: Tensor, labels: Tensor, lse: Tensor, coefficients: Tensor | None, z: LogitMap, out: Tensor
    ) -> None:
        """out = coefficients · D, with lse known; `out` may be `logits` itself. `coefficients` None means 1.

        A row whose coefficient is 0 is as absent as an ignored one: it is not read, and `out` gets zeros there.
        """

    @staticmethod
    def clear_rows_(rows: Tensor, coefficients: Tensor) -> None:
        """Zeros in each row [V] whose coefficient is 0, whatever stood there, NaN too."""

    @staticmethod
    def list_loss(log_probs: Tensor, problem: ListProblem, result: ListResult) -> None:
        """The objective of each list and its gradient, and what the candidates were ranked by, into `result`."""


@functools.cache
def _triton_problem() -> str | None:
    """Why Triton can't be used at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken install must not break `import perpo_kernels`
        return f"importing triton failed: {error!r}"
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def triton_problem(device_type: str, dtype: torch.dtype) -> str | None:
    """Why Triton can't serve tensors of this device and dtype, or None."""
    if dtype == torch.float64:
        return "its kernels compute in float32 and the input is float64"
    if device_type != "cuda" and not (device_type == "cpu" and _interpreting()):
        return f"it needs a CUDA or ROCm device (or TRITON_INTERPRET=1 on the CPU) and the input is on {device_type!r}"
    return _triton_problem()


def resolve(backend: str, device_type: str, dtype: torch.dtype) -> str:
    """`backend`, with "auto" replaced by $PERPO_BACKEND, or else by the fastest that can serve this device and dtype.

    Raises:
        ValueError: an unknown name, or a backend that can't serve this input (with the reason).
    """
    source = "backend"
    if backend == "auto":
        backend, source = os.environ.get("PERPO_BACKEND", "auto"), "PERPO_BACKEND"
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        return "triton" if device_type == "cuda" and triton_problem(device_type, dtype) is None else "eager"
    if backend == "triton" and (problem := triton_problem(device_type, dtype)) is not None:
        raise ValueError(f"{source}='triton' can't be used: {problem}; use 'eager' or 'auto'")
    return backend


@functools.cache
def load(name: str) -> Backend:
    """The backend's module; imported on first use, so that `import perpo_kernels` does not import triton."""
    return cast(Backend, importlib.import_module(f"perpo_kernels.backends.{name}"))
