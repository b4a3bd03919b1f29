"""Options and the fixtures that the questions share.

pytest benchmarks --benchmark-only                         laptop sizes on the CPU, full sizes where a GPU is found
pytest benchmarks --benchmark-only --full                  on the CPU the larger shapes instead, see below
pytest benchmarks --benchmark-only --size tiny             once through everything, a smoke test
pytest benchmarks --benchmark-only --rows results.json     where the rows go that benchmarks.report reads; otherwise
                                                           benchmarks/results/<date>-<machine>.json, none if tiny
pytest benchmarks --benchmark-only --one-thread            on a shared CPU: one thread, its processor time
pytest benchmarks --benchmark-only --resume 2026-11-24T06:19Z     leave out what the file has since then: gpu.sh uses
                                                           it after a device was lost

What was measured is printed at the end, one table per case. pytest-benchmark only collects: with its fixture, a test
runs under `--benchmark-only` and is skipped elsewhere. It does not time, and its table is off, since it times one
function at a time, by the host's clock. Here peers take turns (`benchmarks.harness`), so that a machine that drifts
drifts for all of them, ratios are taken within a round, inputs are made anew outside of the time, and a GPU is timed by
its own events.

Minutes on two quiet CPU cores, by the processor time of one thread over 1.8:

             default                                    --full
step           1   P576 R24 k20, P300 R250 k8             5   P576 R24 k20, P1500 R40 k20, P600 R500 k8, P2900 R24 k20
shared_prefix  ½   the same                               4   the same
generation     1   the same                               4   the same
linear_loss    3   T 800, H 512, V 32000                 25   T 1600 and 3200, H 1024, V 32000
memory         3   T to 1200, V to 131072, H 1024        10   T to 3200
others         2   T 800, V 32000                         3   T 1600 and 3200
all           10                                         50
"""

import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report, rows
from benchmarks.harness import FLOOR, OURS, Case, DeviceLost, Race
from benchmarks.problems import Setting
from benchmarks.rows import Row

ROUNDS = {"tiny": 2, "cpu": 5, "gpu": 9}
LONG_ROUNDS = {"tiny": 1, "cpu": 3, "gpu": 5}  # of questions whose runs take seconds
MEASURED = pytest.StashKey[list[Row]]()
LOST = 17  # exit status; benchmarks/gpu.sh starts again where this one ended


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("perpo benchmarks")
    group.addoption("--size", choices=["auto", *ROUNDS], default="auto", help="auto: gpu where one is found, else cpu")
    group.addoption("--tiny", action="store_const", dest="size", const="tiny", help="the same as --size tiny")
    group.addoption("--full", action="store_true", help="on the CPU: the larger shapes")
    group.addoption("--rows", type=Path, default=None, help="JSON file to add the rows to")
    group.addoption(
        "--one-thread", action="store_true", help="CPU: time one thread by its processor time, not the wall's"
    )
    group.addoption("--rounds", type=int, default=None, help="samples of each case")
    group.addoption("--resume", default=None, help="leave out what the file of rows has since this date")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = []
    config.option.benchmark_quiet = True


def pytest_collection_finish() -> None:
    """Garbage is collected before memory is counted: half a second each time, if all that was imported is looked at."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # Triton's types would be reported as leaked


def setting_of(config: pytest.Config) -> Setting:
    return Setting.of(config.getoption("--size"), config.getoption("--full"))


def rows_file(config: pytest.Config) -> Path | None:
    setting = setting_of(config)
    given = config.getoption("--rows")
    return given or (None if setting.size == "tiny" else rows.default_path(setting.device))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    measured = config.stash[MEASURED]
    for line in report.terminal(measured):
        terminalreporter.write_line(line)
    path = rows_file(config)
    if measured and path is not None:
        terminalreporter.write_line(f"rows: {path}; python -m benchmarks.report {path} makes tables and plots of them")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`head`, `lists`, `prefix` and `point` take the shapes of the chosen size."""
    setting = setting_of(metafunc.config)
    if "head" in metafunc.fixturenames:
        metafunc.parametrize("head", setting.heads, ids=lambda head: head.name)
    if "lists" in metafunc.fixturenames:
        metafunc.parametrize("lists", setting.lists, ids=lambda lists: f"T{lists.n_tokens}")
    if "prefix" in metafunc.fixturenames:
        metafunc.parametrize("prefix", setting.prefixes, ids=lambda prefix: str(prefix).replace(" ", "-"))
    if "point" in metafunc.fixturenames:
        ids = [f"{p.curve}-T{p.lists.n_tokens}-{p.head.name}" for p in setting.points]
        metafunc.parametrize("point", setting.points, ids=ids)


