"""What does a launch cost the host?

Hypothesis. With few tokens a loss is bound by the host, and half of its time are launches. A launch of ours takes at
most four times what Triton needs for a kernel of one argument (the floor).

How. The launchers run on meta tensors, through Triton's own JIT with a compiler and a driver that do nothing: arguments
are bound, specialised and looked up as for a GPU, and nothing is launched. The driver's share, about 5 µs, is missing.
No GPU is used, not even where there is one.

Shapes. Any: the time does not depend on them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from triton.runtime.driver import driver

from benchmarks.harness import FLOOR, OURS, Case
from benchmarks.kernel_cases import TARGETS, NoDevice, kernel_objects, meta
from perpo_kernels.ops.lists import new_list_result
from perpo_kernels.problem import ListProblem, LogitMap

REPEATS = 20  # launches of a sample


@triton.jit
def empty_kernel(x: Any) -> None:
    pass


class Nothing:
    """A compiled kernel whose launch does nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        return None


class HostOnly(NoDevice):
    def get_current_device(self) -> str:
        return "host only"  # the JIT's key for what it compiled


@contextmanager
def nothing_is_launched() -> Iterator[None]:
    """Triton up to the driver. Afterwards the kernels know nothing of it."""
    with (
        mock.patch.object(driver, "_active", HostOnly(TARGETS["sm_90"].gpu)),
        mock.patch("triton.compiler.compile", return_value=Nothing()),
    ):
        try:
            yield
        finally:
            for kernel in (*kernel_objects(), empty_kernel):
                kernel.device_caches.pop("host only", None)


def launchers() -> dict[str, Callable[[], object]]:
    from perpo_kernels.backends import triton as kernels

    z = LogitMap()
    logits, labels = meta(500, 152064, dtype=torch.bfloat16), meta(500, dtype=torch.int64)
    lse, coefficients = meta(2, 500), meta(500)
    tokens = ListProblem(
        rewards=meta(20),
        cu_lists=meta(2, dtype=torch.int32),
        cu_seqlens=meta(21, dtype=torch.int32),
        labels=labels,
        ref_log_probs=meta(20),
    )
    result = new_list_result(meta(500), tokens)
    return {
        "log_prob_rows": lambda: kernels.log_prob_rows(logits, labels, z),
        "fused_rows_": lambda: kernels.fused_rows_(logits, labels, z),
        "grad_rows_": lambda: kernels.grad_rows_(logits, labels, lse, coefficients, z, logits),
        "clear_rows_": lambda: kernels.clear_rows_(logits, coefficients),
        "list_loss": lambda: kernels.list_loss(coefficients, tokens, result),
    }


def times(run: Callable[[], object]) -> Callable[[], None]:
    def repeat() -> None:
        for _ in range(REPEATS):
            run()

    return repeat


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is launched then")
@pytest.mark.parametrize("kernel", ["log_prob_rows", "fused_rows_", "grad_rows_", "clear_rows_", "list_loss"])
def test_host_time(benchmark: Any, compare: Any, kernel: str) -> None:
    x = meta(1)
    with nothing_is_launched():
        cases = [Case(OURS, times(launchers()[kernel])), Case(FLOOR, times(lambda: empty_kernel[(1,)](x)))]
        compare("host_time", f"{REPEATS} launches of {kernel}", cases, {"launches": REPEATS}, by_host=True)
