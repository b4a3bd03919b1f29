"""Reference log-probs computed once and kept on disk: append-only, resumable after a kill, refused when stale.

A folder holds `identity.json`, hashes of all that the numbers depend on except the records (weights, tokenizer, chat
template, image processor, limits, precision), and one `part-*.jsonl` a process with a line {"key", "log_probs"} a
record. The key is a hash of the record's image (of what is in it, see `perpo.storage.identity`), prompt and responses,
so a changed record is simply computed again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from perpo.data.record import ListRecord
from perpo.encoding.corruption import CorruptedRecord
from perpo.storage.identity import difference, image_identity
from perpo.storage.journal import LineFile, read_lines

SAMPLES = 256  # elements of each parameter that enter the fingerprint

Entry = tuple[str, tuple[float, ...]]  # key and log-probs of one record


class StaleCacheError(ValueError):
    """The folder holds numbers of another reference."""


class ReferenceCache:
    """Σ_t log π_ref(y_t) of every response of every record seen so far.

    Args:
        folder: made if missing.
        identity: name -> hash of what the numbers depend on (`weights_fingerprint`, `Encoder.fingerprint`, …).
        part: this process' number; each writes a file of its own.
        image_root: the folder that the records' images are under, see `perpo.data.images.open_image`.

    Raises:
        StaleCacheError: the folder was written for another identity; the message says in what it differs.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        identity: Mapping[str, str],
        part: int = 0,
        image_root: str | os.PathLike[str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f"part-{part:05d}.jsonl"
        self.image_root = image_root
        different = difference(self.folder, identity)
        if different:
            raise StaleCacheError(
                f"reference_cache_dir: {self.folder} holds log-probs of another reference; different: {different}. "
                "Delete the folder to compute them again, or name another one"
            )
        self._keys: dict[int, tuple[ListRecord, str]] = {}  # by identity: a picture is read once
        self._known: dict[str, tuple[float, ...]] = {}
        for file in sorted(self.folder.glob("part-*.jsonl")):
            for _, row in read_lines(file, "its record is computed again"):
                self._known[row["key"]] = tuple(row["log_probs"])

    def __contains__(self, record: ListRecord) -> bool:
        return self._key(record) in self._known

    def add(self, record: ListRecord, log_probs: Sequence[float]) -> Entry:
        """Keep the numbers of one record, on disk when this returns; raises as `LineFile.append`."""
        entry = self._key(record), tuple(float(x) for x in log_probs)
        with LineFile(self.path, wait=True) as file:  # for a moment: another run may share the folder
            file.append({"key": entry[0], "log_probs": entry[1]}, what=f"the reference of record {record.id!r}")
        self.update([entry])
        return entry

    def entries(self, records: Iterable[ListRecord]) -> list[Entry]:
        """What is known of some records, to be sent to other processes."""
        return [(key, self._known[key]) for key in map(self._key, records) if key in self._known]

    def update(self, entries: Iterable[Entry]) -> None:
        """Take over what another process has computed or read."""
        self._known |= dict(entries)

    def attach(self, record: ListRecord) -> ListRecord:
        """The record with its reference log-probs."""
        return dataclasses.replace(record, ref_log_probs=self._known[self._key(record)])

    def _key(self, record: ListRecord) -> str:
        found = self._keys.get(id(record))
        if found is None:
            found = self._keys[id(record)] = record, record_key(record, self.image_root)
        return found[1]


def weights_fingerprint(model: nn.Module) -> str:
    """Hash of the names, shapes, types and evenly spaced elements of all parameters that are no adapter's.

    Reads a few hundred numbers a parameter, so it takes no time; training changes far too many elements to hide.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    sampled: dict[torch.dtype, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        if "lora_" in name or "modules_to_save." in name:
            continue
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        flat = parameter.detach().reshape(-1)
        sampled.setdefault(parameter.dtype, []).append(flat[:: max(1, flat.numel() // SAMPLES)])
    for parts in sampled.values():  # one copy from the device for each type
        digest.update(torch.cat(parts).double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def record_key(record: ListRecord, image_root: str | os.PathLike[str] | None = None) -> str:
    """Hash of what a record's reference log-probs depend on."""
    image = image_identity(record.image, image_root)
    if isinstance(record, CorruptedRecord):
        image = [*image, record.corruption, record.seed]
    ends = [] if record.complete is None else [record.complete]  # a cut response has no end of turn
    text = json.dumps([image, record.prompt, record.responses, *ends], default=str)
    return hashlib.sha256(text.encode()).hexdigest()
