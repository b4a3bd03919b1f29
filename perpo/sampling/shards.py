"""Finished records of several processes on disk, so that a killed run resumes where it was.

A folder holds `identity.json`, what the answers depend on except the records, and one journal `shard-*.jsonl` a
process. A record is known by its id, so any number of processes can resume. Each process reads all shards: none has to
wait for another.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from perpo.data.fingerprints import field_fingerprints
from perpo.data.record import ListRecord
from perpo.storage.identity import claim, stale
from perpo.storage.journal import Journal, read_journals

SOURCE = ("image", "prompt", "answer", "task", "columns")  # fields that answers and rewards depend on
_FILES = "shard-*.jsonl"


@dataclass(frozen=True)
class Finished:
    """One line: a record's answers and rewards, or why it has none."""

    id: str
    source: dict[str, str]  # fingerprint of each field that they depend on
    responses: list[str] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    complete: list[bool] = field(default_factory=list)  # whether each answer has an end, and was not cut
    unreadable: int = 0  # answers that the reward could not read
    error: str | None = None

    def attach(self, record: ListRecord) -> ListRecord:
        """The record with these answers."""
        return record.answered(self.responses, self.rewards, self.complete)


class Shards(Journal):
    """The finished records of all processes, and this one's journal, locked until `close`.

    Args:
        folder: made if missing.
        identity: name -> value of what the answers depend on.
        rank: this process' number.

    Raises:
        StaleError: the folder was begun with another identity; the message says in what it differs.
        BlockingIOError: a process of this rank is still at work on the folder.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, str], rank: int = 0) -> None:
        self.folder = Path(folder)
        claim(self.folder, identity, setting="output", contents="answers", pattern=_FILES)
        super().__init__(self.folder / f"shard-{rank:05d}.jsonl")

    def read(self) -> dict[str, Finished]:
        """What all processes have finished, by id. Answers come before an error; of two answers the first shard's.

        Raises:
            ValueError: a line is whole, but no finished record.
        """
        found: dict[str, Finished] = {}
        for place, row in read_journals(sorted(self.folder.glob(_FILES)), "their records are sampled again"):
            try:
                one = Finished(**row)
            except TypeError as error:
                raise ValueError(f"{place} is no finished record ({error}); delete that line") from error
            if one.id not in found or (found[one.id].error is not None and one.error is None):
                found[one.id] = one
        return found

    def add(self, finished: Finished) -> None:
        """Keep one record, on disk when this returns; raises as `append`."""
        self.append(vars(finished), what=f"record {finished.id!r}")


def source_of(
    record: ListRecord, image_root: str | os.PathLike[str] | None = None, names: Sequence[str] = SOURCE
) -> dict[str, str]:
    """Fingerprints of the fields that answers and rewards depend on."""
    return field_fingerprints(record, names, image_root)


def check_sources(
    records: Collection[ListRecord],
    finished: Mapping[str, Finished],
    folder: Path,
    image_root: str | os.PathLike[str] | None = None,
    names: Sequence[str] = SOURCE,
) -> None:
    """That finished records were made of these.

    Raises:
        StaleError: one was not; the message says which, and in which fields it differs.
    """
    for record in records:
        known = finished.get(record.id)
        if known is None or known.error is not None:
            continue
        now = source_of(record, image_root, names)
        different = [name for name in names if known.source.get(name) != now[name]]
        if different:
            raise stale(folder, "output", "answers", f"record {record.id!r} has another {' and '.join(different)} now")
