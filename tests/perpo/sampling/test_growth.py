"""No step of sampling and scoring grows faster than the number of records.

Counted are calls of functions and bytes read and written, which no other load on the machine changes. What is done once
(imports, the first record) makes the ratio smaller, never larger.
"""

import cProfile
import pstats
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tqdm import tqdm

from benchmarks import store
from perpo.sampling import existing
from perpo.storage import journal

FEW, MANY = 400, 1600  # of fewer, the boxes of single records tell
pytestmark = pytest.mark.slow


def work(function: Callable[[], object]) -> tuple[int, int]:
    """Calls and bytes."""
    profile = cProfile.Profile()
    before = transferred()
    profile.runcall(function)
    return pstats.Stats(profile).total_calls, transferred() - before


def transferred() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar")))


def killed_at(place: Path, ways: int, done: int) -> None:
    """What a run leaves that was killed after so many records of each process."""
    for rank in range(ways):
        store.sample(place, f"all-{ways}.jsonl", rank, ways)
        whole = place / f"all-{ways}.jsonl.parts"
        cut = place / f"cut-{ways}.jsonl.parts"
        cut.mkdir(exist_ok=True)
        (cut / "identity.json").write_bytes((whole / "identity.json").read_bytes())
        name = f"shard-{rank:05d}.jsonl"
        (cut / name).write_bytes(b"".join((whole / name).read_bytes().splitlines(keepends=True)[:done]))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes as Linux does")
def test_four_times_the_records_take_at_most_four_times_the_calls_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal.os, "fsync", lambda file: None)
    monkeypatch.setattr(existing, "FLUSH_SECONDS", -1)  # no step depends on the clock
    made = tqdm.__init__
    monkeypatch.setattr(tqdm, "__init__", lambda self, *given, **named: made(self, *given, **named | {"disable": True}))
    monkeypatch.setattr(store, "K", 4)
    counted: dict[int, dict[str, tuple[int, int]]] = {}
    for n in (FEW, MANY):
        place = tmp_path / str(n)
        store.write_records(place, n)
        steps = counted[n] = {"sample": work(partial(store.sample, place, "out.jsonl"))}
        for ways in (1, 4):
            killed_at(place, ways, (n // ways) * 4 // 5)
            for rank in range(ways):
                resume = partial(store.sample, place, f"cut-{ways}.jsonl", rank, ways)
                steps[f"resume {rank}/{ways}"] = work(resume)
        steps["score"] = work(partial(store.score, place, "scored.jsonl"))
        steps["score again"] = work(partial(store.score, place, "scored.jsonl"))
        whole = (place / "out.jsonl").read_bytes()
        assert all((place / f"cut-{ways}.jsonl").read_bytes() == whole for ways in (1, 4))
    allowed = 1.02 * MANY / FEW  # ids and numbers of lines have more digits
    for step, few in counted[FEW].items():
        ratios = [b / a for a, b in zip(few, counted[MANY][step], strict=True)]
        assert max(ratios) < allowed, (step, ratios)
