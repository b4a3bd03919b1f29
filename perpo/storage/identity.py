"""What a folder's contents were made from, kept beside them as `identity.json`: name -> value or fingerprint.

A run takes a folder (`claim`) before it reads or writes there. A folder that was made from something else is refused
with the names and values that differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from perpo.storage.atomic import atomic_file
from perpo.storage.lock import Lock

IDENTITY = "identity.json"
FORMAT = {"storage format": "2"}  # of journals and fingerprints; part of every identity


class StaleError(ValueError):
    """What lies there was made from something else than this run would make it from."""


class DamagedError(ValueError):
    """A file is not what was written."""


def claim(folder: Path, identity: Mapping[str, str], *, setting: str, contents: str, pattern: str) -> None:
    """Take a folder for contents of this identity; a new one (made if missing) keeps it as `identity.json`.

    Args:
        identity: name -> value or fingerprint of what the contents depend on.
        setting: that names the folder, for an error.
        contents: what the folder holds, for an error: "answers".
        pattern: of the files that are its contents, for `Path.glob`.

    Raises:
        StaleError: it holds contents of another identity, or of none.
        DamagedError: its `identity.json` cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / IDENTITY).exists():  # else no lock: a finished folder may be read-only
        with Lock(folder / f".{IDENTITY}.lock", str(folder), wait=True):
            if not (folder / IDENTITY).exists():
                if any(folder.glob(pattern)):
                    raise stale(folder, setting, contents, f"it has no {IDENTITY}, which says what they were made from")
                write_identity(folder, identity)
    check(folder, identity, setting=setting, contents=contents)


def check(folder: Path, identity: Mapping[str, str], *, setting: str, contents: str) -> None:
    """That a folder's contents are of this identity; raises as `claim`."""
    there, now = known_identity(folder), {**FORMAT, **identity}
    different = {name: there.get(name, "none") for name in sorted({*there, *now}) if there.get(name) != now.get(name)}
    if old := different.keys() & FORMAT.keys():  # then all fingerprints differ
        different = {name: different[name] for name in old}
    if different:
        named = (f"{name} ({value} there, {now.get(name, 'none')} now)" for name, value in different.items())
        raise stale(folder, setting, contents, f"different: {', '.join(named)}")


def stale(folder: Path, setting: str, contents: str, reason: str) -> StaleError:
    """The one wording: what lies where, how it differs, what to do."""
    return StaleError(
        f"{setting}: {folder} holds {contents} that this run cannot take as its own; {reason}. Use the settings, model "
        f"and data that they were made with, name another {setting}, or delete the folder to start again"
    )


def known_identity(folder: Path) -> dict[str, str]:
    """What a folder's contents were made from; empty if it does not say.

    Raises:
        DamagedError: its `identity.json` is no mapping of names to texts.
    """
    file = folder / IDENTITY
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_bytes())
        if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
            raise ValueError("expected a mapping of names to texts")
    except (ValueError, RecursionError) as error:
        raise DamagedError(
            f"{file} is damaged ({error}), so nothing says what is in the folder. Delete the folder to start again, or "
            "name another one"
        ) from error
    return found


def write_identity(folder: Path, identity: Mapping[str, str]) -> None:
    with atomic_file(folder / IDENTITY) as out:
        out.write(json.dumps({**FORMAT, **identity}, indent=1).encode())
