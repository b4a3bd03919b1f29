"""How things are timed and how their memory is counted.

Time. Every case runs before it is timed. Then cases are run in turn, A B C, B C A, …, so that a machine whose speed
drifts (other users, heat) drifts for all of them and none always follows the same one; what is reported is the median
over rounds, and ratios are taken between the runs of one round. On the CPU a sample is wall time, or, for a machine
that others use at the same time, the processor time of one thread (`clock=time.process_time`). A case that is short is
repeated within its sample; one that takes more than 20 s is sampled twice.

On a GPU a sample is the time between two device events, after a write that empties the caches. The host queues both
events and all that is between them while the device is held in a wait, so that only what the device does is measured,
unless a case itself makes the host wait. What a caller waits for from an idle device, launches included, is measured
apart, without that wait: `extra.with_host_ms`, for cases of a few milliseconds at most, where it may be what counts.
With `graph=True` a case is captured in a CUDA graph and its replays are timed. Whole models are timed by the host's
clock from an idle device to an idle device (`by_host`): no queue holds all their launches.

Memory. On a GPU, `torch.cuda.max_memory_allocated` above what was allocated before. On the CPU, PyTorch's
profiler reports every allocation and release of the allocator with its size; the peak of their running sum is
exact to the byte and the same on every run. (The resident size that the system reports would add pages that the C
library keeps for later and the GEMM library's scratch, and changes from run to run.)
"""

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.rows import Row, machine

OURS = "perpo_kernels"
FLOOR = "floor"
BARE = "bare GEMMs"
OWN = (OURS, FLOOR, BARE)  # names of cases that may not fail start with one of these
NO_MEMORY = "out of memory"
FLUSH_BYTES = 512 << 20  # more than the L2 of any GPU
SHORTEST_SAMPLE_S = {"cpu": 5e-3, "cuda": 1e-3}
MOST_QUEUED_S = 4e-3  # of the host's time: some 800 launches, what a device's queue holds
LONGEST_WAIT_S = 20e-3
LONG_S = 1.0  # a run this long needs no second one to be warm
TWICE_S = 20.0
WITH_HOST_BELOW_S = 5e-3


class DeviceLost(RuntimeError):
    """After an illegal access every further call fails, in this process."""


