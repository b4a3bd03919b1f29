"""Every way through `perpo_kernels` on CUDA, forward and backward: nothing waits, nothing is on two devices."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import perpo_kernels as pk
from perpo_kernels import objectives
from tests.fake_gpu.device import FakeGpu, fake_gpu
from tests.fake_gpu.losses import (
    CHUNK_ROWS,
    LISTS,
    N_CANDIDATES,
    N_HIDDEN,
    N_TOKENS,
    N_VOCAB,
    K,
    LossCase,
    differentiate,
    layouts,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BOTH = (False, True)
WAYS = [
    LossCase(dtype, trainable, bias, softcap, chunks, layout, "cuda:1")
    for dtype, trainable, bias, softcap, chunks, layout in product(
        DTYPES, BOTH, BOTH, (None, 30.0), CHUNK_ROWS, ("cpu", "cuda")
    )
]


def assert_nothing_waits(gpu: FakeGpu) -> None:
    """And no operator takes tensors of two devices. What only fake tensors notice has raised."""
    assert not gpu.blocking
    assert not gpu.mixed
    assert gpu.launches
    for launch in gpu.launches:
        assert len(launch.devices) == 1, launch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trainable", BOTH, ids=["frozen", "trainable"])
@pytest.mark.parametrize("chunks", CHUNK_ROWS)
def test_the_loss_on_hidden_states(gpu: FakeGpu, dtype: torch.dtype, trainable: bool, chunks: str) -> None:
    for case in WAYS:
        if (case.dtype, case.trainable, case.chunks) == (dtype, trainable, chunks):
            case.run()
            assert_nothing_waits(gpu)
            gpu.clear()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("layout", ["cpu", "cuda"])
@pytest.mark.parametrize("trainable", BOTH, ids=["frozen", "trainable"])
def test_every_reduction(gpu: FakeGpu, reduction: str, layout: str, trainable: bool) -> None:
    LossCase(trainable=trainable, layout=layout, reduction=reduction).run()
    assert_nothing_waits(gpu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trainable", BOTH, ids=["frozen", "trainable"])
@pytest.mark.parametrize("chunks", CHUNK_ROWS)
def test_fp32_logits_of_a_16_bit_head(gpu: FakeGpu, dtype: torch.dtype, trainable: bool, chunks: str) -> None:
    LossCase(dtype, trainable, bias=True, chunks=chunks, logits_dtype=torch.float32).run()
    assert_nothing_waits(gpu)


@pytest.mark.parametrize("layout", ["cpu", "cuda"])
def test_without_gradient_and_the_metrics(gpu: FakeGpu, layout: str) -> None:
    case = LossCase(layout=layout, grad=False)
    case.run()
    case.metrics()
    assert_nothing_waits(gpu)
    assert len(gpu.products) == 1


@pytest.mark.parametrize("name", objectives.PRESETS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("layout", [None, "cpu", "cuda:1"], ids=["padded", "cpu", "cuda"])
def test_every_objective(gpu: FakeGpu, name: str, reduction: str, layout: str | None) -> None:
    objective = objectives.PRESETS[name]()
    shape = (LISTS, K) if layout is None else (N_CANDIDATES,)

    def new(*shape: int) -> Tensor:
        return torch.empty(*shape, device="cuda:1")

    options: dict[str, Any] = {}
    if objective.flips:
        options["flip_probs"] = new(*shape)
    if objective.pairs == "given":
        options["pair_weights"] = new(LISTS, K, K)
    if objective.length_normalized or objective.nll_per_token:
        options["lengths"] = new(*shape)
    if layout is not None:
        options["cu_lists"] = layouts(layout)[1]
    log_probs = new(*shape).requires_grad_()
    reference = new(*shape) if objective.reference else None
    valid = torch.empty(*shape, dtype=torch.bool, device="cuda:1")
    loss = pk.perpo_loss(
        log_probs, new(*shape), reference, valid=valid, objective=objective, reduction=reduction, **options
    )
    differentiate(loss, [log_probs])
    assert_nothing_waits(gpu)
    assert gpu.kernels() == {"list_loss_kernel": 1}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", BOTH)
@pytest.mark.parametrize("view", BOTH)
def test_log_probs_from_logits(gpu: FakeGpu, dtype: torch.dtype, inplace: bool, view: bool) -> None:
    leaf = torch.empty(4, 101, 32_001, dtype=dtype, device="cuda:1", requires_grad=True)
    logits = (leaf * 1)[:, :-1] if view else leaf * 1
    labels = torch.empty(logits.shape[:-1], dtype=torch.int64, device="cuda:1")
    gpu.clear()
    differentiate(pk.token_log_probs(logits, labels, inplace_backward=inplace), [leaf])
    assert_nothing_waits(gpu)
    assert gpu.kernels() == {"log_prob_rows_kernel": 1, "grad_rows_kernel": 1}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trainable", BOTH, ids=["frozen", "trainable"])
@pytest.mark.parametrize("rows", [None, 128])
def test_log_probs_from_hidden_states(gpu: FakeGpu, dtype: torch.dtype, trainable: bool, rows: int | None) -> None:
    hidden = torch.empty(2, 200, 256, dtype=dtype, device="cuda:1", requires_grad=True)
    weight = torch.empty(32_000, 256, dtype=dtype, device="cuda:1", requires_grad=trainable)
    bias = torch.empty(32_000, dtype=dtype, device="cuda:1", requires_grad=trainable)
    labels = torch.empty(2, 200, dtype=torch.int64, device="cuda:1")
    budget = None if rows is None else rows * 32_000 * dtype.itemsize
    log_probs = pk.linear_token_log_probs(hidden, weight, labels, bias, max_chunk_bytes=budget)
    differentiate(log_probs, [hidden, weight, bias] if trainable else [hidden])
    assert_nothing_waits(gpu)


# ------------------------------------------------------------------------------- where kernels are launched, and when


def launched(device: str) -> FakeGpu:
    """Every Triton kernel, on this device while another is the current one."""
    with fake_gpu() as gpu:
        for dtype, trainable, chunks in product(DTYPES[1:], BOTH, CHUNK_ROWS):
            LossCase(dtype, trainable, chunks=chunks, device=device).run()
        logits = torch.empty(4, 100, device=device, requires_grad=True)
        labels = torch.empty(4, dtype=torch.int64, device=device)
        differentiate(pk.token_log_probs(logits, labels), [logits])
    assert set(gpu.kernels()) == {
        "clear_rows_kernel",
        "fused_rows_kernel",
        "grad_rows_kernel",
        "list_loss_kernel",
        "log_prob_rows_kernel",
    }
    return gpu


@pytest.mark.parametrize(("device", "current"), [("cuda:0", 1), ("cuda:1", 0), ("cuda:1", 1)])
def test_kernels_are_launched_where_their_tensors_are(device: str, current: int) -> None:
    """Triton launches on the current device, whose memory the pointers of another are not."""
    with torch.cuda.device(current):
        gpu = launched(device)
        assert torch.cuda.current_device() == current
    wrong = {launch.kernel for launch in gpu.launches if {launch.current} != launch.devices}
    assert not wrong


@pytest.mark.parametrize("trainable", BOTH, ids=["frozen", "trainable"])
def test_a_layout_on_the_cpu_is_refused_while_a_graph_is_captured(
    gpu: FakeGpu, trainable: bool, monkeypatch: Any
) -> None:
    """The graph would copy from the address of a tensor that is gone when it is replayed."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)graph"):
        LossCase(trainable=trainable, layout="cpu").run()
    LossCase(trainable=trainable, layout="cuda").run()
    cu_lists = layouts("cpu")[1]
    log_probs = torch.empty(N_CANDIDATES, device="cuda", requires_grad=True)
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)graph"):
        pk.perpo_loss(log_probs, log_probs.detach(), cu_lists=cu_lists)


