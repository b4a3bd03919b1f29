"""Finished records of several processes on disk, so that a killed run goes on where it was.

A folder holds `identity.json`, what the answers depend on except the records, and one `shard-*.jsonl` a process, to
which whole lines are appended and synced. A line that a kill has cut off is dropped, and a record is known by its id,
so any number of processes can go on. Each process reads all shards: none has to wait for another.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO

from perpo.data import ListRecord
from perpo.record_files import atomic_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

IDENTITY = "identity.json"
SOURCE = ("image", "prompt", "answer", "task")  # fields that answers and rewards depend on


class StaleShardsError(ValueError):
    """The folder holds answers that were drawn or scored in another way."""


@dataclass(frozen=True)
class Finished:
    """One line: a record's answers and rewards, or why it has none."""

    id: str
    source: dict[str, str]  # hash of each field that they depend on
    responses: list[str] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    unreadable: int = 0  # answers that the reward could not read
    cut: int = 0  # answers without an end
    error: str | None = None

    def attach(self, record: ListRecord) -> ListRecord:
        """The record with these answers."""
        return replace(record, responses=tuple(self.responses), rewards=tuple(self.rewards), ref_log_probs=None)


class Shards:
    """The lines of all processes, and this one's file, locked until `close`.

    Args:
        folder: made if missing.
        identity: name -> value of what the answers depend on.
        rank: this process' number.

    Raises:
        StaleShardsError: the folder was begun with another identity; the message says in what it differs.
        BlockingIOError: a process of this rank is still at work on the folder.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, str], rank: int = 0) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_identity(dict(identity))
        self.path = self.folder / f"shard-{rank:05d}.jsonl"
        self._file: IO[bytes] = self.path.open("ab+", buffering=0)
        try:
            self._lock()
            self._drop_torn_line()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Shards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self) -> dict[str, Finished]:
        """What all processes have finished, by id. Answers come before an error; of two answers the first shard's."""
        found: dict[str, Finished] = {}
        for file in sorted(self.folder.glob("shard-*.jsonl")):
            for one in _lines(file):
                if one.id not in found or (found[one.id].error is not None and one.error is None):
                    found[one.id] = one
        return found

    def append(self, finished: Finished) -> None:
        """On disk when this returns.

        Raises:
            OSError: no space; the message says what to do. The file is as it was before.
        """
        line = json.dumps(asdict(finished), allow_nan=False).encode() + b"\n"
        before = os.fstat(self._file.fileno()).st_size
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(before)
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            hint = "free some space" if full else "see to that"
            raise OSError(
                error.errno,
                f"{error.strerror or error}: record {finished.id!r} was not kept, all before it are in {self.folder}; "
                f"{hint} and run the same command again",
            ) from error

    # ------------------------------------------------------------------------------------------------------- details

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno, f"another process is writing {self.path}: is the same command still running?"
            ) from error
        except OSError:  # not every file system can
            pass

    def _drop_torn_line(self) -> None:
        self._file.truncate(self.path.read_bytes().rfind(b"\n") + 1)

    def _check_identity(self, identity: dict[str, str]) -> None:
        file = self.folder / IDENTITY
        if not file.exists():
            with atomic_file(file) as out:
                out.write(json.dumps(identity, indent=1).encode())
        there = json.loads(file.read_text(encoding="utf-8"))
        different = [
            f"{name} ({there.get(name, 'none')} there, {identity.get(name, 'none')} now)"
            for name in sorted({*there, *identity})
            if there.get(name) != identity.get(name)
        ]
        if different:
            raise StaleShardsError(
                f"{self.folder} holds answers that were made in another way; different: {', '.join(different)}. Go on "
                "with the same settings, name another output, or delete the folder to begin again"
            )


def source_of(record: ListRecord) -> dict[str, str]:
    """Short hashes of the fields that answers and rewards depend on. An image is known by its path or bytes, one in
    memory only by its size."""
    image = record.image
    if isinstance(image, Mapping):
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if isinstance(image, bytes):
        shown = hashlib.sha256(image).hexdigest()
    else:
        shown = os.fspath(image) if isinstance(image, str | os.PathLike) else str(getattr(image, "size", None))
    values = {"image": shown, "prompt": record.prompt, "answer": record.answer, "task": record.task}
    return {
        name: hashlib.sha256(json.dumps(values[name], default=str, sort_keys=True).encode()).hexdigest()[:8]
        for name in SOURCE
    }


def check_sources(records: Collection[ListRecord], finished: Mapping[str, Finished], folder: Path) -> None:
    """That finished records were made of these.

    Raises:
        StaleShardsError: one was not; the message says which, and in which fields it differs.
    """
    for record in records:
        known = finished.get(record.id)
        if known is None or known.error is not None:
            continue
        now = source_of(record)
        different = [name for name in SOURCE if known.source.get(name) != now[name]]
        if different:
            raise StaleShardsError(
                f"record {record.id!r} has another {' and '.join(different)} than when its answers in {folder} were "
                "made; go on with the same records, name another output, or delete the folder to begin again"
            )


def _lines(file: Path) -> Iterator[Finished]:
    for number, line in enumerate(file.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            return  # still being written, or cut off
        try:
            yield Finished(**json.loads(line))
        except (ValueError, TypeError) as error:
            warnings.warn(
                f"{file}:{number} is damaged ({error}); its record is sampled again", RuntimeWarning, stacklevel=2
            )
