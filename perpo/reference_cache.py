"""Reference log-probs computed once and kept on disk: append-only, resumable after a kill, refused when stale.

A folder holds `identity.json`, hashes of all that the numbers depend on except the records (weights, tokenizer, chat
template, image processor, limits, precision), and one `part-*.jsonl` a process with a line {"key", "log_probs"} a
record. The key is a hash of the record's image, prompt and responses, so a changed record is simply computed again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from perpo.data import ListRecord
from perpo.images import RowImage
from perpo.record_files import atomic_file

IDENTITY = "identity.json"
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

    Raises:
        StaleCacheError: the folder was written for another identity; the message says in what it differs.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, str], part: int = 0) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / f"part-{part:05d}.jsonl"
        self._check_identity(dict(identity))
        self._known: dict[str, tuple[float, ...]] = {}
        for file in sorted(self.folder.glob("part-*.jsonl")):
            self._known |= dict(_read_part(file))
        _drop_torn_line(self.path)

    def __contains__(self, record: ListRecord) -> bool:
        return record_key(record) in self._known

    def add(self, record: ListRecord, log_probs: Sequence[float]) -> Entry:
        """Keep the numbers of one record, on disk when this returns."""
        entry = record_key(record), tuple(float(x) for x in log_probs)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": entry[0], "log_probs": entry[1]}) + "\n")
        self.update([entry])
        return entry

    def entries(self, records: Iterable[ListRecord]) -> list[Entry]:
        """What is known of some records, to be sent to other processes."""
        return [(key, self._known[key]) for key in map(record_key, records) if key in self._known]

    def update(self, entries: Iterable[Entry]) -> None:
        """Take in what other processes computed."""
        self._known |= dict(entries)

    def attach(self, record: ListRecord) -> ListRecord:
        """The record with its reference log-probs."""
        return dataclasses.replace(record, ref_log_probs=self._known[record_key(record)])

    def _check_identity(self, identity: dict[str, str]) -> None:
        file = self.folder / IDENTITY
        if not file.exists():
            with atomic_file(file) as out:
                out.write(json.dumps(identity, indent=1).encode())
            return
        cached = json.loads(file.read_text(encoding="utf-8"))
        names = sorted(set(cached) | set(identity))
        different = [
            f"{name} ({cached.get(name, 'none')} there, {identity.get(name, 'none')} now)"
            for name in names
            if cached.get(name) != identity.get(name)
        ]
        if different:
            raise StaleCacheError(
                f"reference_cache_dir: {self.folder} holds log-probs of another reference; different: "
                f"{', '.join(different)}. Delete the folder to compute them again, or name another one"
            )


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


def record_key(record: ListRecord) -> str:
    """Hash of what a record's reference log-probs depend on."""
    text = json.dumps([_image_identity(record.image), record.prompt, record.responses], default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _image_identity(image: Any) -> list[Any]:
    """Without decoding it: a file by path and size, what is in memory by its bytes."""
    if isinstance(image, Mapping):
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if image is None:
        return []
    if isinstance(image, bytes):
        return [hashlib.sha256(image).hexdigest()]
    if isinstance(image, Image.Image):
        return [image.mode, image.size, hashlib.sha256(image.tobytes()).hexdigest()]
    if isinstance(image, RowImage):
        return [str(getattr(image.dataset, "_fingerprint", "")), image.row, image.column]
    path = os.fspath(image)
    return [path, os.path.getsize(path) if os.path.isfile(path) else -1]


def _read_part(file: Path) -> Iterable[Entry]:
    for line in file.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):  # the last line of a killed process may be cut
            entry = json.loads(line)
            yield entry["key"], tuple(entry["log_probs"])


def _drop_torn_line(file: Path) -> None:
    if file.exists():
        with file.open("rb+") as stream:
            stream.truncate(stream.read().rfind(b"\n") + 1)
