"""Reference log-probs computed once and kept on disk: append-only, resumable after a kill, refused when stale.

A folder holds `identity.json`, fingerprints of all that the numbers depend on except the records (weights, tokenizer,
chat template, image processor, limits, precision), and one journal `part-*.jsonl` a process with a line
{"key", "log_probs"} a record. The key is the fingerprint of what the numbers depend on in the record, so a changed
record is simply computed again.
"""

from __future__ import annotations

import dataclasses
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from perpo.data.fingerprints import record_fingerprint
from perpo.data.record import ListRecord
from perpo.storage.identity import claim
from perpo.storage.journal import Journal, read_journals

# Fields that the numbers depend on; `complete`, since a response that was cut has no end of turn.
SOURCE = ("image", "prompt", "responses", "complete")
_FILES = "part-*.jsonl"

Entry = tuple[str, "array[float]"]  # key and log-probs of one record


class ReferenceCache:
    """Σ_t log π_ref(y_t) of every response of every record seen so far.

    Args:
        folder: made if missing.
        identity: name -> fingerprint of what the numbers depend on (`weights_fingerprint`, `Encoder.fingerprint`, …).
        part: this process' number; each writes a journal of its own.
        image_root: the folder that the records' images are under, see `perpo.data.images.open_image`.

    Raises:
        StaleError: the folder was written for another identity; the message says in what it differs.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        identity: Mapping[str, str],
        part: int = 0,
        image_root: str | os.PathLike[str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.path = self.folder / f"part-{part:05d}.jsonl"
        self.image_root = image_root
        claim(self.folder, identity, setting="reference_cache_dir", contents="reference log-probs", pattern=_FILES)
        self._known: dict[str, array[float]] = {}
        for place, row in read_journals(sorted(self.folder.glob(_FILES)), "their records are computed again"):
            try:
                self._known[row["key"]] = array("d", row["log_probs"])
            except (KeyError, TypeError) as error:
                raise ValueError(f"{place} holds no reference log-probs ({error!r}); delete that line") from error

    def __contains__(self, record: ListRecord | str) -> bool:
        return self._key(record) in self._known

    def key(self, record: ListRecord) -> str:
        """What a record is known by here. Reads its image; the methods take the key for the record, to read it once."""
        return record_fingerprint(record, SOURCE, self.image_root)

    def add(self, record: ListRecord, log_probs: Sequence[float], key: str | None = None) -> Entry:
        """Keep the numbers of one record, on disk when this returns; raises as `Journal.append`."""
        entry = self._key(key or record), array("d", log_probs)
        with Journal(self.path, wait=True) as file:  # for a moment: another run may share the folder
            line = {"key": entry[0], "log_probs": entry[1].tolist()}
            file.append(line, what=f"the reference of record {record.id!r}")
        self.update([entry])
        return entry

    def entries(self, keys: Iterable[str]) -> list[Entry]:
        """What is known of some records, to be sent to other processes."""
        return [(key, self._known[key]) for key in keys if key in self._known]

    def update(self, entries: Iterable[Entry]) -> None:
        """Take over what another process has computed or read."""
        self._known |= dict(entries)

    def attach(self, record: ListRecord, key: str | None = None) -> ListRecord:
        """The record with its reference log-probs."""
        return dataclasses.replace(record, ref_log_probs=tuple(self._known[self._key(key or record)]))

    def _key(self, record: ListRecord | str) -> str:
        return record if isinstance(record, str) else self.key(record)
