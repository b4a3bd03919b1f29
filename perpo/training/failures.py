"""What fails in one process of several ends them all, at once and with its message.

The others would wait in the next exchange for a process that is gone, until their launcher kills them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, TypeVar

from accelerate.utils import gather_object

from perpo.data.read import reason_of

T = TypeVar("T")


class FailedElsewhere(RuntimeError):
    """Another process could not go on; the message is that of its error."""

    known_to_all = True


def of_all(n_processes: int, mine: Callable[[], list[Any]]) -> list[Any]:
    """What the processes make, each its part, one after the other; all of them call this.

    Raises:
        FailedElsewhere: another process failed.
    """
    if n_processes == 1:
        return mine()
    try:
        made, error = mine(), None
    except Exception as failed:
        if getattr(failed, "known_to_all", False):  # of an exchange within this one
            raise
        made, error = [], failed
    parts = gather_object([(made, None if error is None else reason_of(error))])
    if error is not None:
        error.known_to_all = True  # type: ignore[attr-defined]  # read by the same module
        raise error
    raise_first([message for _, message in parts])
    return [one for part, _ in parts for one in part]


def in_step(n_processes: int, items: Iterable[T]) -> Iterator[T]:
    """Each process' own items, of which all have equally many. Where one cannot make its next, all end before using it.

    Raises:
        FailedElsewhere: another process failed.
    """
    iterator = iter(items)
    while True:
        found: list[T] = []

        def take(found: list[T] = found) -> list[Any]:
            found.extend(islice(iterator, 1))
            return []

        of_all(n_processes, take)
        if not found:
            return
        yield found[0]


class InStep:
    """A data loader of which all processes take equally many batches, read `in_step`."""

    def __init__(self, loader: Any, n_processes: int) -> None:
        self._loader, self._n_processes = loader, n_processes

    def __iter__(self) -> Iterator[Any]:
        return in_step(self._n_processes, self._loader)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def check_same(n_processes: int, mine: Mapping[str, str]) -> None:
    """That all processes train on the same, which is not noticed otherwise: each computes its share of something else.

    Args:
        mine: what this process has read and was told, as name -> value or fingerprint.

    Raises:
        ValueError: in all processes, if one has anything else than the first.
    """
    if n_processes == 1:
        return
    first, *others = gather_object([dict(mine)])
    for rank, theirs in enumerate(others, start=1):
        if differing := [name for name in first if name in theirs and theirs[name] != first[name]]:
            shown = [f"{name} ({first[name]} in process 0, {theirs[name]} in process {rank})" for name in differing[:3]]
            raise ValueError(
                f"the processes do not train on the same; different: {', '.join(shown)}"
                f"{', …' if len(differing) > 3 else ''}. Start all of them with the same command and the same files"
            )


def raise_first(messages: list[str | None]) -> None:
    """
    Args:
        messages: of each process that failed.
    """
    for rank, message in enumerate(messages):
        if message is not None:
            raise FailedElsewhere(f"process {rank}: {message}")
