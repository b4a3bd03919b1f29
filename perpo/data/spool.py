"""Records that were read and checked wait on disk, in a temporary file without a name, until they are asked for.

A record of 20 answers takes 4 kB as objects of Python, and here 8 bytes, which say where it ends in the file. Workers
of a data loader read from the file of their parent, and the operating system keeps what fits of it in memory, once. The
file is in $TMPDIR, or else in /var/tmp, since /tmp often lies in memory; it goes with the process, even a killed one.
"""

from __future__ import annotations

import io
import os
import pickle
import tempfile
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, Generic, Self, TypeVar, overload

from PIL import Image

T = TypeVar("T")

BUFFER = 1 << 20  # bytes written at once
_UNPICKLED = (pickle.PicklingError, TypeError, AttributeError)  # what pickling raises of classes in functions etc.


class Spool(Sequence[T], Generic[T]):
    """A sequence whose items lie on disk. Each access makes an equal item anew; slices are views of the same file.

    What no file can hold stays in memory: PIL images, `datasets` that images are in, and items that cannot be pickled.

    Args:
        items: taken one after the other.

    Raises:
        OSError: no space; the message says where.
    """

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._file = _File()
        self._ends = array("Q")
        self._chosen: Sequence[int] | None = None  # of a view: which items
        for item in items:
            self.append(item)

    def append(self, item: T) -> None:
        assert self._chosen is None, "a view cannot grow"
        self._ends.append(self._file.append(item))

    def pick(self, places: Iterable[int]) -> Self:
        """The items at these places, as a view."""
        view = type(self).__new__(type(self))
        view._file, view._ends = self._file, self._ends
        chosen = array("Q", places)
        view._chosen = chosen if self._chosen is None else array("Q", (self._chosen[i] for i in chosen))
        return view

    def __len__(self) -> int:
        return len(self._ends if self._chosen is None else self._chosen)

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> Self: ...
    def __getitem__(self, place: int | slice) -> T | Self:
        if isinstance(place, slice):
            return self.pick(range(len(self))[place])
        i = range(len(self))[place]  # counts from the end, and raises beyond it
        i = i if self._chosen is None else self._chosen[i]
        return self._file.load(self._ends[i - 1] if i else 0, self._ends[i])

    def __iter__(self) -> Iterator[T]:
        for place in range(len(self)):
            yield self[place]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as a list has it

    def __repr__(self) -> str:
        return f"<{len(self)} items on disk>"


class _File:
    """The file of some spools, and what it cannot hold. It is read at places, so processes and threads can share it."""

    def __init__(self) -> None:
        self.file: IO[bytes] = tempfile.TemporaryFile(dir=_folder(), buffering=0)  # noqa: SIM115 - closed with the object
        self.lock = threading.Lock()
        self.size = 0  # of what was written
        self.pending = bytearray()
        self.held: list[Any] = []
        self.places: dict[int, int] = {}  # id() of what is held -> its place

    def append(self, item: Any) -> int:
        """Where it ends."""
        try:
            self.pending += _Plain.packed(item)
        except _Held:
            try:
                self.pending += _Holding.packed(item, self._hold_some)
            except _UNPICKLED:
                self.pending += _Holding.packed(item, self._hold)
        except _UNPICKLED:
            self.pending += _Holding.packed(item, self._hold)
        if len(self.pending) >= BUFFER:
            self.flush()
        return self.size + len(self.pending)

    def load(self, start: int, end: int) -> Any:
        if end > self.size:
            self.flush()
        data = self._read(start, end)
        if len(data) != end - start:
            raise OSError(f"{_folder()}: a temporary file with records was cut off")
        unpickler = pickle.Unpickler(io.BytesIO(data))
        unpickler.persistent_load = self.held.__getitem__  # type: ignore[method-assign]  # meant to be replaced
        return unpickler.load()

    def flush(self) -> None:
        with self.lock:
            try:
                self._write()
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"{error.strerror or error}: records that were read wait in {_folder()} until they are needed; "
                    "free some space there, or name another folder by the environment's TMPDIR",
                ) from error
            self.size += len(self.pending)
            self.pending.clear()

    def _read(self, start: int, end: int) -> bytes:
        parts = []
        while start < end and (part := os.pread(self.file.fileno(), end - start, start)):
            parts.append(part)
            start += len(part)
        return b"".join(parts)

    def _write(self) -> None:
        with memoryview(self.pending) as left:
            written = 0
            while written < len(left):
                written += os.pwrite(self.file.fileno(), left[written:], self.size + written)

    def _hold_some(self, one: Any) -> int | None:
        return self._hold(one) if _stays(one) else None

    def _hold(self, one: Any) -> int:
        place = self.places.setdefault(id(one), len(self.held))
        if place == len(self.held):
            self.held.append(one)
        return place

    def __reduce__(self) -> tuple[Any, ...]:
        """For a worker that is not forked: it gets the open file."""
        from multiprocessing.reduction import DupFd

        self.flush()
        return _shared, (DupFd(self.file.fileno()), self.size, self.held)


def _shared(handle: Any, size: int, held: list[Any]) -> _File:
    made = _File.__new__(_File)
    made.file = os.fdopen(handle.detach(), "rb", buffering=0)
    made.size, made.pending, made.held, made.places, made.lock = size, bytearray(), held, {}, threading.Lock()
    return made


def _stays(one: Any) -> bool:
    """In memory."""
    return isinstance(one, Image.Image) or type(one).__module__.partition(".")[0] == "datasets"


class _Held(Exception):
    """An item holds what stays in memory."""


class _Plain(pickle.Pickler):
    """Asked about objects of classes alone, so it is fast."""

    def reducer_override(self, one: Any) -> Any:
        if _stays(one):
            raise _Held
        return NotImplemented

    @classmethod
    def packed(cls, item: Any) -> bytes:
        buffer = io.BytesIO()
        cls(buffer, pickle.HIGHEST_PROTOCOL).dump(item)
        return buffer.getvalue()


class _Holding(pickle.Pickler):
    """Asked about every object."""

    @classmethod
    def packed(cls, item: Any, held: Callable[[Any], int | None]) -> bytes:
        buffer = io.BytesIO()
        pickler = cls(buffer, pickle.HIGHEST_PROTOCOL)
        pickler.persistent_id = held  # type: ignore[method-assign]  # meant to be replaced
        pickler.dump(item)
        return buffer.getvalue()


def _folder() -> str:
    named = any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    return tempfile.gettempdir() if named or not os.access("/var/tmp", os.W_OK) else "/var/tmp"