# ------------------------------------------------------------------------------------------------ how much is launched

PAGE = Path(__file__).parents[2] / "docs" / "frozen_head.md"
HEADER = "| bf16, layout on the CPU | T · V · H products | GEMMs | Triton | PyTorch's own | copies to the GPU |"
TABLE = {
    "no gradient": LossCase(grad=False),
    "frozen head": LossCase(),
    "frozen head, four chunks": LossCase(chunks="lists swept twice"),
    "trainable head": LossCase(trainable=True),
    "trainable head, a list a chunk, two lists": LossCase(trainable=True, chunks="a list a chunk"),
    "trainable head, lists larger than a chunk, two lists": LossCase(trainable=True, chunks="lists swept twice"),
}


def row(name: str, case: LossCase) -> str:
    with fake_gpu() as gpu:
        case.run()
    work = sum(m * k * n for m, k, n in gpu.products) / (N_TOKENS * N_VOCAB * N_HIDDEN)
    counts = (len(gpu.products), len(gpu.launches), gpu.others.total(), len(gpu.copies))
    return f"| {name} | {work:g} | {' | '.join(map(str, counts))} |"


def test_the_table_in_the_docs_counts_launches(write_docs: Any) -> None:
    write_docs(PAGE, HEADER, ["|---|---|---|---|---|---|", *(row(name, case) for name, case in TABLE.items())])
