"""One process at a time. The operating system releases the lock when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

try:
    import fcntl
except ImportError:  # Windows: no lock there
    fcntl = None  # type: ignore[assignment]  # a module or None

_open: weakref.WeakSet[IO[str]] = weakref.WeakSet()
_held: set[Path] = set()  # by `held`, in this process


class Lock:
    """Held from here until `release`; use it as a context manager.

    Args:
        path: a file for the lock alone, made here and deleted by `release`.
        what: the thing that one process may use at a time, for an error: "output_dir: /runs/a".
        wait: for the process that holds it, instead of an error.

    Raises:
        BlockingIOError: another process holds it; the message says which one, and where it runs.
    """

    def __init__(self, path: Path, what: str, *, wait: bool = False) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._acquire(what, wait)
        _open.add(self._file)
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now}))
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        if self._file.closed:
            return
        if self._is_named(self._file):
            self.path.unlink(missing_ok=True)
        self._file.close()

    def _acquire(self, what: str, wait: bool) -> IO[str]:
        while True:
            file = self.path.open("a+", encoding="utf-8")
            try:
                _flock(file, wait)
                if self._is_named(file):  # not deleted by who held it before
                    return file
            except BlockingIOError:
                raise BlockingIOError(
                    f"{what} is in use by {_owner(file)}. Wait until that process has ended, or stop it"
                ) from None
            except BaseException:
                file.close()
                raise
            file.close()

    def _is_named(self, file: IO[str]) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False


@contextlib.contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """A block under a `Lock`; inside a block of this process on the same path, nothing more.

    Raises:
        BlockingIOError: as `Lock`.
    """
    path = Path(os.path.abspath(path))
    if path in _held:
        yield
        return
    with Lock(path, what):
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)


def _flock(file: IO[str], wait: bool) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as error:
        warnings.warn(
            f"{file.name}: this file system has no locks ({error.strerror}); make sure that no second process uses the "
            "folder",
            RuntimeWarning,
            stacklevel=4,
        )


def _owner(file: IO[str]) -> str:
    """Of a lock's file, which is closed."""
    with file:
        file.seek(0)
        try:
            owner = json.loads(file.read())
            return f"process {owner['pid']} on {owner['host']} (since {owner['since']})"
        except (ValueError, KeyError, TypeError):  # it has not said so yet
            return "another process"


def _leave_to_parent() -> None:
    """Else a forked child that outlives its parent (a worker of a data loader) would keep the lock."""
    for file in list(_open):
        file.close()
    _open.clear()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
