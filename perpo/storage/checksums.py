"""The files of a folder as they were written, in `checksums.json`, so that damage is noticed and named by file.

{"adapter_model.safetensors": {"bytes": 40016, "sha256": "0f3a…"}, …}
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from perpo.storage.atomic import atomic_file, sync_folder
from perpo.storage.fingerprints import file_fingerprint
from perpo.storage.identity import DamagedError

CHECKSUMS = "checksums.json"
WEIGHTS = ("*.safetensors", "*.bin")
_THREADS = 8


def write_checksums(folder: Path, files: Iterable[Path]) -> None:
    """Keep size and hash of files in a folder; they are on the disk, and their names, when this returns."""
    with ThreadPoolExecutor(_THREADS) as pool:
        found = dict(pool.map(lambda file: (file.relative_to(folder).as_posix(), _kept(file)), sorted(files)))
    for parent in {(folder / name).parent for name in found}:
        sync_folder(parent)
    with atomic_file(folder / CHECKSUMS) as out:
        out.write(json.dumps(found, indent=1).encode())


def files_of(folder: Path) -> list[Path]:
    """All files of a folder and its folders that `write_checksums` may keep."""
    return [file for file in folder.rglob("*") if file.is_file() and file.name != CHECKSUMS]


def weights_of(folder: Path) -> list[Path]:
    """The weights in a folder of a model or adapter."""
    return [file for pattern in WEIGHTS for file in folder.glob(pattern) if file.is_file()]


def damage(folder: Path, patterns: Sequence[str] = ("*",)) -> list[str] | None:
    """What is wrong with the files of these names in a folder, each by name; None without `checksums.json`."""
    manifest = folder / CHECKSUMS
    if not manifest.exists():
        return None
    try:
        listed = json.loads(manifest.read_bytes()).items()
        known = {name: (int(kept["bytes"]), str(kept["sha256"])) for name, kept in listed if _fits(name, patterns)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{manifest} is damaged ({type(error).__name__}: {error})"]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _difference(folder / name, *known[name]), known)
    return [problem for problem in found if problem]


def check_weights(folder: str | os.PathLike[str]) -> None:
    """That the weights in a folder of a model or adapter are whole, as far as can be seen; a name on the hub is passed.

    Raises:
        DamagedError: a file is cut off, or not what `write_checksums` has seen; the message names it.
    """
    folder = Path(folder)
    problems = damage(folder, WEIGHTS)
    if problems is None:
        problems = [problem for file in weights_of(folder) if (problem := cut_off(file))]
    if problems:
        raise DamagedError(
            f"{'; '.join(problems)}. Copy or save the model again; if the file was changed on purpose, delete "
            f"{folder / CHECKSUMS}"
        )


def cut_off(file: Path) -> str | None:
    """Why a safetensors file cannot be whole, by header and size; None if nothing is wrong, or of another kind."""
    if file.suffix != ".safetensors":
        return None
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            header = int.from_bytes(opened.read(8), "little")
            described = json.loads(opened.read(min(header, size)))
        ends = [tensor["data_offsets"][1] for name, tensor in described.items() if name != "__metadata__"]
        expected = 8 + header + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return f"{file} is damaged: its header cannot be read"
    return None if size == expected else f"{file} is damaged: {size} bytes, and its header says {expected}"


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _kept(file: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError), file.open("rb") as opened:  # not every file system can
        os.fsync(opened.fileno())
    return {"bytes": file.stat().st_size, "sha256": file_fingerprint(file)}


def _difference(file: Path, size: int, fingerprint: str) -> str | None:
    if not file.is_file():
        return f"{file} is missing"
    if (now := file.stat().st_size) != size:
        return f"{file} is damaged: {now} bytes, and {size} were written"
    return None if file_fingerprint(file) == fingerprint else f"{file} is damaged: its checksum differs"