@dataclass
class Case:
    """One thing to time. `run` does all of its work and returns what a user would keep."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] | None = None  # fresh inputs before each sample, not timed; then a sample is one run
    release: Callable[[], object] | None = None  # after each sample: what `prepare` made
    graph: bool = False
    risky: bool = False  # may take the device down with it: run after all others
    extra: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None  # why it isn't run
    # filled in by Race
    samples: list[float] = field(default_factory=list)  # seconds
    with_host: list[float] = field(default_factory=list)  # seconds
    repeats: int = 1
    wait_s: float = LONGEST_WAIT_S
    peak_extra_bytes: int | None = None

    def again(self) -> "Case":
        """The same, not yet measured."""
        return Case(self.name, self.run, self.prepare, self.release, self.graph, self.risky)


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


@functools.cache
def cycles_per_second() -> float:
    """Of the wait on the device, by its own clock."""
    cycles = 20_000_000
    for _ in range(2):  # the first wakes the device
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        torch.cuda.synchronize()
    return cycles / (start.elapsed_time(end) / 1e3)


def flush_buffer() -> torch.Tensor:
    """Written to before a sample, it takes the place of all else in the caches."""
    return torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")


class Race:
    """Cases timed in turn. Call `warm_up`, then `round` as often as wanted, then `rows`."""

    def __init__(
        self,
        cases: Sequence[Case],
        device: str,
        memory: bool = True,
        clock: Callable[[], float] = time.perf_counter,
        by_host: bool = False,
    ) -> None:
        self.cases, self.device, self.memory, self.clock = list(cases), device, memory, clock
        self.by_events = device == "cuda" and not by_host
        self._flush = flush_buffer() if device == "cuda" else None
        self._turn = 0

    def warm_up(self) -> None:
        """Compile, count memory, find the number of repeats. A case that fails here is out, with its reason."""
        for case in self.cases:
            self._guarded(case, partial(self._start, case))

    def _start(self, case: Case) -> None:
        elapsed = self._once(case)  # compiles
        if self.memory:
            elapsed = self._once(case, partial(self._count, case))
        if elapsed < LONG_S:
            elapsed = self._once(case)
        if case.graph and self.device == "cuda":
            case.run = self._capture(case.run)
        if self.by_events:
            self._fit_to_device(case)
        elif case.prepare is None:
            case.repeats = max(1, min(1000, round(SHORTEST_SAMPLE_S["cpu"] / max(elapsed, 1e-6))))

    @contextmanager
    def _fresh(self, case: Case) -> Iterator[None]:
        if case.prepare:
            case.prepare()
        if self._flush is not None:
            self._flush.random_()
        self._synchronize()
        try:
            yield
        finally:
            if case.release:
                case.release()

    def _once(self, case: Case, run: Callable[[], object] | None = None) -> float:
        with self._fresh(case):
            start = self.clock()
            (run or case.run)()
            self._synchronize()
            return self.clock() - start

    def _count(self, case: Case) -> None:
        case.peak_extra_bytes = peak_extra_bytes(case.run, self.device)

    def inspect(self) -> None:
        """Run every case once, untimed; what it returns, a dict, is written into its row."""
        for case in self.cases:
            # For the type checker: lambda with a default.
            self._guarded(case, lambda case=case: case.extra.update(case.run()))  # type: ignore[misc]

    def count_memory(self) -> None:
        """Every case with its memory counted, untimed; on a GPU, where the first run compiles, the second one's."""
        for case in self.cases:
            if self.device == "cuda":
                self._guarded(case, case.run)
            self._guarded(case, partial(self._count, case))

    def _capture(self, run: Callable[[], object]) -> Callable[[], object]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
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
        if not (len(case.samples) > 1 and case.samples[0] > TWICE_S):
            self._guarded(case, lambda: case.samples.append(self._time(case)))

    def round(self) -> None:
        """One sample of each case, starting with another one each time: what runs after what is not always the same."""
        self._turn += 1
        for i in range(len(self.cases)):
            self.sample(self.cases[(i + self._turn) % len(self.cases)])

    def _time(self, case: Case) -> float:
        if self.by_events:
            seconds, _ = self._on_device(case)
            if seconds < WITH_HOST_BELOW_S:
                case.with_host.append(self._by_clock(case))
            return seconds
        return self._by_clock(case)

    def _by_clock(self, case: Case) -> float:
        with self._fresh(case):
            begin = self.clock()
            for _ in range(case.repeats):
                case.run()
            self._synchronize()
            return (self.clock() - begin) / case.repeats

    def _on_device(self, case: Case) -> tuple[float, float]:
        """Seconds of a run between two events, and those that the host takes to queue it."""
        with self._fresh(case):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(round(case.wait_s * cycles_per_second()))
            start.record()
            begin = time.perf_counter()
            for _ in range(case.repeats):
                case.run()
            queued = time.perf_counter() - begin
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1e3 / case.repeats, queued / case.repeats

    def _fit_to_device(self, case: Case) -> None:
        """How many runs make a sample, and for how long the device waits while the host queues them."""
        self._on_device(case)  # a graph's first replay uploads it
        seconds, queued = self._on_device(case)
        if case.prepare is None:
            wanted, most = SHORTEST_SAMPLE_S["cuda"] / max(seconds, 1e-6), MOST_QUEUED_S / max(queued, 1e-6)
            case.repeats = max(1, round(min(wanted, most, 1000)))
        case.wait_s = min(LONGEST_WAIT_S, 2e-4 + 2 * queued * case.repeats)

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _guarded(self, case: Case, do: Callable[[], object]) -> None:
        """A peer may fail in any way it likes; ours and the floor may only be too large for the memory."""
        if case.problem is not None:
            return
        try:
            do()
        except Exception as error:
            first_line = (str(error).strip().splitlines() or [""])[0][:200]
            memory = isinstance(error, torch.OutOfMemoryError)
            case.problem = NO_MEMORY if memory else f"{type(error).__name__}: {first_line}"
            if case.name.startswith(OWN) and not memory:
                raise
            self._still_there(case)
        finally:
            if case.problem == NO_MEMORY:
                gc.collect()
                torch.cuda.empty_cache()

    def _still_there(self, case: Case) -> None:
        try:
            self._synchronize()
        except Exception as error:
            case.extra["device_lost"] = True
            raise DeviceLost(f"the device is lost after {case.name}: {case.problem}") from error

    def ratio(self, case: Case, base: str) -> float | None:
        """Median over rounds of this case's time over that of `base` in the same round."""
        other = next((c for c in self.cases if c.name == base), None)
        if other is None or not other.samples or not case.samples:
            return None
        # a case that is sampled less often than others is sampled in the first rounds
        return statistics.median(a / b for a, b in zip(case.samples, other.samples, strict=False))

    @staticmethod
    def _derived(case: Case) -> Row:
        """Answer tokens trained on or generated per second, where a case says how many it has; the time with the
        host's."""
        if not case.samples or case.problem is not None:
            return {}
        derived: Row = {}
        if "answer_tokens" in case.extra:
            derived["answer_tokens_per_s"] = round(case.extra["answer_tokens"] / statistics.median(case.samples))
        if case.with_host:
            derived["with_host_ms"] = float(f"{1e3 * statistics.median(case.with_host):.4g}")
        return derived

    def rows(
        self, question: str, case: str, shapes: Row, dtype: str, of: Callable[[Case], bool] = lambda c: True
    ) -> list[Row]:
        """A row for each case, in the order they were given."""
        here = machine(self.device)
        clock = "wall" if self.clock is time.perf_counter else "processor time"
        if self.by_events:
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
                "extra": c.extra | self._derived(c),
            }
            for c in self.cases
            if of(c)
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
