"""A folder belongs to what it was made from, and nothing else is taken for it."""

import json
import pickle
from multiprocessing import get_context
from pathlib import Path

import pytest

from perpo.storage.identity import IDENTITY, DamagedError, StaleError, claim, known_identity


def take(folder: Path, **identity: str) -> None:
    claim(folder, identity, setting="output", contents="answers", pattern="shard-*")


def test_a_folder_keeps_the_identity_it_was_begun_with(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    take(folder, k="5", seed="0")
    take(folder, seed="0", k="5")
    different = r"different: k \(5 there, 6 now\), seed \(0 there, none now\), top_p \(none there, 1 now\)\."
    with pytest.raises(
        StaleError, match=f"^output: {folder} holds answers .*{different}.*name another output"
    ) as stale:
        take(folder, k="6", top_p="1")
    assert known_identity(folder) | {"k": "5", "seed": "0"} == known_identity(folder)
    assert str(pickle.loads(pickle.dumps(stale.value))) == str(stale.value)  # it is sent to other processes


def test_contents_without_an_identity_are_not_taken(tmp_path: Path) -> None:
    (tmp_path / "shard-1").write_text("")
    with pytest.raises(StaleError, match=f"holds answers .* it has no {IDENTITY}"):
        take(tmp_path, k="5")
    assert not (tmp_path / IDENTITY).exists()


def test_a_folder_of_an_older_version_is_refused_as_such(tmp_path: Path) -> None:
    """Its fingerprints were made in another way, so that all of them differ."""
    (tmp_path / IDENTITY).write_text(json.dumps({"k": "4", "weights": "abc"}))
    with pytest.raises(StaleError, match=r"different: storage format \(none there, 2 now\)\. "):
        take(tmp_path, k="5")


@pytest.mark.parametrize("content", [b"[]", b"", b"\0\0", b'{"k": 5}', b"[" * 10**5, b'{"k": "\xff"}'])
def test_an_identity_that_cannot_be_read_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / IDENTITY).write_bytes(content)
    with pytest.raises(DamagedError, match=f"{tmp_path / IDENTITY} is damaged"):
        take(tmp_path, k="5")
    assert (tmp_path / IDENTITY).read_bytes() == content


def test_a_finished_folder_may_be_read_only(tmp_path: Path) -> None:
    take(tmp_path, k="5")
    tmp_path.chmod(0o555)
    try:
        take(tmp_path, k="5")
    finally:
        tmp_path.chmod(0o755)


def _took(folder: Path, number: int) -> bool:
    try:
        take(folder, number=str(number))
    except StaleError:
        return False
    return True


def test_of_processes_that_begin_at_once_one_takes_the_folder(tmp_path: Path) -> None:
    with get_context("spawn").Pool(4) as pool:
        for i in range(20):
            taken = pool.starmap(_took, [(tmp_path / str(i), number) for number in range(8)], chunksize=1)
            assert sum(taken) == 1
