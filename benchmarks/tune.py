"""python -m benchmarks.tune: are the constants of the kernels the best ones for this GPU?

Hypothesis. The defaults (256 threads per row with two 16-byte loads in flight each, 512 for long rows that are summed
up; 80 % of L2 for rows that are swept twice, with hints to keep them; list tiles of 64 candidates and 1024 pairs;
chunks of 1 GiB) are within 2 % of the best everywhere.

How. Each kernel is timed over a grid of its module constants, all settings in turn, the default among them; the
constants are put back afterwards. `× ours` of a row is its time over the default's in the same round: below 1 is
better than the default.

Shapes. Rows: 4096 of V = 32000, 152064 and 262208 in bf16, and the edge case of a V that is not divisible by 8.
Lists: 64 of 20 and of 256 candidates of 40 tokens. Chunks: Qwen2.5-VL's head, T 8000. On a CPU (where it is the
eager backend that counts): chunk and block bytes at V = 32000. `--tiny` runs the same code once over little, with
Triton's interpreter where there is no GPU.
"""

import argparse
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

import perpo_kernels as pk
from benchmarks import rows
from benchmarks.harness import FLOOR, OURS, Case, Race
from benchmarks.problems import HeadShape, ListShape, Setting, problem
from perpo_kernels import backends
from perpo_kernels.backends.eager import rows as eager_rows
from perpo_kernels.ops.lists import new_list_result
from perpo_kernels.problem import ListProblem, LogitMap

Knobs = dict[str, Any]
Question = tuple[str, str, Callable[[], list[Case]]]  # question, case, how to make its cases


def grid_of(**values: Sequence[int | str | None]) -> list[Knobs]:
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


ROW_GRID = [*grid_of(THREADS=(128, 256, 512), VECTORS=(1, 2, 4)), {"DROP": ""}]
# log_prob_rows and fused_rows_ sum a row up in one order: what is best for one is set for both
SUM_GRID = [
    *grid_of(MAX_THREADS=(512, 1024), VECTORS=(1, 2, 4)),
    *grid_of(VECTORS=(2, 4), REGISTERS=(None,)),
    *grid_of(ROW_BYTES=(128, 512)),
    {"DROP": ""},
]
SWEEP_GRID = [
    *SUM_GRID,
    *grid_of(L2_PERCENT=(0, 40, 60, 100)),  # 0: as many rows at once as run
    *grid_of(KEEP=("", "evict_last"), DROP=("", "evict_first"), L2_PERCENT=(0, 80)),
]
LIST_GRID = grid_of(MAX_TILE=(16, 32, 64), PAIR_TILE=(512, 1024, 2048), NUM_WARPS=(4, 8, 16))
BLOCK_GRID = grid_of(_CPU_BLOCK_BYTES=[1 << n for n in range(18, 25)])


def variants(module: ModuleType, grid: Sequence[Knobs], run: Callable[[], object], **case: Any) -> list[Case]:
    """The default, and a case for each setting of the module's constants.

    Raises:
        AttributeError: the module has no constant of that name: update the grids.
    """

    def call(knobs: Knobs) -> object:
        with mock.patch.multiple(module, **knobs):
            return run()

    for name in {name for knobs in grid for name in knobs}:
        getattr(module, name)
    named = ((" ".join(f"{name}={value}" for name, value in knobs.items()), knobs) for knobs in grid)
    return [Case(OURS, run, **case), *(Case(name, partial(call, knobs), **case) for name, knobs in named)]


# ----------------------------------------------------------------------------------------------------------- questions


