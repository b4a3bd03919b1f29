"""python -m benchmarks.tune: are the constants of the kernels the best ones for this GPU?

Hypothesis. The defaults (256 threads a row with four 16-byte loads in flight each; more threads for long rows
that are swept twice; list tiles of 64 candidates and 1024 pairs; chunks of 1 GiB) are within 2 % of the best
everywhere.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import perpo_kernels as pk
from benchmarks import rows
from benchmarks.harness import FLOOR, OURS, Case, Race
from benchmarks.problems import Head, Lists, Problem, Setting, problem
from perpo_kernels import backends
from perpo_kernels.backends import ListProblem, LogitMap
from perpo_kernels.backends.eager import rows as eager_rows
from perpo_kernels.objectives import Objective
from perpo_kernels.ops.lists import new_list_result

Knobs = dict[str, int]
ROW_GRID = [dict(zip(("THREADS", "VECTORS"), x, strict=True)) for x in product((128, 256, 512, 1024), (2, 4, 8))]
SWEEP_GRID = [
    dict(zip(("CACHED_ROW_BYTES", "VECTORS"), x, strict=True)) for x in product((64, 128, 256, 512, 1024), (2, 4, 8))
]
LIST_KNOBS = ("MAX_TILE", "PAIR_TILE", "NUM_WARPS")
LIST_GRID = [dict(zip(LIST_KNOBS, x, strict=True)) for x in product((16, 32, 64), (512, 1024, 2048), (4, 8, 16))]


@contextmanager
def overridden(module: ModuleType, knobs: Mapping[str, Any]) -> Iterator[None]:
    """Module constants set for the time of the block."""
    before = {name: getattr(module, name) for name in knobs}
    try:
        for name, value in knobs.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def named(knobs: Knobs) -> str:
    return " ".join(f"{name}={value}" for name, value in knobs.items())


def variants(module: ModuleType, grid: Sequence[Knobs], run: Callable[[], object], **case: Any) -> list[Case]:
    """The default and one case a setting."""

    def with_knobs(knobs: Knobs) -> Callable[[], object]:
        def call() -> object:
            with overridden(module, knobs):
                return run()

        return call

    known = [knobs for knobs in grid if all(hasattr(module, name) for name in knobs)]
    if len(known) < len(grid):
        raise LookupError(f"{module.__name__} has not all of {sorted({n for k in grid for n in k})}: update the grids")
    return [Case(OURS, run, **case)] + [Case(named(k), with_knobs(k), **case) for k in known]


# ----------------------------------------------------------------------------------------------------------- questions


def row_cases(logits: Tensor) -> dict[str, list[Case]]:
    """Cases of each row kernel over `logits` [T, V]."""
    common = importlib.import_module("perpo_kernels.backends.triton.common")
    kernels = backends.load("triton")
    labels = torch.randint(logits.shape[1], logits.shape[:1], device=logits.device)
    z = LogitMap()
    lse = torch.full((2, len(logits)), 6.0, device=logits.device)
    coefficients = torch.randn(len(logits), device=logits.device)
    half = logits[: len(logits) // 2]
    copy = torch.empty_like(half)
    fresh: dict[str, Any] = {"prepare": logits.normal_}

    def floor(times: int) -> Case:
        def run() -> None:
            for _ in range(times):
                copy.copy_(half)

        return Case(FLOOR, run, **fresh)

    def read() -> object:
        return kernels.log_prob_rows(logits, labels, z)

    def fuse() -> object:
        return kernels.fused_rows_(logits, labels, z)

    def write() -> object:
        return kernels.grad_rows_(logits, labels, lse, coefficients, z, logits)

    return {
        "log_prob_rows": [*variants(common, ROW_GRID, read, **fresh), floor(1)],  # one read
        "grad_rows_": [*variants(common, ROW_GRID, write, **fresh), floor(2)],  # one read, one write
        "fused_rows_": [*variants(common, SWEEP_GRID, fuse, **fresh), floor(2)],  # the second read is to hit L2
    }


def list_cases(lists: Lists, device: str) -> list[Case]:
    # the package exports a function of the same name as the module
    module = importlib.import_module("perpo_kernels.backends.triton.list_loss")
    n_lists, k, n_response = lists
    n = n_lists * k
    task = ListProblem(
        -10 * torch.rand(n * n_response, device=device),
        torch.rand(n, device=device),
        torch.arange(n_lists + 1, dtype=torch.int32, device=device) * k,
        Objective(),
        cu_seqlens=torch.arange(n + 1, dtype=torch.int32, device=device) * n_response,
        labels=torch.randint(1000, (n * n_response,), device=device),
        ref_log_probs=-200 * torch.rand(n, device=device),
    )
    result = new_list_result(task)

    def run() -> object:
        return module.list_loss(task, result)

    useful = [knobs for knobs in LIST_GRID if knobs["MAX_TILE"] <= max(16, 2 * k)]
    return variants(module, useful, run, graph=True)


def chunk_cases(p: Problem, sizes: Sequence[int]) -> list[Case]:
    def with_chunk(size: int | None) -> Callable[[], object]:
        def run() -> object:
            out = pk.linear_perpo_loss(
                p.hidden,
                p.weight,
                p.labels,
                p.rewards,
                cu_seqlens=p.cu_seqlens,
                cu_lists=p.cu_lists,
                max_chunk_bytes=size,
            )
            return torch.autograd.grad(out.loss, [x for x in (p.hidden, p.weight) if x.requires_grad])

        return run

    return [Case(OURS, with_chunk(None))] + [Case(f"chunk {size >> 20} MiB", with_chunk(size)) for size in sizes]


Question = tuple[str, str, Callable[[], list[Case]]]  # question, case, how to make its cases


def row_questions(n_rows: int, n_vocab: int, setting: Setting) -> Iterator[Question]:
    def cases_of(kernel: str) -> list[Case]:
        return row_cases(torch.randn(n_rows, n_vocab, device=setting.device, dtype=setting.dtype))[kernel]

    for kernel in ("log_prob_rows", "grad_rows_", "fused_rows_"):
        yield f"tune {kernel}", f"{n_rows} rows of V {n_vocab}", partial(cases_of, kernel)


def list_questions(grid: Sequence[Lists], setting: Setting) -> Iterator[Question]:
    for lists in grid:
        yield "tune list_loss", f"{lists.n_lists} lists of {lists.k}", partial(list_cases, lists, setting.device)


def chunk_questions(head: Head, lists: Lists, sizes: Sequence[int], setting: Setting) -> Iterator[Question]:
    def cases_of(trainable: bool) -> list[Case]:
        return chunk_cases(problem(head, lists, setting, trainable), sizes)

    for name, trainable in (("frozen", False), ("trainable", True)):
        yield "tune chunk bytes", f"{name} {head.name} T{lists.n_tokens}", partial(cases_of, trainable)


def block_question() -> Question:
    """The eager backend's blocks of rows on a CPU."""

    def cases() -> list[Case]:
        logits, labels = torch.randn(400, 32000), torch.randint(32000, (400,))
        grid = [{"_CPU_BLOCK_BYTES": 1 << n} for n in range(18, 25)]
        return variants(
            eager_rows, grid, lambda: eager_rows.fused_rows_(logits, labels, LogitMap()), prepare=logits.normal_
        )

    return "tune block bytes", "fused_rows_ 400 rows of V 32000", cases


