"""Finished records of several processes on disk, so that a killed run goes on where it was.

A folder holds `identity.json`, what the answers depend on except the records, and one `shard-*.jsonl` a process, to
which whole lines are appended and synced. A line that a kill has cut off is dropped, and a record is known by its id,
so any number of processes can go on. Each process reads all shards: none has to wait for another.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from perpo.data.record import ListRecord
from perpo.storage.identity import difference, image_identity
from perpo.storage.journal import LineFile, read_lines

SOURCE = ("image", "prompt", "answer", "task", "columns")  # fields that answers and rewards depend on


class StaleShardsError(ValueError):
    """The folder holds answers that were drawn or scored in another way."""


@dataclass(frozen=True)
class Finished:
    """One line: a record's answers and rewards, or why it has none."""

    id: str
    source: dict[str, str]  # hash of each field that they depend on
    responses: list[str] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    complete: list[bool] = field(default_factory=list)  # whether each answer has an end, and was not cut
    unreadable: int = 0  # answers that the reward could not read
    error: str | None = None

    def attach(self, record: ListRecord) -> ListRecord:
        """The record with these answers."""
        return record.answered(self.responses, self.rewards, self.complete)


class Shards(LineFile):
    """The lines of all processes, and this one's file, locked until `close`.

    Args:
        folder: made if missing.
        identity: name -> value of what the answers depend on.
        rank: this process' number.

    Raises:
        StaleShardsError: the folder was begun with another identity; the message says in what it differs.
        BlockingIOError: a process of this rank is still at work on the folder.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, str], rank: int = 0) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        different = difference(self.folder, identity)
        if different:
            raise StaleShardsError(
                f"{self.folder} holds answers that were made in another way; different: {different}. Go on with the "
                "same settings, name another output, or delete the folder to begin again"
            )
        super().__init__(self.folder / f"shard-{rank:05d}.jsonl")

    def read(self) -> dict[str, Finished]:
        """What all processes have finished, by id. Answers come before an error; of two answers the first shard's.

        Raises:
            ValueError: a line is JSON, but no finished record.
        """
        found: dict[str, Finished] = {}
        for file in sorted(self.folder.glob("shard-*.jsonl")):
            for place, row in read_lines(file, "its record is sampled again"):
                try:
                    one = Finished(**row)
                except TypeError as error:
                    raise ValueError(f"{place} is no finished record ({error}); delete that line") from error
                if one.id not in found or (found[one.id].error is not None and one.error is None):
                    found[one.id] = one
        return found

    def add(self, finished: Finished) -> None:
        """Keep one record, on disk when this returns; raises as `append`."""
        self.append(asdict(finished), what=f"record {finished.id!r}")


def source_of(record: ListRecord, image_root: str | os.PathLike[str] | None = None) -> dict[str, str]:
    """Short hashes of the fields that answers and rewards depend on; of an image, of what is in it."""
    image = image_identity(record.image, image_root)
    values = {name: getattr(record, name) for name in SOURCE} | {"image": image}
    return {
        name: hashlib.sha256(json.dumps(values[name], default=str, sort_keys=True).encode()).hexdigest()[:8]
        for name in SOURCE
    }


def check_sources(
    records: Collection[ListRecord],
    finished: Mapping[str, Finished],
    folder: Path,
    image_root: str | os.PathLike[str] | None = None,
) -> None:
    """That finished records were made of these.

    Raises:
        StaleShardsError: one was not; the message says which, and in which fields it differs.
    """
    for record in records:
        known = finished.get(record.id)
        if known is None or known.error is not None:
            continue
        now = source_of(record, image_root)
        different = [name for name in SOURCE if known.source.get(name) != now[name]]
        if different:
            raise StaleShardsError(
                f"record {record.id!r} has another {' and '.join(different)} than when its answers in {folder} were "
                "made; go on with the same records, name another output, or delete the folder to begin again"
            )
