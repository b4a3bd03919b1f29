"""Several calls at once, each in a thread, their results in the order in which they are finished."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

Given = TypeVar("Given")
Got = TypeVar("Got")


class InFlight(Generic[Given, Got]):
    """At most `n` calls of a function at once; with n = 1 in the caller's own thread, one after another.

    The threads are daemons: Ctrl-C ends the program at once, and does not wait for calls that wait for a server.
    (`concurrent.futures` joins its threads at exit.)
    """

    def __init__(self, function: Callable[[Given], Got], n: int) -> None:
        self._function = function
        self._n = n
        self._done: SimpleQueue[tuple[Got | None, BaseException | None]] = SimpleQueue()
        self.pending = 0

    @property
    def has_room(self) -> bool:
        return self.pending < self._n

    def begin(self, given: Given) -> None:
        self.pending += 1
        if self._n == 1:
            self._call(given)
        else:
            threading.Thread(target=self._call, args=(given,), daemon=True).start()

    def result(self) -> Got:
        """Of the call that ends next; raises what it raised."""
        got, error = self._done.get()
        self.pending -= 1
        if error is not None:
            raise error
        return got  # type: ignore[return-value]  # without an error there is one

    def _call(self, given: Given) -> None:
        try:
            self._done.put((self._function(given), None))
        except BaseException as error:
            self._done.put((None, error))
