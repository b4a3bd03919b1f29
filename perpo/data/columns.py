"""How the columns of a row map to the fields of a record, which column is the image, and what else is kept.

The records of PerPO's authors (image_id, image_path, question, answer, answers_gen, iou_scores) are read as they are.
The image is taken from `image`, from a list of one image in `images` (the column of TRL, EasyR1 and LLaMA-Factory), or
from `image_path`.
"""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

from perpo.data.images import RowImage
from perpo.data.record import FieldError, ListRecord, plain, shown

FIELDS = tuple(one.name for one in fields(ListRecord))
OURS = {name: name for name in FIELDS}
# Our name of a field -> the authors'. Their records are grounding, which they do not say.
AUTHORS = {
    "id": "image_id",
    "image": "image_path",
    "prompt": "question",
    "answer": "answer",
    "responses": "answers_gen",
    "rewards": "iou_scores",
}
PICTURE = ("image", "images", "image_path")
LIKE_PICTURE = ("image", "images", "image_path", "img", "picture", "photo")


@dataclass
class Seen:
    """Columns that are not fields of a record, with the number of rows that have them."""

    further: Counter[str] = field(default_factory=Counter)  # kept: custom rewards can use them
    ignored: Counter[str] = field(default_factory=Counter)  # dropped: JSON cannot hold them
    preferences: Counter[str] = field(default_factory=Counter)  # whose form -> rows that were read as lists of two
    like_picture: Counter[str] = field(default_factory=Counter)  # in rows without an image: perhaps it is one, misspelt


def names_of(row: Mapping[str, Any]) -> dict[str, str]:
    """Our name of each field -> its name in this row."""
    if "answers_gen" in row or {"question", "image_path"} <= row.keys():
        return AUTHORS
    column = next((name for name in PICTURE if not _empty(row.get(name))), "image")
    return OURS if column == "image" else OURS | {"image": column}


def picture(row: Mapping[str, Any], column: str) -> Any:
    """The image in this column.

    Raises:
        FieldError: one of the image columns holds several images.
    """
    for name in PICTURE:
        value = row.get(name)
        if isinstance(value, list | tuple) and len(value) > 1:
            raise FieldError(
                name,
                f"holds {len(value)} images, but a record has one: join them into one image, or make a record of each",
            )
    value = row.get(column)
    if isinstance(value, list | tuple):
        return value[0] if value else None
    return value


def further(row: Mapping[str, Any], names: Collection[str], seen: Seen) -> dict[str, Any]:
    """The columns of a row that are not fields of a record: beside the fields, or gathered in `columns`."""
    gathered = row.get("columns") or {}
    if not isinstance(gathered, Mapping):
        raise FieldError("columns", f"must be a mapping by name, got {shown(gathered)}")
    found = {}
    beside = [(name, value) for name, value in row.items() if name not in names and name != "columns"]
    for name, value in [*gathered.items(), *beside]:
        if value is None or (name in PICTURE and _empty(value)):
            continue
        kept = plain(value)
        if not _fits_json(kept):
            seen.ignored[name] += 1
        else:
            found[name] = kept
            seen.further[name] += 1
    return found


def note_picture_like(row: Mapping[str, Any], names: Collection[str], seen: Seen) -> None:
    """Count the columns of a row without an image whose names resemble those of images."""
    for name, value in row.items():
        if name not in names and isinstance(value, str | bytes | Mapping | list | RowImage) and _like_picture(name):
            seen.like_picture[name] += 1


@cache
def _like_picture(name: Any) -> bool:
    plain_name = str(name).lower()
    return plain_name.startswith(("image", "img", "pic", "photo")) or bool(
        difflib.get_close_matches(plain_name, LIKE_PICTURE, 1, 0.75)
    )


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, list | tuple) and not any(one is not None for one in value))


def _fits_json(value: Any) -> bool:
    kind = type(value)
    if kind is str or kind is int or kind is bool:
        return True
    if kind is float:
        return math.isfinite(value)
    if isinstance(value, RowImage):
        return False
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
