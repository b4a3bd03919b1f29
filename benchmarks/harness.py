"""How things are timed and how their memory is counted.

Time. Cases are run in turn, A B C A B C …, so that a machine whose speed drifts (other users, heat) drifts for
all of them; what is reported is the median over rounds, and ratios are taken between the runs of one round. On a
GPU a sample is the time between two device events, after a write that empties the caches; on the CPU it is wall
time, or, for a machine that others use at the same time, the processor time of one thread
(`clock=time.process_time`). A case that is short is repeated within its sample. With `graph=True` a case is
captured in a CUDA graph and its replays are timed: that is the cost of its kernels without the host's.

Memory. On a GPU, `torch.cuda.max_memory_allocated` above what was allocated before. On the CPU, PyTorch's
profiler reports every allocation and release of the allocator with its size; the peak of their running sum is
exact to the byte and the same on every run. (The resident size that the system reports would add pages that the C
library keeps for later and the GEMM library's scratch, and changes from run to run.)
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.rows import Row, machine

OURS = "perpo_kernels"
FLOOR = "floor"
FLUSH_BYTES = 512 << 20  # more than the L2 of any GPU
SHORTEST_SAMPLE_S = {"cpu": 5e-3, "cuda": 5e-4}


@dataclass
class Case:
    """One thing to time. `run` does all of its work and returns what a user would keep."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] | None = None  # fresh inputs before each sample, not timed; then a sample is one run
    graph: bool = False
    slowest_s: float = 20.0  # a case slower than this is sampled once
    compiles: bool = True  # the first run may take longer than others; False: a slow case is run once
    extra: dict[str, Any] = field(default_factory=dict)
    # filled in by Race
    samples: list[float] = field(default_factory=list)  # seconds
    repeats: int = 1
    peak_extra_bytes: int | None = None
    problem: str | None = None
    one_sample: bool = False


def peak_extra_bytes(run: Callable[[], object], device: str) -> int:
    """The most memory that `run` holds at any time beyond what was there before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=False) as profile:
        run()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def kernel_launches(run: Callable[[], object]) -> int:
    """GPU kernels (and copies and fills) that one run starts."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=False) as profile:
        run()
        torch.cuda.synchronize()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    on_device = torch.autograd.DeviceType.CUDA
    return sum(e.device_type() == on_device for e in profile.profiler.kineto_results.events())


