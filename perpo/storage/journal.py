"""Lines of JSON that are on the disk as soon as they are written: what a killed run has finished is not lost.

A line that a kill or a full disk has cut off is dropped by whoever writes to the file next, and never read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

try:
    import fcntl
except ImportError:  # Windows: no lock there
    fcntl = None  # type: ignore[assignment]


class LineFile:
    """A file that this process alone appends to until `close`; use it as a context manager.

    Args:
        path: made if missing, and its folder.
        wait: for another process that has it, instead of an error.

    Raises:
        BlockingIOError: another process is writing to it.
    """

    def __init__(self, path: str | os.PathLike[str], *, wait: bool = False) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = self.path.open("ab+", buffering=0)
        try:
            self._lock(wait)
            self._drop_torn_line()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def append(self, *values: Any, what: str) -> None:
        """A line for each value, all or none, on the disk when this returns.

        Args:
            what: the values are, for an error.

        Raises:
            OSError: no space; the message says what to do. The file is as it was before.
        """
        lines = "".join(json.dumps(value, allow_nan=False) + "\n" for value in values).encode()
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
            hint = "free some space" if full else "see to that"
            raise OSError(
                error.errno,
                f"{error.strerror or error}: {what} was not kept, all before is in {self.path}; {hint} and run the "
                "same command again",
            ) from error

    def _lock(self, wait: bool) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno, f"another process is writing {self.path}: is the same command still running?"
            ) from error
        except OSError:  # not every file system can
            pass

    def _drop_torn_line(self) -> None:
        end = self._file.seek(0, os.SEEK_END)
        if end == 0:
            return
        self._file.seek(end - 1)
        if self._file.read(1) != b"\n":
            self._file.truncate(self.path.read_bytes().rfind(b"\n") + 1)


def read_lines(path: Path, consequence: str) -> Iterator[tuple[str, Any]]:
    """Every whole line with its place, "file:12". One that is damaged is left out, with a warning.

    Args:
        consequence: what becomes of a damaged line, for the warning.
    """
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            warnings.warn(f"{path}:{number} is damaged ({error}); {consequence}", RuntimeWarning, stacklevel=2)
        else:
            yield f"{path}:{number}", value
