"""Fingerprints of records and images: what tells one from another, wherever it is kept."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

from PIL import Image

from perpo.data.images import ImageError, RowImage, orientation, resolve_image
from perpo.data.record import ListRecord
from perpo.storage.fingerprints import bytes_fingerprint, fingerprint

WHOLE = 1 << 20  # bytes: of larger images only the size and this much of the two ends is read

_FIELDS = {field.name for field in dataclasses.fields(ListRecord)}


def field_fingerprints(
    record: ListRecord, names: Iterable[str], image_root: str | os.PathLike[str] | None = None
) -> dict[str, str]:
    """Name -> fingerprint of some fields of a record; of the image, of what is in it."""
    return {name: fingerprint(_value(record, name, image_root)) for name in names}


def record_fingerprint(
    record: ListRecord, names: Iterable[str], image_root: str | os.PathLike[str] | None = None
) -> str:
    """Of some fields of a record together, and of all that a subclass adds (a corrupted image has its seed there)."""
    added = [field.name for field in dataclasses.fields(record) if field.name not in _FIELDS]
    return fingerprint([_value(record, name, image_root) for name in (*names, *added)])


def image_fingerprint(image: Any, root: str | os.PathLike[str] | None = None) -> str:
    """What tells an image from another without decoding it: its encoded bytes, wherever they are kept.

    Neither path nor time of change is part of it, so that a data set may be copied and moved; an image that was
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
        return "none"
    if isinstance(image, bytes):
        return _ends(len(image), image[: WHOLE // 2], image[max(WHOLE // 2, len(image) - WHOLE // 2) :])
    if isinstance(image, Image.Image):
        colours: tuple[Any, ...] = image.getpalette(), image.info.get("transparency")  # what bytes of a palette mean
        if image.palette is not None and image.palette.mode != "RGB":
            colours += image.palette.mode, image.getpalette(None)  # with its alpha
        if (turned := orientation(image)) != 1:
            colours += ("turned", turned)
        return bytes_fingerprint(f"{image.mode} {image.size} {colours} ".encode(), image.tobytes())
    try:
        with resolve_image(image, root).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(WHOLE // 2)
            file.seek(max(WHOLE // 2, size - WHOLE // 2))
            return _ends(size, head, file.read())
    except (ImageError, OSError):  # whoever opens it will say what is wrong
        return f"unreadable {os.fspath(image)}"


def _value(record: ListRecord, name: str, image_root: str | os.PathLike[str] | None) -> Any:
    return image_fingerprint(record.image, image_root) if name == "image" else getattr(record, name)


def _ends(size: int, head: bytes, tail: bytes) -> str:
    return bytes_fingerprint(f"{size} ".encode(), head, tail)
