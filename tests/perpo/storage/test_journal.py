"""Lines that are kept are whole, in order and on the disk; a full disk leaves the file as it was."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpo.storage.journal import LineFile, read_lines

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def values(path: Path) -> list[Any]:
    return [value for _, value in read_lines(path, "gone")]


@given(st.lists(JSON, min_size=1, max_size=4), st.data())
def test_cut_anywhere_the_whole_lines_are_there_and_more_can_follow(
    tmp_path_factory: pytest.TempPathFactory, kept: list[Any], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    with LineFile(path) as file:
        for value in kept:
            file.append(value, what="a value")
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    whole = kept[: content[:cut].count(b"\n")]
    assert values(path) == whole  # a reader does not wait for the torn line to be dropped
    with LineFile(path) as file:
        file.append("next", what="a value")
    assert values(path) == [*whole, "next"]


def test_a_damaged_line_is_named_and_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1\n\0\0\n\xff\n4\n")
    with pytest.warns(RuntimeWarning) as warned:
        found = list(read_lines(path, "it is asked again"))
    assert found == [(f"{path}:1", 1), (f"{path}:4", 4)]
    assert [f"{path}:{n} is damaged" in str(w.message) for n, w in zip((2, 3), warned, strict=True)] == [True, True]
    assert "it is asked again" in str(warned[0].message)


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

    with LineFile(path) as file:
        file.append("first", what="one")
        with monkeypatch.context() as patch:
            if fails == "write":
                patch.setattr(file, "_file", HalfFull(file._file))
            else:
                patch.setattr(os, "fsync", full)
            message = r"No space left on device: the next two was not kept, .*free some space and run the same command"
            with pytest.raises(OSError, match=message) as error:
                file.append("second line", "third line", what="the next two")
            assert error.value.errno == errno.ENOSPC
        assert path.read_text() == '"first"\n'
        file.append("again", what="one")
    assert values(path) == ["first", "again"]


def test_what_is_appended_is_synced_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, sync = [], os.fsync

    def watched(file: int) -> None:
        sizes.append(os.fstat(file).st_size)
        sync(file)

    monkeypatch.setattr(os, "fsync", watched)
    with LineFile(tmp_path / "a.jsonl") as file:
        file.append({"a": 1}, {"a": 2}, what="two")
    assert sizes == [len(json.dumps({"a": 1}) + "\n") * 2]


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with LineFile(tmp_path / "a.jsonl"), pytest.raises(BlockingIOError, match="is the same command still running"):
        LineFile(tmp_path / "a.jsonl")
    with LineFile(tmp_path / "a.jsonl", wait=True):
        pass
