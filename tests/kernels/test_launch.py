"""How kernels are launched: on the device of their tensors, log-probs with and without a gradient in the same bits."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import perpo_kernels as pk
from perpo_kernels.ops.lists import new_list_result
from perpo_kernels.problem import ListProblem, LogitMap

pytest.importorskip("triton", reason="triton has no package for this platform")

from benchmarks.kernel_cases import kernel_objects
from perpo_kernels.backends import triton as kernels
from perpo_kernels.backends.triton import common

PLAIN, CAPPED = LogitMap(), LogitMap(softcap=30.0)
Launch = dict[str, Any]  # of the kernel, its grid and options, and the device that was current


class Devices:
    """Two GPUs that are not there; which one is current."""

    def __init__(self) -> None:
        self.current = 0
        self.switches = 0

    def switch(self, index: int) -> "Devices.Switch":
        return Devices.Switch(self, index)

    class Switch:
        def __init__(self, devices: "Devices", index: int) -> None:
            self.devices, self.index = devices, index

        def __enter__(self) -> None:
            self.before, self.devices.current = self.devices.current, self.index
            self.devices.switches += 1

        def __exit__(self, *_: object) -> None:
            self.devices.current = self.before


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Devices:
    devices = Devices()
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: devices.current)
    monkeypatch.setattr(torch.accelerator, "device_index", devices.switch)
    monkeypatch.setattr(common, "_l2_and_multiprocessors", lambda device: (50 << 20, 132))
    return devices


@pytest.fixture
def launches(devices: Devices, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What would have been launched."""
    found: list[Launch] = []

    def recorder(name: str) -> Callable[..., None]:
        def run(*arguments: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
            found.append({"kernel": name, "device": devices.current, "grid": grid, "options": options})

        return run

    for kernel in kernel_objects():
        monkeypatch.setattr(kernel, "run", recorder(kernel.fn.__name__))
    return found


def launch_all(device: str) -> None:
    """Every launcher of the backend, once."""
    logits, labels = torch.empty(6, 40, device=device), torch.empty(6, dtype=torch.int64, device=device)
    _, lse = kernels.log_prob_rows(logits, labels, PLAIN)
    kernels.fused_rows_(logits, labels, PLAIN)
    kernels.grad_rows_(logits, labels, lse, None, PLAIN, logits)
    kernels.clear_rows_(logits, torch.empty(6, device=device))
    cu_lists = torch.empty(2, dtype=torch.int32, device=device)
    problem = ListProblem(torch.empty(6, device=device), cu_lists)
    kernels.list_loss(torch.empty(6, device=device), problem, new_list_result(problem.rewards, problem))


@pytest.fixture
def fake_tensors() -> Iterator[None]:
    with FakeTensorMode():
        yield


@pytest.mark.parametrize("current", [0, 1])
def test_a_launch_happens_on_the_device_of_its_tensors(launches, devices, fake_tensors, current):
    """A model on cuda:1 in a process whose current device is cuda:0, as device_map="auto" makes it."""
    devices.current = current
    launch_all("cuda:1")
    assert {launch["kernel"] for launch in launches} == {kernel.fn.__name__ for kernel in kernel_objects()}
    assert [launch["device"] for launch in launches] == [1] * len(launches)
    assert devices.current == current
    assert devices.switches == (len(launches) if current == 0 else 0), "the right device costs no switch"


def test_on_the_cpu_no_device_is_asked_for(launches, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: pytest.fail("there is no accelerator"))
    launch_all("cpu")
    assert launches


def test_every_launch_says_that_products_and_sums_are_fused(launches):
    """Triton's default changes after 3.9, and with it the code and the digits of every kernel."""
    launch_all("cpu")
    assert all(launch["options"]["enable_fp_fusion"] is True for launch in launches)


ROW_LENGTHS = (1, 7, 33, 4099, 32000, 32768, 32769, 40000, 65537, 152064, 262208)


@pytest.mark.parametrize("z", [PLAIN, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n_vocab", ROW_LENGTHS)
def test_a_row_is_summed_by_the_same_threads_with_and_without_a_gradient(launches, n_vocab, dtype, z):
    logits, labels = torch.empty(2, n_vocab, dtype=dtype, device="meta"), torch.empty(2, device="meta")
    kernels.log_prob_rows(logits, labels, z)
    kernels.fused_rows_(logits, labels, z)
    read, fused = (launch["options"] for launch in launches)
    assert read == {name: value for name, value in fused.items() if name != "KEEP"}


def random_rows(n_rows: int, n_vocab: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return (3 * torch.randn(n_rows, n_vocab)).bfloat16(), torch.randint(n_vocab, (n_rows,))


@pytest.mark.parametrize("z", [PLAIN, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize(("n_rows", "n_vocab"), [(24, 40000), (8, 152064)])
def test_log_probs_are_the_same_bits_with_and_without_a_gradient(n_rows, n_vocab, z):
    """A model that is scored against itself has scores of exactly 0."""
    logits, labels = random_rows(n_rows, n_vocab)
    log_probs, lse = kernels.log_prob_rows(logits, labels, z)
    fused_log_probs, fused_lse = kernels.fused_rows_(logits, labels, z)
    assert torch.equal(log_probs, fused_log_probs)
    assert torch.equal(lse, fused_lse)


def test_a_list_that_is_computed_twice_has_the_log_probs_of_one_that_is_computed_once():
    """Under a trainable head a list past the budget takes another kernel. The GEMM is exact here, in any order."""
    n_tokens, n_vocab = 36, 40000
    torch.manual_seed(0)
    hidden = torch.randint(-2, 3, (n_tokens, 8)).bfloat16().requires_grad_()
    weight = (torch.randint(-4, 5, (n_vocab, 8)) / 8).bfloat16().requires_grad_()
    labels = torch.randint(n_vocab, (n_tokens,))
    layout = {"cu_seqlens": torch.tensor([0, 12, 24, 36]), "cu_lists": torch.tensor([0, 3])}
    once, twice = (
        pk.linear_perpo_loss(
            hidden, weight, labels, torch.tensor([0.1, 0.9, 0.4]), **layout, max_chunk_bytes=size, backend="triton"
        )
        for size in (1 << 30, 12 * n_vocab * 2)
    )
    assert torch.equal(once.log_probs, twice.log_probs)
    assert torch.equal(once.loss, twice.loss)


@pytest.mark.parametrize("n_programs", [1, 3, 64])
def test_a_program_takes_row_after_row(monkeypatch, n_programs):
    logits, labels = random_rows(7, 300)
    labels[2] = PLAIN.ignore_index
    whole, expected = logits.clone(), kernels.fused_rows_(logits, labels, PLAIN)
    monkeypatch.setattr("perpo_kernels.backends.triton.grad_rows.rows_at_once", lambda *_: n_programs)
    found = kernels.fused_rows_(whole, labels, PLAIN)
    assert torch.equal(whole, logits)
    assert all(map(torch.equal, found, expected))


MIB = 1 << 20


@pytest.mark.parametrize(
    ("n_vocab", "l2_bytes", "multiprocessors", "programs"),
    [
        (32000, 50 * MIB, 132, 4096),  # all that run at once fit
        (152064, 50 * MIB, 132, 4096),
        (262208, 50 * MIB, 132, 132),  # an H100 runs 264 and holds 159
        (262208, 40 * MIB, 108, 108),  # A100
        (262208, 126 * MIB, 148, 4096),  # B200
        (262208, 20 * MIB, 100, 63),  # fewer than there are multiprocessors, and more than half of them
        (152064, 6 * MIB, 72, 4096),  # A10: L2 holds nothing to speak of
        (262208, 4 * MIB, 304, 4096),  # MI300X: L2 of one of eight dies
        (262208, 0, 0, 4096),  # no GPU
    ],
)
def test_as_many_long_rows_run_at_once_as_l2_holds(monkeypatch, n_vocab, l2_bytes, multiprocessors, programs):
    monkeypatch.setattr(common, "_l2_and_multiprocessors", lambda device: (l2_bytes, multiprocessors))
    threads = 256 if n_vocab == 32000 else 512
    assert common.rows_at_once(4096, 2 * n_vocab, threads, torch.device("cuda:0")) == programs
    assert common.rows_at_once(5, 2 * n_vocab, threads, torch.device("cuda:0")) == 5