class Race:
    """Cases timed in turn. Call `warm_up`, then `round` as often as wanted, then `rows`."""

    def __init__(
        self, cases: Sequence[Case], device: str, memory: bool = True, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.cases, self.device, self.memory, self.clock = list(cases), device, memory, clock
        self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device) if device == "cuda" else None
        self._turn = 0

    def warm_up(self) -> None:
        """Compile, find the number of repeats, count memory. A case that fails here is out, with its reason."""
        for case in self.cases:
            if case.problem is None:
                self._guarded(case, partial(self._start, case))

    def _start(self, case: Case) -> None:
        for _ in range(2):  # the first call compiles
            elapsed = self._once(case)
            if elapsed > case.slowest_s and not case.compiles:
                break
        if self.memory:
            if case.prepare:
                case.prepare()
            case.peak_extra_bytes = peak_extra_bytes(case.run, self.device)
        if elapsed > case.slowest_s:
            case.samples.append(elapsed)
            case.one_sample = True
            return
        if case.graph and self.device == "cuda":
            case.run = self._capture(case.run)
        if case.prepare is None:
            case.repeats = max(1, min(1000, round(SHORTEST_SAMPLE_S[self.device] / max(elapsed, 1e-6))))

    def _once(self, case: Case) -> float:
        if case.prepare:
            case.prepare()
        self._synchronize()
        start = self.clock()
        case.run()
        self._synchronize()
        return self.clock() - start

    def inspect(self) -> None:
        """Run every case once, untimed; what it returns, a dict, is written into its row."""
        for case in self.cases:
            if case.problem is None:
                self._guarded(case, lambda case=case: case.extra.update(case.run()))  # type: ignore[misc]

    def count_memory(self) -> None:
        """Every case twice, untimed: once to warm up, once with its memory counted."""
        for case in self.cases:
            if case.problem is None:
                self._guarded(case, partial(self._count_memory, case))

    def _count_memory(self, case: Case) -> None:
        case.run()
        case.peak_extra_bytes = peak_extra_bytes(case.run, self.device)

    def _capture(self, run: Callable[[], object]) -> Callable[[], object]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = run()

        def replay(kept: object = kept) -> None:
            graph.replay()

        return replay

    def sample(self, case: Case) -> None:
        """One sample of one case."""
        if case.problem is None and not case.one_sample:
            self._guarded(case, lambda: case.samples.append(self._time(case)))

    def round(self) -> None:
        """One sample of each case, starting with another one each time: what runs after what is not always the same."""
        self._turn += 1
        for i in range(len(self.cases)):
            self.sample(self.cases[(i + self._turn) % len(self.cases)])

    def _time(self, case: Case) -> float:
        if case.prepare:
            case.prepare()
        if self._flush is not None:
            self._flush.random_()
        self._synchronize()
        if self.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(case.repeats):
                case.run()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1e3 / case.repeats
        begin = self.clock()
        for _ in range(case.repeats):
            case.run()
        return (self.clock() - begin) / case.repeats

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _guarded(self, case: Case, do: Callable[[], object]) -> None:
        """A peer may fail in any way it likes; ours and the floor may not."""
        try:
            do()
        except Exception as error:
            if case.name in (FLOOR, OURS) and not isinstance(error, torch.OutOfMemoryError):
                raise
            first_line = (str(error).strip().splitlines() or [""])[0][:200]
            memory = isinstance(error, torch.OutOfMemoryError)
            case.problem = "out of memory" if memory else f"{type(error).__name__}: {first_line}"
        finally:
            if case.problem and self.device == "cuda":
                gc.collect()
                torch.cuda.empty_cache()

    def ratio(self, case: Case, base: str) -> float | None:
        """Median over rounds of this case's time over that of `base` in the same round."""
        other = next((c for c in self.cases if c.name == base), None)
        if other is None or not other.samples or not case.samples:
            return None
        if len(case.samples) != len(other.samples):
            return statistics.median(case.samples) / statistics.median(other.samples)
        return statistics.median(a / b for a, b in zip(case.samples, other.samples, strict=True))

    @staticmethod
    def _throughput(case: Case) -> Row:
        """Tokens of answers that are trained on or generated in a second, where a case says how many it has."""
        if "answer_tokens" not in case.extra or not case.samples or case.problem is not None:
            return {}
        return {"answer_tokens_per_s": round(case.extra["answer_tokens"] / statistics.median(case.samples))}

    def rows(self, question: str, case: str, shapes: Row, dtype: str) -> list[Row]:
        """A row for each case, in the order they were given."""
        here = machine(self.device)
        clock = "wall" if self.clock is time.perf_counter else "processor time"
        if self.device == "cuda":
            clock = "device events"
        return [
            {
                "question": question,
                "case": case,
                "peer": c.name,
                "time_ms": summary(c.samples) if c.samples and c.problem is None else None,
                "ratio_to_floor": self.ratio(c, FLOOR) if c.problem is None else None,
                "ratio_to_ours": self.ratio(c, OURS) if c.problem is None else None,
                "peak_extra_bytes": c.peak_extra_bytes,
                "shapes": shapes,
                "dtype": dtype,
                "clock": clock,
                **here,
                "ok": c.problem is None,
                "reason": c.problem,
                "extra": c.extra | self._throughput(c),
            }
            for c in self.cases
        ]


def summary(seconds: Sequence[float]) -> Row:
    """Median and spread in milliseconds."""
    ms = sorted(1e3 * s for s in seconds)
    quartiles = statistics.quantiles(ms, n=4) if len(ms) > 1 else [ms[0]] * 3
    return {
        "median": statistics.median(ms),
        "min": ms[0],
        "max": ms[-1],
        "quartiles": [quartiles[0], quartiles[2]],
        "n": len(ms),
    }