def questions(setting: Setting) -> Iterator[Question]:
    """The most telling first: what there is no time for is left out."""
    if setting.size == "tiny":
        yield from row_questions(4, 96, setting)
        yield from list_questions([Lists(1, 3, 4)], setting)
        yield from chunk_questions(Head("tiny", 96, 16), Lists(1, 3, 4), [1 << 10, 1 << 20], setting)
    elif setting.size == "cpu":
        yield block_question()
        sizes = [mebi << 20 for mebi in (32, 72, 100, 200)]
        yield from chunk_questions(Head("laptop", 32000, 1024), Lists(2, 20, 40), sizes, setting)
    else:
        yield from row_questions(4096, 152064, setting)
        yield from list_questions([Lists(64, 20, 40), Lists(64, 256, 40)], setting)
        sizes = [mebi << 20 for mebi in (256, 512, 1024, 2048, 4096)]
        yield from chunk_questions(Head("qwen2.5-vl-7b", 152064, 3584), Lists(5, 20, 80), sizes, setting)
        for n_vocab in (32000, 262208, 151655):
            yield from row_questions(4096, n_vocab, setting)


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
    rounds = args.rounds or (1 if args.tiny else 7)
    begin = time.perf_counter()
    for question, case, make in questions(setting):
        if time.perf_counter() - begin > args.seconds:
            print(f"{question}, {case}: left out, time is up")
            continue
        race = Race(make(), setting.device, memory=False, clock=clock)
        try:
            race.warm_up()
            for _ in range(rounds):
                race.round()
        finally:
            found = race.rows(question, case, {}, str(setting.dtype).removeprefix("torch."))
            if args.rows:
                rows.append(args.rows, found)
        timed = [r for r in found if r["ok"] and r["peer"] != FLOOR]
        best = min(timed, key=lambda r: r["ratio_to_ours"])
        default = next(r for r in timed if r["peer"] == OURS)
        floor = default["ratio_to_floor"]
        over_floor = f" ({floor:.2f} × floor)" if floor else ""
        ms = default["time_ms"]["median"]
        print(f"{question}, {case}: default {ms:.4g} ms{over_floor}, best {best['peer']} × {best['ratio_to_ours']:.3f}")
        for row in found:
            if not row["ok"]:
                print(f"    {row['peer']}: {row['reason']}")
        if setting.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
