"""What does the list loss cost by itself: from sequence log-probs and rewards to their gradient?

Hypothesis. One launch for any k and any number of lists, and no host synchronisation; so the time is that of a
launch until lists are many and long. A loop over pairs in Python pays several launches a pair, all-pairs PyTorch
a score of launches and [G, k, k] tensors.

Floor. None in bytes (the input is a few kB): what a launch costs. On a GPU ours and plain PyTorch are timed as called
and replayed from a CUDA graph; of each the device's time and, in `extra.with_host_ms`, what a caller waits for. `extra`
has the number of kernels, and `syncs`: whether the case fails under torch.cuda.set_sync_debug_mode("error"). For ours
that is asserted.

Shapes. k 2 (DPO), 5 and 20 (published), 64 to 1024 (the edge of what the kernel is made for); 1 to 4096 lists.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import perpo_kernels as pk
from benchmarks import peers
from benchmarks.harness import OURS, Case, kernel_launches
from benchmarks.problems import Setting

GRIDS = {
    "tiny": [(2, 4), (3, 8)],
    "cpu": [(1, 2), (2, 20), (64, 20), (1, 256), (1, 1024), (4096, 8)],
    "gpu": [(1, 2), (2, 20), (64, 20), (4096, 20), (1, 64), (64, 64), (1, 256), (64, 256), (1, 1024), (64, 1024)],
}
COMPILED = ((2, 20), (64, 20))  # lists and candidates at which torch.compile is measured
LARGEST_PAIRS = 1 << 28  # elements of [G, k, k] that all-pairs peers may make


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """An error if the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels_and_syncs(run: Callable[[], object]) -> dict[str, Any]:
    torch.cuda.synchronize()
    try:
        with no_synchronisation():
            run()
        syncs: bool | str = False
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        syncs = True
    return {"kernels": kernel_launches(run), "syncs": syncs}


def test_list_loss(benchmark: Any, compare: Any, setting: Setting, grid: tuple[int, int]) -> None:
    n_lists, k = grid
    log_probs = torch.randn(n_lists, k, device=setting.device).mul_(5).sub_(100).requires_grad_()
    rewards = torch.rand(n_lists, k, device=setting.device).sort(descending=True).values  # the loop wants them sorted
    ref = torch.randn(n_lists, k, device=setting.device).mul_(5).sub_(100)

    def case(name: str, fn: Callable[..., Tensor], graph: bool) -> Case:
        def run() -> object:
            return torch.autograd.grad(fn(log_probs, rewards, ref), log_probs)

        return Case(f"{name}, graph" if graph else name, run, graph=graph)

    cases = [case(OURS, pk.perpo_loss, False)]
    on_gpu = setting.device == "cuda"
    if on_gpu:
        cases.append(case(OURS, pk.perpo_loss, True))
    for peer in peers.for_task("list_loss"):
        fn, reason = peers.load(peer, setting.device)
        elsewhere = f"measured at {' and '.join(f'{g} x {n}' for g, n in COMPILED)}"
        reason = reason or peers.compiles_elsewhere(peer, setting.size, (n_lists, k) in COMPILED, elsewhere)
        if k > peer.largest_k or n_lists * k > 64 * peer.largest_k:
            reason = f"a loop over {n_lists * k * (k - 1) // 2} pairs takes minutes"
        elif n_lists * k * k > LARGEST_PAIRS:
            reason = f"[{n_lists}, {k}, {k}] tensors are too large"
        if fn is None or reason:
            cases.append(Case(peer.name, lambda: None, problem=reason))
            continue
        cases.append(case(peer.name, fn, False))
        if on_gpu and peer.name == "plain PyTorch":
            cases.append(case(peer.name, fn, True))
    for c in cases:
        if on_gpu and c.problem is None and not c.graph:
            c.run()  # compile first
            c.extra.update(kernels_and_syncs(c.run))
    if on_gpu:
        assert cases[0].extra["syncs"] is False
    compare("list_loss", f"{n_lists} lists of {k}", cases, {"lists": n_lists, "k": k})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "grid" in metafunc.fixturenames:
        grids = GRIDS[Setting.of(metafunc.config.getoption("--size")).size]
        metafunc.parametrize("grid", grids, ids=[f"{g}x{k}" for g, k in grids])
