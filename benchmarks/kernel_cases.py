"""Every kernel at every configuration that its launcher chooses, compiled for GPUs that are not there.

The launchers run on tensors of the `meta` device (shapes, strides and types without storage), so the constexprs, the
number of warps and the argument specialisations are those of a real launch. In place of a GPU's driver stands one that
knows only the target; Triton's own JIT then compiles for it and stops before the launch.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from benchmarks.machine_code import NVIDIA_TOOLS
from perpo_kernels import objectives
from perpo_kernels.objectives import Objective
from perpo_kernels.problem import ListProblem, ListResult, LogitMap


class Target(NamedTuple):
    """A GPU to compile for."""

    gpu: GPUTarget
    shared_limit: int  # bytes of shared memory that one program may ask for


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 << 10),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 << 10),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 << 10),
}


def available(target: str) -> bool:
    """Whether this Triton brings the assembler for the target."""
    return target != "sm_100" or (NVIDIA_TOOLS / "ptxas-blackwell").exists()


class Case(NamedTuple):
    """One launch of one kernel."""

    kernel: str
    case: str
    call: Callable[[], Any]  # runs the launcher on meta tensors
    itemsize: int = 4  # bytes of what streams through the hot loop


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def row_cases(name: str, n_vocab: int, dtype: torch.dtype, z: LogitMap) -> Iterator[Case]:
    from perpo_kernels.backends import triton as kernels

    n_rows = 4096
    logits = meta(n_rows, n_vocab, dtype=dtype)
    labels, lse, g = meta(n_rows, dtype=torch.int64), meta(2, n_rows), meta(n_rows)
    size = dtype.itemsize
    yield Case("log_prob_rows", name, lambda: kernels.log_prob_rows(logits, labels, z), size)
    yield Case("fused_rows_", name, lambda: kernels.fused_rows_(logits, labels, z), size)
    if z.softcap is None:  # what is cleared does not depend on the map
        yield Case("clear_rows_", name, lambda: kernels.clear_rows_(logits, g), size)
    yield Case("grad_rows_", name, lambda: kernels.grad_rows_(logits, labels, lse, g, z, logits), size)
    out = torch.empty_like(logits)
    yield Case("grad_rows_ (out)", name, lambda: kernels.grad_rows_(logits, labels, lse, g, z, out), size)


def list_cases(k: int, objective: Objective, name: str = "", weighted: bool = False) -> Iterator[Case]:
    from perpo_kernels.backends import triton as kernels

    n_lists, n_tokens = 64, 64 * k * 40
    given = meta(n_lists, k, k) if objective.pairs == "given" else None
    per_length = objective.length_normalized or objective.nll_per_token

    def call(tokens: bool) -> None:
        size = n_tokens if tokens else n_lists * k
        problem = ListProblem(
            rewards=meta(n_lists * k),
            cu_lists=meta(n_lists + 1, dtype=torch.int32),
            cu_seqlens=meta(n_lists * k + 1, dtype=torch.int32) if tokens else None,
            labels=meta(n_tokens, dtype=torch.int64) if tokens else None,
            ref_log_probs=meta(n_lists * k) if objective.reference else None,
            valid=None if tokens else meta(n_lists * k, dtype=torch.bool),
            lengths=meta(n_lists * k) if per_length and not tokens else None,
            flip_probs=meta(n_lists * k) if objective.flips else None,
            pair_weights=given,
            list_weights=meta(n_lists) if weighted else None,
            delta=meta(1) if objective.pointwise == "bco" else None,
            objective=objective,
        )
        result = ListResult(meta(n_lists), meta(size), meta(3, n_lists * k), meta(n_lists))
        kernels.list_loss(meta(size), problem, result)

    yield Case("list_loss (tokens)", f"k {k}{name}", lambda: call(True))
    yield Case("list_loss (sequences)", f"k {k}{name}", lambda: call(False))


def cases() -> Iterator[Case]:
    """Every kernel at the shapes of real models, and at the row lengths that alignment makes hard."""
    bf16, plain = torch.bfloat16, LogitMap()
    for n_vocab in (32000, 152064, 262208):
        yield from row_cases(f"bf16 {n_vocab}", n_vocab, bf16, plain)
    for n_vocab in (32001, 32004, 32008):  # odd, divisible by 4, divisible by 8 and not by 16
        yield from row_cases(f"bf16 {n_vocab}", n_vocab, bf16, plain)
    yield from row_cases("fp16 32000", 32000, torch.float16, plain)
    yield from row_cases("fp32 32000", 32000, torch.float32, plain)
    yield from row_cases("bf16 262208 capped", 262208, bf16, LogitMap(softcap=30.0))
    for k in (2, 20, 64, 1024):
        yield from list_cases(k, objectives.perpo())
    yield from list_cases(20, objectives.perpo(), " list weights", weighted=True)
    for name, preset in objectives.PRESETS.items():
        if name != "perpo":
            yield from list_cases(20, preset(), f" {name}")


class NoDevice:
    """What Triton's JIT asks a driver before it launches."""

    def __init__(self, gpu: GPUTarget) -> None:
        self.gpu = gpu

    def get_current_target(self) -> GPUTarget:
        return self.gpu

    def get_current_device(self) -> str:
        return str(self.gpu)  # the JIT's key for what it compiled already

    def get_current_stream(self, device: str) -> int:
        return 0


def kernel_objects() -> list[Any]:
    where = {
        "log_prob_rows": ["log_prob_rows_kernel"],
        "grad_rows": ["clear_rows_kernel", "fused_rows_kernel", "grad_rows_kernel"],
        "list_loss": ["list_loss_kernel"],
    }
    return [
        getattr(importlib.import_module(f"perpo_kernels.backends.triton.{module}"), name)
        for module, names in where.items()
        for name in names
    ]


def compile_for(gpu: GPUTarget, call: Callable[[], Any]) -> Any:
    """The kernel that `call` would launch on such a GPU: the same arguments through the same JIT, up to the launch."""
    from perpo_kernels.backends.triton import common

    compiled = []

    def instead(kernel: Any) -> Callable[..., None]:
        run = kernel.run

        def compile_only(*args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            compiled.append(run(*args, grid=grid, warmup=True, **kwargs))

        return compile_only

    driver.set_active(NoDevice(gpu))
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(common, "WARP_SIZE", gpu.warp_size))
        stack.enter_context(mock.patch.object(common, "DIVISION", "ptx" if gpu.backend == "cuda" else "ieee"))
        stack.enter_context(mock.patch.object(common, "LIMITS_REGISTERS", gpu.backend == "cuda"))
        for kernel in kernel_objects():
            stack.enter_context(mock.patch.object(kernel, "run", instead(kernel)))
        call()
    (kernel,) = compiled
    return kernel
