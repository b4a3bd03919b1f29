"""Append-only files, a JSON object a line, on the disk as soon as a line is written: a kill loses nothing finished.

A line ends in a checksum of what stands before it, and is itself JSON: `{"id": "r1", …, "checksum": "5d41402a"}`. A
line that a kill or a full disk has cut off is dropped by the next writer; a damaged one is reported, and never read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from perpo.storage.lock import Lock

CHECKSUM = "checksum"
_MARK = f', "{CHECKSUM}": "'.encode()


class Journal:
    """A file that this process alone appends to until `close`; use it as a context manager.

    Args:
        path: made if missing, and its folder.
        wait: for another process that writes to it, instead of an error.

    Raises:
        BlockingIOError: another process is writing to it.
    """

    def __init__(self, path: str | os.PathLike[str], *, wait: bool = False) -> None:
        self.path = Path(path)
        self._lock = Lock(self.path.with_name(f".{self.path.name}.lock"), str(self.path), wait=wait)
        try:
            self._file: IO[bytes] = self.path.open("ab+", buffering=0)
            self._drop_torn_line()
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()
        self._lock.release()

    def append(self, *values: Mapping[str, Any], what: str) -> None:
        """A line for each value, all or none, on the disk when this returns.

        Args:
            values: not empty, and none with a "checksum".
            what: the values are, for an error.

        Raises:
            OSError: no space; the message says what to do. The file is as it was before.
        """
        lines = b"".join(map(_line, values))
        before = os.fstat(self._file.fileno()).st_size
        try:
            written = 0
            while written < len(lines):
                written += self._file.write(lines[written:])
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(before)
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            hint = "free some space" if full else "remove the cause"
            raise OSError(
                error.errno,
                f"{error.strerror or error}: {what} was not kept, all before is in {self.path}; {hint} and run the "
                "same command again",
            ) from error

    def _drop_torn_line(self) -> None:
        end = self._file.seek(0, os.SEEK_END)
        if end == 0:
            return
        self._file.seek(end - 1)
        if self._file.read(1) != b"\n":
            self._file.truncate(self.path.read_bytes().rfind(b"\n") + 1)


def read_journals(paths: Iterable[Path], consequence: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every whole line of some journals with its place, "file:12". Damaged lines are left out, with one warning a file.

    Args:
        consequence: of the damage, for the warning: "their records are sampled again".
    """
    for path in paths:
        damaged: list[tuple[int, str]] = []
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            try:
                value = _value(line)
            except (ValueError, RecursionError) as error:
                damaged.append((number, str(error)))
            else:
                yield f"{path}:{number}", value
        if damaged:
            (first, why), more = damaged[0], len(damaged) - 1
            lines = f" and {more} more line{'s' if more > 1 else ''} of it" if more else ""
            warnings.warn(
                f"{path}:{first}{lines} cannot be used, damaged or written by another version ({why}); {consequence}",
                RuntimeWarning,
                stacklevel=2,
            )


def _line(value: Mapping[str, Any]) -> bytes:
    content = json.dumps(value, allow_nan=False).encode()[:-1]
    return content + _MARK + _checksum(content) + b'"}\n'


def _value(line: bytes) -> dict[str, Any]:
    content, mark, end = line.rpartition(_MARK)
    if not mark:
        raise ValueError("no checksum")
    if end != _checksum(content) + b'"}':
        raise ValueError("its checksum differs")
    return json.loads(content + b"}")


def _checksum(content: bytes) -> bytes:
    return f"{zlib.crc32(content):08x}".encode()