@pytest.fixture
def setting(request: pytest.FixtureRequest) -> Setting:
    torch.manual_seed(0)
    return setting_of(request.config)


Compare = Callable[..., None]


class Sheet:
    """Where the rows of one case go as soon as they are known, and what earlier runs wrote there."""

    def __init__(self, config: pytest.Config, question: str, case: str, shapes: Row, dtype: torch.dtype) -> None:
        self.about = (question, case, shapes, str(dtype).removeprefix("torch."))
        self.path, self.measured = rows_file(config), config.stash[MEASURED]
        since = config.getoption("--resume")
        before = [r for r in rows.read(self.path) if r["date"] >= since] if self.path and since else []
        if any((r["question"], r["case"], r["dtype"]) == (question, case, self.about[-1]) for r in before):
            pytest.skip("in the file already")
        self.fatal = {row["peer"] for row in before if row["extra"].get("device_lost")}

    def rule_out(self, cases: Sequence[Case]) -> None:
        for case in cases:
            if case.name in self.fatal and case.problem is None:
                case.problem = "not run: the device was lost with it at another shape"

    def write(self, race: Race, of: Callable[[Case], bool] = lambda case: True) -> None:
        found = race.rows(*self.about, of)
        self.measured.extend(found)
        if self.path is not None:
            rows.append(self.path, found)


def races_of(
    cases: Sequence[Case], device: str, race: Callable[[Sequence[Case]], Race]
) -> list[tuple[Race, Callable[[Case], bool]]]:
    """(race, which of its cases it is held for): one for all; on a GPU without the risky ones, then one for each of
    these, with ours and the floor again."""
    risky = [case for case in cases if device == "cuda" and case.risky and case.problem is None]
    safe = [case for case in cases if case not in risky]
    bases = [case for case in safe if case.name in (OURS, FLOOR)]
    held: list[tuple[Race, Callable[[Case], bool]]] = [(race(safe), lambda case: True)]
    for case in risky:
        # For the type checker: lambda with a default.
        held.append((race([*(base.again() for base in bases), case]), lambda c, case=case: c is case))  # type: ignore[misc]
    return held


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any, setting: Setting) -> Compare:
    """compare(question, case, cases, shapes): time the cases in turn and write their rows."""
    config = request.config
    one_thread = setting.device == "cpu" and config.getoption("--one-thread")
    if one_thread:
        torch.set_num_threads(1)

    def run(
        question: str, case: str, cases: Sequence[Case], shapes: Row, long: bool = False, by_host: bool = False
    ) -> None:
        sheet = Sheet(config, question, case, shapes, setting.dtype)
        sheet.rule_out(cases)
        rounds = config.getoption("--rounds") or (LONG_ROUNDS if long else ROUNDS)[setting.size]
        clock = time.process_time if one_thread else time.perf_counter

        def measure() -> None:
            for race, of in races_of(
                cases, setting.device, partial(Race, device=setting.device, clock=clock, by_host=by_host)
            ):
                try:
                    race.warm_up()
                    for _ in range(rounds):
                        race.round()
                finally:
                    sheet.write(race, of)

        finish(benchmark, measure, setting)

    return run


@pytest.fixture
def inspect(request: pytest.FixtureRequest, benchmark: Any, setting: Setting) -> Compare:
    """inspect(question, case, cases, shapes, dtype): what each case returns goes into its row; nothing is timed.
    With memory=True their memory is counted instead."""

    def run(
        question: str, case: str, cases: Sequence[Case], shapes: Row, dtype: torch.dtype, memory: bool = False
    ) -> None:
        sheet = Sheet(request.config, question, case, shapes, dtype)
        sheet.rule_out(cases)
        race = Race(sorted(cases, key=lambda c: c.risky), setting.device, memory=False)

        def measure() -> None:
            try:
                race.count_memory() if memory else race.inspect()
            finally:
                sheet.write(race)

        finish(benchmark, measure, setting)

    return run


def finish(benchmark: Any, measure: Callable[[], None], setting: Setting) -> None:
    try:
        benchmark.pedantic(measure, rounds=1, iterations=1)  # called once: the plugin warns of a fixture left unused
    except DeviceLost as error:
        pytest.exit(str(error), returncode=LOST)
    if setting.device == "cuda":
        torch.cuda.empty_cache()
