"""Finished records on disk: nothing is lost or done twice, whatever is killed, full or changed in between."""

import errno
import json
import os
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from perpo.data.read import read_records
from perpo.sampling.candidates import Outcome
from perpo.sampling.shards import Shards
from perpo.storage.identity import DamagedError, StaleError

from ..counting_sampler import Counting, records, run


@pytest.fixture
def expected(tmp_path: Path) -> bytes:
    """The output of a run that nothing disturbs."""
    (tmp_path / "expected").mkdir()
    run(tmp_path / "expected")
    return (tmp_path / "expected" / "out.jsonl").read_bytes()


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_stopped_run_goes_on_without_repeating_or_losing_a_record(
    stop: int, batch_size: int, tmp_path: Path, expected: bytes
) -> None:
    first, second = Counting(batch_size, stop), Counting(batch_size)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, made=first)
    assert not (tmp_path / "out.jsonl").exists()
    shard = tmp_path / "out.jsonl.parts" / "shard-00000.jsonl"
    kept = [json.loads(line)["id"] for line in shard.read_text().splitlines()]
    with shard.open("a") as file:
        file.write('{"id": "r6", "resp')  # a line that the kill has cut off
    run(tmp_path, made=second)
    assert (tmp_path / "out.jsonl").read_bytes() == expected
    assert kept + second.asked == [f"r{i}" for i in range(7)]
    assert [json.loads(line)["id"] for line in shard.read_text().splitlines()] == kept + second.asked
    third = Counting()
    assert run(tmp_path, made=third).totals.n_lists == 7  # all is done already
    assert third.asked == []


def test_any_number_of_processes_can_go_on(tmp_path: Path, expected: bytes) -> None:
    asked: Counter[str] = Counter()

    def part(rank: int, world_size: int, stop: int | None = None) -> Outcome | None:
        made = Counting(stop=stop)
        try:
            return run(tmp_path, made=made, rank=rank, world_size=world_size)
        except KeyboardInterrupt:
            return None
        finally:
            asked.update(made.asked)

    assert part(0, 2, stop=1) is None
    assert part(1, 2, stop=2) is None
    with (tmp_path / "out.jsonl.parts" / "shard-00001.jsonl").open("a") as file:
        file.write('{"id"')  # torn, and no process of that rank comes back at first
    missing = [outcome.n_missing for rank in (2, 0) if (outcome := part(rank, 3))]
    assert missing[0] > missing[1] > 0
    assert not (tmp_path / "out.jsonl").exists()
    last = part(1, 3)
    assert last is not None
    assert last.n_missing == 0
    assert (tmp_path / "out.jsonl").read_bytes() == expected
    assert asked == Counter(f"r{i}" for i in range(7))
    part(0, 1)
    assert asked.total() == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"made": Counting(temperature="0.5")}, r"different: temperature \(1.0 there, 0.5 now\)"),
        ({"made": Counting()}, r"temperature \(1.0 there, none now\)"),
        ({"k": 5}, r"k \(4 there, 5 now\), max_samples \(8 there, 10 now\)"),
        ({"reward": "exact"}, r"reward \(of each record's task there, exact now\)"),
    ],
)
def test_other_settings_are_refused_and_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, made=Counting(stop=2, temperature="1.0"))
    with pytest.raises(StaleError, match=message):
        run(tmp_path, **({"made": Counting(temperature="1.0")} | change))
    run(tmp_path, made=Counting(temperature="1.0"))


@pytest.mark.parametrize(
    ("field", "value"), [("prompt", "How few?"), ("answer", 4), ("task", "numeric"), ("image", "other.png")]
)
def test_a_changed_record_is_refused_and_named(field: str, value: Any, tmp_path: Path) -> None:
    run(tmp_path)
    changed = records()
    object.__setattr__(changed[2], field, value)
    with pytest.raises(StaleError, match=f"record 'r2' has another {field} now"):
        run(tmp_path, changed)


def test_more_records_are_only_those_that_are_new(tmp_path: Path) -> None:
    run(tmp_path, records(3))
    made = Counting()
    run(tmp_path, records(5), made)
    assert made.asked == ["r3", "r4"]
    assert len(read_records(tmp_path / "out.jsonl")[0]) == 5


