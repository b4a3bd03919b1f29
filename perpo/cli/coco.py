"""`perpo coco`: from a COCO-style file (detection or referring expressions) to grounding records.

perpo coco --annotations instances.json --images images/ --format qwen2.5-vl --output train.jsonl --held-out test.jsonl

    annotations   {"images": [{"id", "file_name", …}], "annotations": [{"id", "image_id", "category_id",
                   "bbox": [x, y, width, height] in pixels, "iscrowd"}], "categories": [{"id", "name"}]}
    refs          [{"ann_id", "sentences": [{"sent"} or text], "split"}], as RefCOCO has them (there in a pickle)

Without refs, a record asks for every object of one category in one image, and its answer is the list of their boxes:
the reward matches them with the boxes of a response one to one. With refs, a record asks for the one object that a
sentence describes. Boxes become fractions of the image as its file has it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from perpo.data.images import ImageError, resolve_image
from perpo.data.record import ListRecord, write_records
from perpo.rewards.formats import FORMATS, Box, box_format

# What a family was taught to answer with boxes: asked for one object, and for all of a kind.
_JSON = (
    "Locate {label}, output its bbox coordinates using JSON format.",
    "Locate every {label} in the image, output all bbox coordinates in JSON format.",
)
_SENTENCE = (
    "Please provide the bounding box coordinate of the region this sentence describes: {label}",
    "Please provide the bounding box coordinates of every {label} in the image.",
)
_DETECT = ("detect {label}", "detect {label}")
PROMPTS = {"llava": _SENTENCE, "llava-pad": _SENTENCE, "qwen2.5-vl": _JSON, "qwen3-vl": _JSON, "paligemma": _DETECT}
SHOWN_ERRORS = 20


class AnnotationError(ValueError):
    """Something in the file that cannot be used; says where."""


@dataclass
class Counts:
    """What became of a file."""

    records: int = 0
    boxes: int = 0
    crowds: int = 0  # annotations of a crowd: an outline of many objects, no box of one
    incomplete: int = 0  # questions that not every object has a box for: a crowd, or a bad annotation
    crowded: int = 0  # questions with more than max_boxes boxes
    errors: list[str] = field(default_factory=list)

    def summary(self) -> str:
        parts = [
            f"{self.records} records with {self.boxes} boxes",
            f"{self.crowds} crowd annotations skipped" if self.crowds else "",
            f"{self.incomplete} questions left out, since not all their objects have a box" if self.incomplete else "",
            f"{self.crowded} questions with too many boxes left out" if self.crowded else "",
            f"{len(self.errors)} bad annotations or images skipped" if self.errors else "",
        ]
        return "; ".join(part for part in parts if part)


def prompts(form: str) -> tuple[str, str]:
    """How models of a box format are asked for one object, and for all of a kind; {label} stands for what."""
    box = f"{{label}}? Answer with boxes only, written as {box_format(form).example}"
    return PROMPTS.get(form, (f"Where is {box}", f"Where is every {box}"))


class CocoFile:
    """The file, indexed, and its images.

    Args:
        skip_bad: leave out what is wrong and note it in `counts`, instead of an error.

    Raises:
        AnnotationError: it is no such file.
    """

    def __init__(self, path: str | os.PathLike[str], images: str | os.PathLike[str], *, skip_bad: bool = False) -> None:
        self.path, self.folder, self.skip_bad = Path(path), Path(images), skip_bad
        self.counts = Counts()
        content = _read(self.path)
        if not isinstance(content, Mapping) or not isinstance(content.get("annotations"), list):
            raise AnnotationError(f"{self.path}: expected an object with images, annotations and categories")
        self.annotations: list[Any] = content["annotations"]
        self.images = {row["id"]: row for row in self._rows(content, "images", "file_name")}
        self.categories = {row["id"]: row["name"] for row in self._rows(content, "categories", "name")}
        self._sizes: dict[Any, tuple[int, int]] = {}

    def detection(self, form: str, max_boxes: int, prompt: str | None = None) -> Iterator[ListRecord]:
        """A record for every category in every image."""
        boxes: dict[tuple[Any, Any], list[Box]] = defaultdict(list)
        incomplete: set[tuple[Any, Any] | None] = set()  # an object without a box: whoever finds it would be wrong
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
                question = (prompt or prompts(form)[1]).replace("{label}", self.categories[category])
                yield self._record(f"{image}-{category}", image, question, [list(box) for box in found], form)

    def referring(self, refs: Sequence[Any], form: str, split: str | None, prompt: str | None) -> Iterator[ListRecord]:
        """A record for every sentence; of one split only, if one is named."""
        known = {row["id"]: row for row in self.annotations if isinstance(row, Mapping) and _is_id(row.get("id"))}
        for number, ref in enumerate(refs, 1):
            try:
                if not isinstance(ref, Mapping):
                    raise AnnotationError(f"ref {number}: expected an object, got {ref!r:.80}")
                if split is not None and ref.get("split") != split:
                    continue
                name = ref.get("ann_id")
                if not _is_id(name) or name not in known:
                    raise AnnotationError(f"ref {number}: no annotation has its ann_id {name!r:.80}")
                annotation = known[name]
                image, box = self._image_of(annotation)["id"], self.box(annotation)
                sentences = [_sentence(one, number) for one in ref.get("sentences") or []]
            except AnnotationError as error:
                self._bad(error)
                continue
            for i, sentence in enumerate(sentences):
                question = (prompt or prompts(form)[0]).replace("{label}", sentence)
                yield self._record(f"ref-{ref.get('ref_id', number)}-{i}", image, question, list(box), form)

    def box(self, annotation: Mapping[str, Any]) -> Box:
        """The part of its box inside the image, in fractions of it."""
        width, height = self._size(self._image_of(annotation))
        bbox = annotation.get("bbox")
        numbers = [float(v) for v in bbox if _is_number(v)] if isinstance(bbox, list | tuple) else []
        if len(numbers) != 4 or len(bbox or ()) != 4 or not all(map(math.isfinite, numbers)):
            raise self._wrong(annotation, f"bbox must be [x, y, width, height] in pixels, got {bbox!r:.80}")
        x, y, w, h = numbers
        x1, x2 = (min(max(side / width, 0.0), 1.0) for side in (x, x + w))
        y1, y2 = (min(max(side / height, 0.0), 1.0) for side in (y, y + h))
        if not (w > 0 and h > 0 and x1 < x2 and y1 < y2):
            raise self._wrong(annotation, f"bbox {bbox} has no area inside the image of {width} × {height} pixels")
        return round(x1, 6), round(y1, 6), round(x2, 6), round(y2, 6)

    # ------------------------------------------------------------------------------------------------------- details

    def _record(self, name: str, image: Any, question: str, answer: list[Any], form: str) -> ListRecord:
        self.counts.records += 1
        self.counts.boxes += len(answer) if isinstance(answer[0], list) else 1
        return ListRecord(name, self.images[image]["file_name"], question, answer, f"grounding/{form}")

    def _rows(self, content: Mapping[str, Any], name: str, required: str) -> Iterator[Mapping[str, Any]]:
        rows = content.get(name)
        if not isinstance(rows, list):
            raise AnnotationError(f"{self.path}: expected a list {name!r}, got {rows!r:.80}")
        for number, row in enumerate(rows, 1):
            whole = isinstance(row, Mapping) and _is_id(row.get("id"))
            if not whole or not isinstance(row.get(required), str):
                raise AnnotationError(f"{self.path}: {name} {number} needs id and {required}, got {row!r:.120}")
            yield row

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
        """(width, height) of the image as training will see it. The file must say the same, if it says any."""
        if image["id"] not in self._sizes:
            try:
                with Image.open(resolve_image(image["file_name"], self.folder)) as opened:
                    self._sizes[image["id"]] = _upright(opened)
            except (ImageError, OSError, SyntaxError, ValueError) as error:
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
            raise AnnotationError(f"{error}\n--skip-bad leaves out such annotations and counts them") from error
        self.counts.errors.append(str(error))


def divide(records: Sequence[ListRecord], share: float) -> tuple[list[ListRecord], list[ListRecord]]:
    """Records to train on and to hold out; all of one image on one side, whatever else is in the file."""

    def held_out(record: ListRecord) -> bool:
        digest = hashlib.sha256(str(record.image).encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") < share * 2**64

    parts: tuple[list[ListRecord], list[ListRecord]] = [], []
    for record in records:
        parts[held_out(record)].append(record)
    return parts


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    try:
        file = CocoFile(options.annotations, options.images, skip_bad=options.skip_bad)
        if options.prompt is not None and "{label}" not in options.prompt:
            raise ValueError(f"--prompt must hold {{label}}, where the object's name goes; got {options.prompt!r}")
        if options.refs is None:
            records = list(file.detection(options.format, options.max_boxes, options.prompt))
        else:
            refs = _read(Path(options.refs))
            if not isinstance(refs, list):
                raise AnnotationError(f"{options.refs}: expected an array of refs")
            records = list(file.referring(refs, options.format, options.split, options.prompt))
        train, held_out = divide(records, options.held_out_share) if options.held_out else (records, [])
        for part, path in ((train, options.output), (held_out, options.held_out)):
            if path and not part:
                raise ValueError(f"no record is left for {path}: {file.counts.summary()}")
        print(file.counts.summary())
        for error in file.counts.errors[:SHOWN_ERRORS]:
            print(f"  skipped: {error}", file=sys.stderr)
        for part, path in ((train, options.output), (held_out, options.held_out)):
            if path:
                write_records(part, path)
                images = Counter(record.image for record in part)
                print(f"{path}: {len(part)} records on {len(images)} images")
    except (ValueError, OSError) as error:
        print(f"perpo coco: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("perpo coco", description="Grounding records from a COCO-style file.")

    def add(name: str, help: str, **options: Any) -> None:
        """Written with hyphens or, as the settings of the other commands, with underscores."""
        parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}")), help=help, **options)

    add("annotations", "JSON with images, annotations and categories.", required=True)
    add("images", "Folder that the file_names are under.", required=True)
    add("format", "How the model writes boxes.", required=True, choices=list(FORMATS))
    add("output", "Records: .jsonl or .parquet.", required=True)
    add("held-out", "Records of other images, for `perpo evaluate`.")
    add("held-out-share", "Of the images (default 0.1).", type=float, default=0.1)
    add("refs", "JSON with referring expressions: an array of {ann_id, sentences, split}.")
    add("split", "Take refs of this split only.")
    add("prompt", "The question, with {label} in it; default: what the format's models know.")
    add("max-boxes", "Leave out questions with more boxes (default 8).", type=int, default=8)
    add("skip-bad", "Leave out bad annotations and count them.", action="store_true")
    return parser


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{path}: not valid JSON: {error}") from error


def _upright(image: Image.Image) -> tuple[int, int]:
    """Size after `ImageOps.exif_transpose`, without decoding."""
    width, height = image.size
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def _sentence(sentence: Any, number: int) -> str:
    text = sentence.get("sent", sentence.get("raw")) if isinstance(sentence, Mapping) else sentence
    if not isinstance(text, str) or not text.strip():
        raise AnnotationError(f"ref {number}: a sentence must be a text or hold one as 'sent', got {sentence!r:.80}")
    return text.strip()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str)
