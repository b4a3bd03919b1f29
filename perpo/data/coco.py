"""Grounding records from a COCO-style file: of its boxes (detection) or of sentences about them (referring).

    annotations   {"images": [{"id", "file_name", …}], "annotations": [{"id", "image_id", "category_id",
                   "bbox": [x, y, width, height] in pixels, "iscrowd"}], "categories": [{"id", "name"}]}
    refs          [{"ann_id", "sentences": [{"sent"} or text], "split"}], as RefCOCO has them (there in a pickle)

Boxes become fractions of the image as its file has it, turned upright.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perpo.data.documents import load_json
from perpo.data.images import ImageError, image_size
from perpo.data.record import ListRecord
from perpo.data.summary import summary
from perpo.storage.fingerprints import seed_from

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in fractions of the image


class AnnotationError(ValueError):
    """Something in the file cannot be used; says where."""


@dataclass
class Counts:
    """What was made of a file, and what was left out."""

    records: int = 0
    boxes: int = 0
    crowds: int = 0  # annotations of a crowd: an outline of many objects, not a box of one
    incomplete: int = 0  # questions with an object that has no box: a crowd, or a bad annotation
    crowded: int = 0  # questions with more than max_boxes boxes
    errors: list[str] = field(default_factory=list)

    def summary(self) -> str:
        return summary(
            f"{self.records} records with {self.boxes} boxes",
            (self.crowds, "crowd annotations skipped"),
            (self.incomplete, "questions left out, since not all their objects have a box"),
            (self.crowded, "questions with too many boxes left out"),
            (len(self.errors), "bad annotations or images skipped"),
        )


class CocoFile:
    """The file, indexed, and its images.

    Args:
        task: of the records, "grounding/qwen2.5-vl".
        skip_bad: leave out bad annotations and note them in `counts`, instead of an error.

    Raises:
        AnnotationError: it is not such a file, or two images or categories share an id.
    """

    def __init__(
        self, path: str | os.PathLike[str], images: str | os.PathLike[str], task: str, *, skip_bad: bool = False
    ) -> None:
        self.path, self.folder, self.task, self.skip_bad = Path(path), Path(images), task, skip_bad
        self.counts = Counts()
        content = load_json(self.path)
        if not isinstance(content, Mapping) or not isinstance(content.get("annotations"), list):
            raise AnnotationError(f"{self.path}: expected an object with images, annotations and categories")
        self.annotations: list[Any] = content["annotations"]
        self.images = self._indexed(content, "images", "file_name")
        self.categories = self._indexed(content, "categories", "name")
        self._sizes: dict[Any, tuple[int, int]] = {}

    def detection(self, prompt: str, max_boxes: int) -> Iterator[ListRecord]:
        """A record for every category in every image. Its answer is the list of the objects' boxes.

        Args:
            prompt: with {label} where the category's name goes.
        """
        boxes: dict[tuple[Any, Any], list[Box]] = defaultdict(list)
        incomplete: set[tuple[Any, Any] | None] = set()  # with an object that has no box: finding it would be wrong
        for annotation in self.annotations:
            key = None
            try:
                key = self._image_of(annotation)["id"], self._category_of(annotation)
                if annotation.get("iscrowd"):
                    self.counts.crowds += 1
                    incomplete.add(key)
                else:
                    box = self.box(annotation)
                    boxes[key].append(box)
            except AnnotationError as error:
                self._bad(error)
                incomplete.add(key)
        for (image, category), found in boxes.items():
            if (image, category) in incomplete:
                self.counts.incomplete += 1
            elif len(found) > max_boxes:
                self.counts.crowded += 1
            else:
                question = prompt.replace("{label}", self.categories[category]["name"])
                yield self._record(f"{image}-{category}", image, question, [list(box) for box in found])

    def referring(self, refs: Sequence[Any], prompt: str, split: str | None = None) -> Iterator[ListRecord]:
        """A record for every sentence; its answer is the one box. Of one split only, if one is named."""
        known: dict[Any, Mapping[str, Any]] = {}
        twice: set[Any] = set()
        for row in self.annotations:
            if isinstance(row, Mapping) and _is_id(row.get("id")):
                twice |= {row["id"]} & known.keys()
                known[row["id"]] = row
        for number, ref in enumerate(refs, 1):
            try:
                if not isinstance(ref, Mapping):
                    raise AnnotationError(f"ref {number}: expected an object, got {ref!r:.80}")
                if split is not None and ref.get("split") != split:
                    continue
                name = ref.get("ann_id")
                if not _is_id(name) or name not in known:
                    raise AnnotationError(f"ref {number}: no annotation has its ann_id {name!r:.80}")
                if name in twice:
                    raise AnnotationError(f"ref {number}: two annotations have its ann_id {name!r:.80}")
                annotation = known[name]
                image, box = self._image_of(annotation)["id"], self.box(annotation)
                sentences = _sentences(ref, number)
            except AnnotationError as error:
                self._bad(error)
                continue
            for i, sentence in enumerate(sentences):
                question = prompt.replace("{label}", sentence)
                yield self._record(f"ref-{ref.get('ref_id', number)}-{i}", image, question, list(box))

    def box(self, annotation: Mapping[str, Any]) -> Box:
        """The part of its box inside the image, in fractions of it."""
        width, height = self._size(self._image_of(annotation))
        bbox = annotation.get("bbox")
        if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
            raise self._wrong(annotation, f"bbox must be [x, y, width, height] in pixels, got {bbox!r:.80}")
        x, y, w, h = map(float, bbox)
        x1, x2 = (min(max(side / width, 0.0), 1.0) for side in (x, x + w))
        y1, y2 = (min(max(side / height, 0.0), 1.0) for side in (y, y + h))
        if not (w > 0 and h > 0 and x1 < x2 and y1 < y2):
            raise self._wrong(annotation, f"bbox {bbox} has no area inside the image of {width} × {height} pixels")
        return round(x1, 6), round(y1, 6), round(x2, 6), round(y2, 6)

    # ------------------------------------------------------------------------------------------------------- details

    def _record(self, name: str, image: Any, question: str, answer: list[Any]) -> ListRecord:
        self.counts.records += 1
        self.counts.boxes += len(answer) if isinstance(answer[0], list) else 1
        return ListRecord(name, self.images[image]["file_name"], question, answer, self.task)

    def _indexed(self, content: Mapping[str, Any], name: str, required: str) -> dict[Any, Mapping[str, Any]]:
        rows = content.get(name)
        if not isinstance(rows, list):
            raise AnnotationError(f"{self.path}: expected a list {name!r}, got {rows!r:.80}")
        found: dict[Any, Mapping[str, Any]] = {}
        for number, row in enumerate(rows, 1):
            whole = isinstance(row, Mapping) and _is_id(row.get("id"))
            if not whole or not isinstance(row.get(required), str):
                raise AnnotationError(f"{self.path}: {name} {number} needs id and {required}, got {row!r:.120}")
            if row["id"] in found:
                raise AnnotationError(
                    f"{self.path}: two {name} have the id {row['id']!r}: {found[row['id']][required]!r} and "
                    f"{row[required]!r}; an annotation could mean either. Give each its own id"
                )
            found[row["id"]] = row
        return found

    def _image_of(self, annotation: Any) -> Mapping[str, Any]:
        if not isinstance(annotation, Mapping):
            raise AnnotationError(f"{self.path}: an annotation must be an object, got {annotation!r:.80}")
        image = annotation.get("image_id")
        if not _is_id(image) or image not in self.images:
            raise self._wrong(annotation, f"no image has its image_id {image!r:.80}")
        return self.images[image]

    def _category_of(self, annotation: Mapping[str, Any]) -> Any:
        category = annotation.get("category_id")
        if not _is_id(category) or category not in self.categories:
            raise self._wrong(annotation, f"no category has its category_id {category!r:.80}")
        return category

    def _size(self, image: Mapping[str, Any]) -> tuple[int, int]:
        """(width, height) of the image as training will see it. It must equal the size in the file, if there is one."""
        if image["id"] not in self._sizes:
            try:
                self._sizes[image["id"]] = image_size(image["file_name"], self.folder)
            except ImageError as error:
                raise AnnotationError(f"{self.path}: image {image['id']}: {error}") from error
        size, said = self._sizes[image["id"]], (image.get("width"), image.get("height"))
        if None not in said and size != said:
            raise AnnotationError(
                f"{self.path}: image {image['id']}: {image['file_name']} has {size[0]} × {size[1]} pixels (turned "
                f"upright, if its EXIF says so), but was annotated as {said[0]} × {said[1]}"
            )
        return size

    def _wrong(self, annotation: Mapping[str, Any], reason: str) -> AnnotationError:
        return AnnotationError(f"{self.path}: annotation {annotation.get('id')!r}: {reason}")

    def _bad(self, error: AnnotationError) -> None:
        if not self.skip_bad:
            raise AnnotationError(f"{error}\n--skip_bad leaves out such annotations and counts them") from error
        self.counts.errors.append(str(error))


def divide(records: Sequence[ListRecord], share: float) -> tuple[list[ListRecord], list[ListRecord]]:
    """Records for training and held-out records; the side of an image does not depend on the other images."""

    def held_out(record: ListRecord) -> bool:
        return seed_from(str(record.image)) < share * 2**64

    parts: tuple[list[ListRecord], list[ListRecord]] = [], []
    for record in records:
        parts[held_out(record)].append(record)
    return parts


def _sentences(ref: Mapping[str, Any], number: int) -> list[str]:
    given = ref.get("sentences")
    if not isinstance(given, list) or not given:
        raise AnnotationError(
            f'ref {number}: sentences must be a list of texts or of {{"sent": text}}, got {given!r:.80} '
            f"(ref_id {ref.get('ref_id')!r}, ann_id {ref.get('ann_id')!r})"
        )
    texts = [one.get("sent", one.get("raw")) if isinstance(one, Mapping) else one for one in given]
    for text, sentence in zip(texts, given, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise AnnotationError(
                f"ref {number}: a sentence must be a text or hold one as 'sent', got {sentence!r:.80}"
            )
    return [text.strip() for text in texts]


def _is_number(value: Any) -> bool:
    """A finite number; an integer beyond the range of floats is not."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)