@pytest.mark.parametrize("half", [False, True])
def test_a_full_disk_says_so_and_keeps_what_was_finished(
    half: bool, tmp_path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        """A file on a disk that fills up with its third line."""

        def __init__(self, file: Any) -> None:
            self.file, self.lines = file, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            self.lines += 1
            if self.lines < 3:
                return self.file.write(data)
            if half and self.lines == 3:
                return self.file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    def fill(shards: Shards, *args: Any, **options: Any) -> None:
        begin(shards, *args, **options)
        shards._file = Full(shards._file)

    begin = Shards.__init__
    with monkeypatch.context() as patch:
        patch.setattr(Shards, "__init__", fill)
        with pytest.raises(
            OSError, match=r"No space left on device: record 'r2' was not kept.*free some space"
        ) as full:
            run(tmp_path)
    assert full.value.errno == errno.ENOSPC
    shard = tmp_path / "out.jsonl.parts" / "shard-00000.jsonl"
    assert [json.loads(line)["id"] for line in shard.read_text().splitlines()] == ["r0", "r1"]
    made = Counting()
    run(tmp_path, made=made)
    assert made.asked == [f"r{i}" for i in range(2, 7)]
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_a_disk_that_is_full_at_the_end_loses_no_answer(
    tmp_path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("perpo.sampling.candidates.write_records", full)
        with pytest.raises(OSError, match=r"out.jsonl was not written, but all answers are in out.jsonl.parts"):
            run(tmp_path)
    made = Counting()
    run(tmp_path, made=made)
    assert made.asked == []
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_a_damaged_line_is_reported_and_its_record_sampled_again(tmp_path: Path, expected: bytes) -> None:
    run(tmp_path)
    shard = tmp_path / "out.jsonl.parts" / "shard-00000.jsonl"
    lines = shard.read_bytes().splitlines(keepends=True)
    shard.write_bytes(b"".join([*lines[:2], b"\0" * 20 + b"\n", *lines[3:]]))
    made = Counting()
    with pytest.warns(RuntimeWarning, match=r"shard-00000.jsonl:3 cannot be used, damaged"):
        run(tmp_path, made=made)
    assert made.asked == ["r2"]
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_the_same_command_twice_at_once_is_refused(tmp_path: Path) -> None:
    named = f"shard-00000.jsonl is in use by process {os.getpid()} on {socket.gethostname()}"
    with (
        Shards(tmp_path / "parts", {}),
        pytest.raises(
            BlockingIOError,
            match=named,
        ),
    ):
        Shards(tmp_path / "parts", {})
    with Shards(tmp_path / "parts", {}), Shards(tmp_path / "parts", {}, rank=1):
        pass


@pytest.mark.parametrize("place", [3, 40, 120, -3])
def test_a_flipped_bit_costs_its_record_and_no_other(place: int, tmp_path: Path, expected: bytes) -> None:
    run(tmp_path)
    shard = tmp_path / "out.jsonl.parts" / "shard-00000.jsonl"
    lines = [bytearray(line) for line in shard.read_bytes().splitlines(keepends=True)]
    lines[2][place] ^= 1
    shard.write_bytes(b"".join(lines))
    made = Counting()
    with pytest.warns(RuntimeWarning, match=r"shard-00000.jsonl:3 cannot be used, damaged.*sampled again"):
        run(tmp_path, made=made)
    assert made.asked == ["r2"]
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_shards_of_an_older_version_are_refused_as_such(tmp_path: Path) -> None:
    parts = tmp_path / "out.jsonl.parts"
    parts.mkdir()
    (parts / "identity.json").write_text('{"k": "4", "max_samples": "8", "reward": "of each record\'s task"}')
    (parts / "shard-00000.jsonl").write_text('{"id": "r0", "source": {}, "responses": ["1"], "rewards": [0.5]}\n')
    with pytest.raises(StaleError, match=r"holds answers .* storage format \(none there, 2 now\)"):
        run(tmp_path)


@pytest.mark.parametrize("content", ["[]", ""])
def test_a_damaged_identity_is_named(content: str, tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "out.jsonl.parts" / "identity.json").write_text(content)
    with pytest.raises(DamagedError, match=r"out.jsonl.parts/identity.json is damaged"):
        run(tmp_path)
    (tmp_path / "out.jsonl.parts" / "identity.json").unlink()
    with pytest.raises(StaleError, match=r"it has no identity\.json"):
        run(tmp_path)
