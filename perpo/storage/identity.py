"""What numbers kept on disk depend on: the settings they were made with, and the pictures they were made of."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from perpo.data.files import atomic_file
from perpo.data.images import ImageError, RowImage, resolve_image

IDENTITY = "identity.json"
WHOLE = 1 << 20  # bytes: larger pictures are known by their size and by as much from their two ends


def known_identity(folder: Path) -> dict[str, str]:
    """What a folder's contents depend on; empty if there is no such folder."""
    file = folder / IDENTITY
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def difference(folder: Path, identity: Mapping[str, str]) -> str:
    """In what a folder's contents differ from what would be written into it now, for people; "" if in nothing.

    A new folder takes this identity, as `identity.json`.

    Args:
        identity: name -> value or hash of what the contents depend on.
    """
    file = folder / IDENTITY
    if not file.exists():
        with atomic_file(file) as out:
            out.write(json.dumps(dict(identity), indent=1).encode())
    there = known_identity(folder)  # of several processes, the last one's
    return ", ".join(
        f"{name} ({there.get(name, 'none')} there, {identity.get(name, 'none')} now)"
        for name in sorted({*there, *identity})
        if there.get(name) != identity.get(name)
    )


def image_identity(image: Any, root: str | os.PathLike[str] | None = None) -> list[Any]:
    """What tells a picture from another without decoding it: its encoded bytes, wherever they are kept.

    Neither path nor time of change is part of it, so that a data set may be copied and moved; a picture that was
    replaced by one of the same size is another. Of a file of more than a MiB only the two ends are read, half a MiB
    each: a change between them that keeps the size goes unnoticed (uncompressed formats allow one).

    Args:
        root: the folder that paths are under, see `perpo.data.images.open_image`.
    """
    if isinstance(image, RowImage):
        image = image.load()
    if isinstance(image, Mapping):
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if image is None:
        return []
    if isinstance(image, bytes):
        return _content(len(image), image[: WHOLE // 2], image[max(WHOLE // 2, len(image) - WHOLE // 2) :])
    if isinstance(image, Image.Image):
        return [image.mode, image.size, hashlib.sha256(image.tobytes()).hexdigest()]
    try:
        with resolve_image(image, root).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(WHOLE // 2)
            file.seek(max(WHOLE // 2, size - WHOLE // 2))
            return _content(size, head, file.read())
    except (ImageError, OSError):  # whoever opens it will say what is wrong
        return ["unreadable", os.fspath(image)]


def _content(size: int, head: bytes, tail: bytes) -> list[Any]:
    return [size, hashlib.sha256(head + tail).hexdigest()]
