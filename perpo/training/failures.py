"""What fails in one process of several ends them all, at once and with its message.

The others would wait in the next exchange for a process that is gone, until their launcher kills them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate.utils import gather_object

from perpo.data.read import reason_of


class FailedElsewhere(RuntimeError):
    """Another process could not go on; the message is that of its error."""


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
        made, error = [], failed
    parts = gather_object([(made, None if error is None else reason_of(error))])
    if error is not None:
        raise error
    raise_first([message for _, message in parts])
    return [one for part, _ in parts for one in part]


def raise_first(messages: list[str | None]) -> None:
    """
    Args:
        messages: of each process that failed.
    """
    for rank, message in enumerate(messages):
        if message is not None:
            raise FailedElsewhere(f"process {rank}: {message}")
