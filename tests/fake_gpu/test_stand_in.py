"""The stand-in notes what it should, and fake tensors refuse what would wait."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from tests.fake_gpu.device import FakeGpu


def test_torch_has_no_gpu() -> None:
    assert not torch.cuda.is_available()


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_a_backward_pass_runs(gpu: FakeGpu, device: str) -> None:
    x, w = (torch.empty(4, 4, device=device, requires_grad=True) for _ in range(2))
    (x @ w).exp().sum().backward()
    assert x.grad is not None
    assert x.grad.device == torch.device(device)
    assert gpu.products == [(4, 4, 4)] * 3
    assert gpu.others["exp"] == 1
    assert not gpu.copies


def test_what_waits_raises_or_is_noted(gpu: FakeGpu) -> None:
    x = torch.empty(3, device="cuda")
    for wait in (lambda: x[0].item(), lambda: x.tolist(), lambda: bool(x.any()), lambda: torch.equal(x, x)):
        with pytest.raises(DataDependentOutputException):
            wait()
    for wait in (lambda: x.nonzero(), lambda: x[x > 0], lambda: x.masked_select(x > 0), lambda: x.unique()):
        with pytest.raises(DynamicOutputShapeException):
            wait()
    x.cpu()
    x.to("cpu", non_blocking=True)  # what it holds is not known before a synchronisation
    torch.ones(3).to("cuda")
    torch.tensor([1.0, 2.0], device="cuda")
    assert [copy.blocking for copy in gpu.copies] == [True] * 4
    gpu.clear()
    torch.ones(3).to("cuda", non_blocking=True)
    assert [copy.blocking for copy in gpu.copies] == [False]


def test_mixed_devices_raise_or_are_noted(gpu: FakeGpu) -> None:
    x = torch.empty(3, device="cuda")
    for y in (torch.empty(3), torch.empty(3, device="cuda:1")):
        with pytest.raises(RuntimeError):
            x + y
    x[torch.zeros(2, dtype=torch.int64)]  # an index on the CPU is copied
    assert gpu.mixed


def test_the_current_device_is_that_of_a_guard() -> None:
    assert torch.cuda.current_device() == 0
    with torch.cuda.device("cuda:1"):
        assert torch.cuda.current_device() == 1
    assert torch.cuda.current_device() == 0