def row_cases(kernel: str, n_rows: int, n_vocab: int, setting: Setting) -> list[Case]:
    common = importlib.import_module("perpo_kernels.backends.triton.common")
    kernels, z = backends.load("triton"), LogitMap()
    logits = torch.randn(n_rows, n_vocab, device=setting.device, dtype=setting.dtype)
    labels = torch.randint(n_vocab, (n_rows,), device=setting.device)
    lse = torch.full((2, n_rows), 6.0, device=setting.device)
    coefficients = torch.randn(n_rows, device=setting.device)
    half = logits[: n_rows // 2]
    copy = torch.empty_like(half)
    # how to run it, over what, and in how many copies of half of the rows its bytes go by (a second read hits L2)
    run, grid, n_copies = {
        "log_prob_rows": (lambda: kernels.log_prob_rows(logits, labels, z), SUM_GRID, 1),
        "grad_rows_": (lambda: kernels.grad_rows_(logits, labels, lse, coefficients, z, logits), ROW_GRID, 2),
        "fused_rows_": (lambda: kernels.fused_rows_(logits, labels, z), SWEEP_GRID, 2),
    }[kernel]

    def floor() -> None:
        for _ in range(n_copies):
            copy.copy_(half)

    fresh: dict[str, Any] = {"prepare": logits.normal_}
    return [*variants(common, grid, run, **fresh), Case(FLOOR, floor, **fresh)]


def list_cases(lists: ListShape, device: str) -> list[Case]:
    # the package exports a function of the same name as the module
    module = importlib.import_module("perpo_kernels.backends.triton.list_loss")
    n_lists, k, n_response = lists
    n = n_lists * k
    log_probs = -10 * torch.rand(n * n_response, device=device)
    task = ListProblem(
        torch.rand(n, device=device),
        torch.arange(n_lists + 1, dtype=torch.int32, device=device) * k,
        cu_seqlens=torch.arange(n + 1, dtype=torch.int32, device=device) * n_response,
        labels=torch.randint(1000, (n * n_response,), device=device),
        ref_log_probs=-200 * torch.rand(n, device=device),
    )
    result = new_list_result(log_probs, task)
    useful = [knobs for knobs in LIST_GRID if knobs["MAX_TILE"] <= max(16, 2 * k)]
    return variants(module, useful, lambda: module.list_loss(log_probs, task, result), graph=True)


def chunk_cases(
    head: HeadShape, lists: ListShape, sizes: Sequence[int], setting: Setting, trainable: bool
) -> list[Case]:
    p = problem(head, lists, setting, trainable)
    wanted = [x for x in (p.hidden, p.weight) if x.requires_grad]
    layout: dict[str, Any] = {"cu_seqlens": p.cu_seqlens, "cu_lists": p.cu_lists}

    def run(size: int | None) -> object:
        out = pk.linear_perpo_loss(p.hidden, p.weight, p.labels, p.rewards, **layout, max_chunk_bytes=size)
        return torch.autograd.grad(out.loss, wanted)

    chunks = [Case(f"chunk {size >> 20} MiB", partial(run, size)) for size in sizes]
    return [Case(OURS, partial(run, None)), *chunks]


def block_cases() -> list[Case]:
    """The eager backend's blocks of rows on a CPU."""
    logits, labels = torch.randn(400, 32000), torch.randint(32000, (400,))
    run = partial(eager_rows.fused_rows_, logits, labels, LogitMap())
    return variants(eager_rows, BLOCK_GRID, run, prepare=logits.normal_)


def questions(setting: Setting) -> Iterator[Question]:
    """The most telling first: questions that time does not suffice for are left out."""

    def of_rows(n_rows: int, n_vocab: int) -> Iterator[Question]:
        for kernel in ("log_prob_rows", "grad_rows_", "fused_rows_"):
            make = partial(row_cases, kernel, n_rows, n_vocab, setting)
            yield f"tune {kernel}", f"{n_rows} rows of V {n_vocab}", make

    def of_lists(*grid: ListShape) -> Iterator[Question]:
        for lists in grid:
            yield "tune list_loss", f"{lists.n_lists} lists of {lists.k}", partial(list_cases, lists, setting.device)

    def of_chunks(head: HeadShape, lists: ListShape, sizes: Sequence[int]) -> Iterator[Question]:
        for name, trainable in (("frozen", False), ("trainable", True)):
            make = partial(chunk_cases, head, lists, sizes, setting, trainable)
            yield "tune chunk bytes", f"{name} {head.name} T{lists.n_tokens}", make

    if setting.size == "tiny":
        yield from of_rows(4, 96)
        yield from of_lists(ListShape(1, 3, 4))
        yield from of_chunks(HeadShape("tiny", 96, 16), ListShape(1, 3, 4), [1 << 10, 1 << 20])
    elif setting.size == "cpu":
        yield "tune block bytes", "fused_rows_ 400 rows of V 32000", block_cases
        sizes = [mebi << 20 for mebi in (32, 72, 100, 200)]
        yield from of_chunks(HeadShape("laptop", 32000, 1024), ListShape(2, 20, 40), sizes)
    else:
        yield from of_rows(4096, 152064)
        yield from of_lists(ListShape(64, 20, 40), ListShape(64, 256, 40))
        sizes = [mebi << 20 for mebi in (256, 512, 1024, 2048, 4096)]
        yield from of_chunks(HeadShape("qwen2.5-vl-7b", 152064, 3584), ListShape(5, 20, 80), sizes)
        for n_vocab in (32000, 262208, 151655):
            yield from of_rows(4096, n_vocab)


def main() -> None:
    parser = argparse.ArgumentParser(description="time the kernels over their constants")
    parser.add_argument("--rows", type=Path, default=None, help="JSON file to add the rows to")
    parser.add_argument("--tiny", action="store_true", help="once over little")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=170.0, help="start no further question after this long")
    parser.add_argument("--one-thread", action="store_true", help="CPU: time one thread by its processor time")
    args = parser.parse_args()
    setting = Setting.of("tiny" if args.tiny else "auto")
    torch.manual_seed(0)
    if args.one_thread:
        torch.set_num_threads(1)
    clock = time.process_time if args.one_thread else time.perf_counter
    begin = time.perf_counter()
    for question, case, make in questions(setting):
        if time.perf_counter() - begin > args.seconds:
            print(f"{question}, {case}: left out, time is up")
            continue
        race = Race(make(), setting.device, memory=False, clock=clock)
        try:
            race.warm_up()
            for _ in range(args.rounds or (1 if args.tiny else 7)):
                race.round()
        finally:
            found = race.rows(question, case, {}, str(setting.dtype).removeprefix("torch."))
            if args.rows:
                rows.append(args.rows, found)
        default = next(row for row in found if row["peer"] == OURS)
        best = min((r for r in found if r["ok"] and r["peer"] != FLOOR), key=lambda r: r["ratio_to_ours"])
        over_floor = f" ({default['ratio_to_floor']:.2f} × floor)" if default["ratio_to_floor"] else ""
        ms = default["time_ms"]["median"]
        print(f"{question}, {case}: default {ms:.4g} ms{over_floor}, best {best['peer']} × {best['ratio_to_ours']:.3f}")
        for row in found:
            if not row["ok"]:
                print(f"    {row['peer']}: {row['reason']}")
        if setting.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
