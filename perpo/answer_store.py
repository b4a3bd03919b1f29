"""Answers that models have given, kept as they are made: append-only JSONL, so that a killed run goes on.

A line is one record's answers under one condition of one model:

    {"model": hash, "condition": "greedy/32", "record": "r7", "content": hash, "texts": [...], "image_size": [w, h]}

`model` hashes weights, processor and what else decides its answers, `content` hashes picture and question; so whatever
changed is simply asked again, and a changed ground truth is not.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

try:
    import fcntl
except ImportError:  # Windows: no lock there
    fcntl = None  # type: ignore[assignment]


class Key(NamedTuple):
    model: str
    condition: str
    record: str
    content: str


class Answers(NamedTuple):
    texts: tuple[str, ...]
    image_size: tuple[int, int] | None  # (width, height) as the model's box format may need it
    n_cut: int = 0  # answers that had not ended after max_new_tokens


class AnswerStore:
    """The answers in a file, which is made if missing; use it as a context manager.

    Raises:
        ValueError: a line in the middle of the file is no answer, or another run is writing to it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = self.path.open("ab+")
        try:
            self._lock()
            self._known = self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, key: Key) -> bool:
        return key in self._known

    def __getitem__(self, key: Key) -> Answers:
        return self._known[key]

    def __len__(self) -> int:
        return len(self._known)

    def add(self, entries: Iterable[tuple[Key, Answers]]) -> None:
        """Keep these answers; they are on the disk when this returns."""
        new = dict(entries)
        lines = [json.dumps({**key._asdict(), **answers._asdict()}) + "\n" for key, answers in new.items()]
        self._file.write("".join(lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._known |= new

    def _lock(self) -> None:
        """Keep a second run out, where the file system has locks."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"output: another run is writing to {self.path}; wait for it to end, or name another folder"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
                raise

    def _read(self) -> dict[Key, Answers]:
        self._file.seek(0)
        content = self._file.read()
        end = content.rfind(b"\n") + 1
        if end < len(content):  # the last line of a killed run
            self._file.truncate(end)
        known = {}
        for number, line in enumerate(content[:end].splitlines(), 1):
            try:
                row = json.loads(line)
                size = row["image_size"]
                key = Key(row["model"], row["condition"], row["record"], row["content"])
                known[key] = Answers(tuple(row["texts"]), None if size is None else (size[0], size[1]), row["n_cut"])
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise ValueError(
                    f"output: {self.path}:{number} is no answer of a model ({type(error).__name__}: {error}); delete "
                    "that line, or name another folder"
                ) from error
        return known
