"""Answers that models have given, kept in a journal as they are made, so that a killed run resumes.

A line is one record's answers under one condition of one model:

    {"model": "5f…", "condition": "greedy/temperature=0.0/…", "record": "r7", "content": "0a…", "texts": […], …}

`model` is a fingerprint of weights, processor and all else that decides a model's answers, `content` one of image and
question. So what has changed is asked again; a changed ground truth changes no answer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from perpo.storage.journal import Journal, read_journals


class Key(NamedTuple):
    model: str
    condition: str
    record: str
    content: str


class Answers(NamedTuple):
    texts: tuple[str, ...]
    image_size: tuple[int, int] | None  # (width, height) as the model's box format may need it
    n_cut: int = 0  # answers that had not ended after max_new_tokens


class AnswerStore(Journal):
    """The answers in a file, which is made if missing; use it as a context manager.

    Raises:
        ValueError: a line is whole, but no answer.
        BlockingIOError: another run is writing to it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        try:
            lines = read_journals([self.path], "their questions are asked again")
            self._known = dict(_entry(place, row) for place, row in lines)
        except BaseException:
            self.close()
            raise

    def __contains__(self, key: Key) -> bool:
        return key in self._known

    def __getitem__(self, key: Key) -> Answers:
        return self._known[key]

    def __len__(self) -> int:
        return len(self._known)

    def add(self, entries: Iterable[tuple[Key, Answers]]) -> None:
        """Keep these answers, on disk when this returns; raises as `append`."""
        new = dict(entries)
        asked = ", ".join(repr(key.record) for key in new)
        rows = (key._asdict() | answers._asdict() for key, answers in new.items())
        self.append(*rows, what=f"what was answered to {asked:.200}")
        self._known |= new


def _entry(place: str, row: Any) -> tuple[Key, Answers]:
    try:
        key = Key(row["model"], row["condition"], row["record"], row["content"])
        size = row["image_size"]
        return key, Answers(tuple(row["texts"]), None if size is None else (size[0], size[1]), row["n_cut"])
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"output: {place} is no answer of a model ({type(error).__name__}: {error}); delete that line, or name "
            "another folder"
        ) from error
