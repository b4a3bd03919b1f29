"""Options and the fixture that the questions share.

pytest benchmarks --benchmark-only                         laptop sizes on the CPU, full sizes where a GPU is found
pytest benchmarks --benchmark-only --size tiny             once through everything, a smoke test
pytest benchmarks --benchmark-only --rows results.json     also write the rows that benchmarks.report reads
pytest benchmarks --benchmark-only --one-thread            on a shared CPU: one thread, its processor time
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import rows
from benchmarks.harness import OURS, Case, Race
from benchmarks.problems import Setting

ROUNDS = {"tiny": 2, "cpu": 5, "gpu": 11}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("perpo benchmarks")
    group.addoption("--size", choices=["auto", *ROUNDS], default="auto", help="auto: gpu where one is found, else cpu")
    group.addoption("--tiny", action="store_const", dest="size", const="tiny", help="the same as --size tiny")
    group.addoption("--rows", type=Path, default=None, help="JSON file to add the rows to")
    group.addoption(
        "--one-thread", action="store_true", help="CPU: time one thread by its processor time, not the wall's"
    )
    group.addoption("--rounds", type=int, default=None, help="samples of each case")


def setting_of(config: pytest.Config) -> Setting:
    return Setting.of(config.getoption("--size"))


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


Compare = Callable[..., Race]


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any, setting: Setting) -> Compare:
    """compare(question, case, cases, shapes): time the cases in turn; pytest-benchmark shows ours, the file has all."""
    one_thread = setting.device == "cpu" and request.config.getoption("--one-thread")
    if one_thread:
        torch.set_num_threads(1)

    def run(
        question: str,
        case: str,
        cases: Sequence[Case],
        shapes: dict[str, Any],
        memory: bool = True,
        rounds: int | None = None,
    ) -> Race:
        race = Race(cases, setting.device, memory, time.process_time if one_thread else time.perf_counter)
        race.warm_up()
        ours = next(c for c in cases if c.name == OURS)
        others = [c for c in cases if c is not ours]

        def before() -> None:
            for other in others:
                race.sample(other)

        n_rounds = rounds or request.config.getoption("--rounds") or ROUNDS[setting.size]
        benchmark.pedantic(race.sample, args=(ours,), setup=before, rounds=n_rounds, iterations=1)
        rows_ = race.rows(question, case, shapes, str(setting.dtype).removeprefix("torch."))
        path = request.config.getoption("--rows")
        if path is not None:
            rows.append(path, rows_)
        benchmark.extra_info.update({row["peer"]: row["ratio_to_ours"] for row in rows_})
        if setting.device == "cuda":
            torch.cuda.empty_cache()
        return race

    return run


@pytest.fixture
def inspect(request: pytest.FixtureRequest, benchmark: Any, setting: Setting) -> Compare:
    """inspect(question, case, cases, shapes, dtype): what each case returns goes into its row; nothing is timed.
    With memory=True their memory is counted instead."""

    def run(
        question: str,
        case: str,
        cases: Sequence[Case],
        told: dict[str, Any],
        dtype: torch.dtype,
        memory: bool = False,
    ) -> Race:
        race = Race(cases, setting.device, memory=False)
        benchmark.pedantic(race.count_memory if memory else race.inspect, rounds=1, iterations=1)
        path = request.config.getoption("--rows")
        if path is not None:
            rows.append(path, race.rows(question, case, told, str(dtype).removeprefix("torch.")))
        if setting.device == "cuda":
            torch.cuda.empty_cache()
        return race

    return run
