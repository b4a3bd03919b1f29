"""Lines that are kept are whole, in order and on the disk; a full disk leaves the file as it was."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpo.storage.journal import Journal, read_journals

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text().filter(lambda name: name != "checksum"), JSON, min_size=1, max_size=3)


def values(path: Path) -> list[Any]:
    return [value for _, value in read_journals([path], "gone")]


@given(st.lists(OBJECTS, min_size=1, max_size=4), st.data())
def test_cut_anywhere_the_whole_lines_are_there_and_more_can_follow(
    tmp_path_factory: pytest.TempPathFactory, kept: list[Any], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    with Journal(path) as file:
        for value in kept:
            file.append(value, what="a value")
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    whole = kept[: content[:cut].count(b"\n")]
    assert values(path) == whole  # a reader does not wait for the torn line to be dropped
    with Journal(path) as file:
        file.append({"next": 1}, what="a value")
    assert values(path) == [*whole, {"next": 1}]


@given(st.lists(OBJECTS, min_size=1, max_size=3), st.data())
def test_a_flipped_bit_is_noticed_wherever_it_is(
    tmp_path_factory: pytest.TempPathFactory, kept: list[Any], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    with Journal(path) as file:
        file.append(*kept, what="values")
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 2))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"a.jsonl:\d.* cannot be used, damaged"):
        found = values(path)
    assert len(found) < len(kept)
    assert all(value in kept for value in found)


def test_a_damaged_line_is_named_and_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with Journal(path) as file:
        file.append({"a": 1}, {"a": 2}, {"a": 3}, {"a": 4}, what="values")
    first, _, _, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"\0\0\n\xff\n" + last)
    with pytest.warns(RuntimeWarning) as warned:
        found = list(read_journals([path], "its record is asked again"))
    assert found == [(f"{path}:1", {"a": 1}), (f"{path}:4", {"a": 4})]
    (warning,) = warned
    assert f"{path}:2 and 1 more line of it cannot be used, damaged" in str(warning.message)
    assert str(warning.message).endswith("; its record is asked again")


@pytest.mark.parametrize("fails", ["write", "fsync"])
def test_a_full_disk_leaves_the_file_as_it_was(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"

    class HalfFull:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            if len(data) < 12:  # what was left over of the first attempt
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data[:-4])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Journal(path) as file:
        file.append({"n": 1}, what="one")
        with monkeypatch.context() as patch:
            if fails == "write":
                patch.setattr(file, "_file", HalfFull(file._file))
            else:
                patch.setattr(os, "fsync", full)
            message = r"No space left on device: the next two was not kept, .*free some space and run the same command"
            with pytest.raises(OSError, match=message) as error:
                file.append({"n": 2}, {"n": 3}, what="the next two")
            assert error.value.errno == errno.ENOSPC
        assert values(path) == [{"n": 1}]
        assert path.read_text().endswith("}\n")
        file.append({"n": 4}, what="one")
    assert values(path) == [{"n": 1}, {"n": 4}]


def test_what_is_appended_is_synced_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, sync = [], os.fsync

    def watched(file: int) -> None:
        sizes.append(os.fstat(file).st_size)
        sync(file)

    monkeypatch.setattr(os, "fsync", watched)
    with Journal(tmp_path / "a.jsonl") as file:
        file.append({"a": 1}, {"a": 2}, what="two")
    assert sizes == [(tmp_path / "a.jsonl").stat().st_size]
    assert [json.loads(line)["a"] for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [1, 2]


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with Journal(tmp_path / "a.jsonl"), pytest.raises(BlockingIOError, match=r"a.jsonl is in use by process \d+ on"):
        Journal(tmp_path / "a.jsonl")
    with Journal(tmp_path / "a.jsonl", wait=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
