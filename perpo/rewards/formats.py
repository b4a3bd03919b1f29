"""Boxes as each model family writes them: reading them from answers, and writing them.

Inside, a box is always `(x1, y1, x2, y2)` in fractions of the image, x1 < x2, y1 < y2. How a family writes it:

    llava       [0.12, 0.34, 0.56, 0.78]                        fractions; also the format of the PerPO paper
    llava-pad   the same, of the image padded to a square (LLaVA-1.5 with image_aspect_ratio "pad")
    qwen2-vl    <|box_start|>(120,340),(560,780)<|box_end|>     thousandths
    qwen2.5-vl  {"bbox_2d": [77, 163, 358, 374]}                pixels of the image *as resized for the model*
    qwen3-vl    {"bbox_2d": [120, 340, 560, 780]}               thousandths; glm-v is the same
    internvl    <box>[[120, 340, 560, 780]]</box>               thousandths
    paligemma   <loc0348><loc0123><loc0799><loc0573>            1024ths, y before x

The scale is declared and never guessed. A box with a side beyond its scale by more than one step of rounding was
written in another scale: it cannot be read, and the reading says which scale it looks like. What a person would still
understand is read: words and code fences around a box, full-width digits and brackets, `[x1, y1, x2, y2]` or
`[[x1, y1], [x2, y2]]` for the family's markup, and swapped corners. All patterns are possessive: reading takes time
linear in the answer.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

from perpo.rewards.completions import half_width

Box = tuple[float, float, float, float]  # x1, y1, x2, y2
Size = tuple[int, int]  # width, height

_NUMBER = r"([-+]?+(?:\d++(?:\.\d*+)?+|\.\d++)(?:[eE][-+]?+\d{1,3}+)?+)\s*+"
_COMMA = r",\s*+"
_FOUR = _COMMA.join([_NUMBER] * 4)
_QUOTED = _COMMA.join([rf"[\"']?+{_NUMBER}[\"']?+\s*+"] * 4)
_PAIR = rf"[(\[]\s*+{_NUMBER}{_COMMA}{_NUMBER}[)\]]\s*+"
_BARE = re.compile(rf"\[\s*+{_FOUR}\]")
_NESTED = re.compile(rf"\[\s*+\[\s*+{_NUMBER}{_COMMA}{_NUMBER}\]\s*+,?+\s*+\[\s*+{_NUMBER}{_COMMA}{_NUMBER}\]\s*+\]")
_CORNERS = re.compile(
    r"\(\s*+" + (_NUMBER + _COMMA + _NUMBER) + r"\)\s*+,?+\s*+\(\s*+" + (_NUMBER + _COMMA + _NUMBER) + r"\)"
)
_LOCS = re.compile(r"<loc(\d{4})>" * 4)
# The value of bbox_2d: one box or a list of them, as numbers, as texts of numbers, as corners, or in a text.
_KEY = re.compile(r"[\"']bbox_2d[\"']\s*+:\s*+(?:[\"']\s*+)?+(?:\[\s*+(?=[\[(<]|[\"'][^\"'\],]*+,))?+")
_VALUE = re.compile(
    rf"(?:<\|box_start\|>)?+(?:\[\s*+{_QUOTED}\]|{_PAIR},?+\s*+{_PAIR}|[\"']?+{_FOUR}[\"'])"
    r"\s*+(?:<\|box_end\|>)?+\s*+(?:,\s*+)?+"
)
# Chinese punctuation that stands for that of JSON, beyond its full-width forms.
_JSON_MARKS = str.maketrans("、【】“”‘’", ",[]\"\"''")

Finder = Callable[[str], Iterator[tuple[str, ...]]]


def _each(pattern: re.Pattern[str]) -> Finder:
    return lambda text: (found.groups() for found in pattern.finditer(text))


def _json_values(text: str) -> Iterator[tuple[str, ...]]:
    for key in _KEY.finditer(text):
        at = key.end()
        while found := _VALUE.match(text, at):
            yield tuple(number for number in found.groups() if number is not None)
            at = found.end()


MAX_BOXES = 1000  # read from one answer; a model that writes more repeats itself


@dataclass(frozen=True)
class BoxFormat:
    """How a model family writes a box.

    Attributes:
        scale: what the image's width and height measure in it; None for pixels.
        example: shown where answers cannot be read.
        template: one box, in terms of x1, y1, x2, y2 (and label).
        finders: of four written numbers; tried in this order, the first that finds anything is used.
        opening, separator, closing: around and between boxes.
        padded: coordinates are those of the image padded to a square.
        tokens: coordinates are tokens: y before x, and none beyond scale − 1.
    """

    scale: int | None
    example: str
    template: str
    finders: tuple[Finder, ...] = (_each(_BARE), _each(_NESTED))
    opening: str = ""
    separator: str = ", "
    closing: str = ""
    padded: bool = False
    tokens: bool = False

    @property
    def step(self) -> float:
        """One step of rounding: how far an answer may reach beyond the image."""
        return 0.01 if self.scale == 1 else 1.0


def _json_format(scale: int | None) -> BoxFormat:
    template = '{{"bbox_2d": [{x1:.0f}, {y1:.0f}, {x2:.0f}, {y2:.0f}], "label": {label}}}'
    finders = (_json_values, _each(_BARE), _each(_CORNERS), _each(_NESTED))
    return BoxFormat(scale, '{"bbox_2d": [120, 340, 560, 780]}', template, finders, opening="[", closing="]")


_FRACTIONS = ("[0.12, 0.34, 0.56, 0.78]", "[{x1:.2f}, {y1:.2f}, {x2:.2f}, {y2:.2f}]")
_CORNER_TEMPLATE = "<|box_start|>({x1:.0f},{y1:.0f}),({x2:.0f},{y2:.0f})<|box_end|>"
_LIST_TEMPLATE = "[{x1:.0f}, {y1:.0f}, {x2:.0f}, {y2:.0f}]"
_LOC_TEMPLATE = "<loc{y1:04.0f}><loc{x1:04.0f}><loc{y2:04.0f}><loc{x2:04.0f}>"
FORMATS: dict[str, BoxFormat] = {
    "llava": BoxFormat(1, *_FRACTIONS),
    "llava-pad": BoxFormat(1, *_FRACTIONS, padded=True),
    "qwen2-vl": BoxFormat(
        1000,
        "<|box_start|>(120,340),(560,780)<|box_end|>",
        _CORNER_TEMPLATE,
        (_each(_CORNERS), _each(_BARE), _each(_NESTED)),
        separator="",
    ),
    "qwen2.5-vl": _json_format(None),
    "qwen3-vl": _json_format(1000),
    "glm-v": _json_format(1000),
    "internvl": BoxFormat(
        1000, "<box>[[120, 340, 560, 780]]</box>", _LIST_TEMPLATE, opening="<box>[", closing="]</box>"
    ),
    "paligemma": BoxFormat(
        1024, "<loc0348><loc0123><loc0799><loc0573>", _LOC_TEMPLATE, (_each(_LOCS),), separator=" ; ", tokens=True
    ),
}


def box_format(name: str) -> BoxFormat:
    """The format of that name.

    Raises:
        ValueError: the format is not known; the message lists the known ones.
    """
    if name not in FORMATS:
        raise ValueError(f"box format {name!r} is not known; known are {', '.join(FORMATS)}")
    return FORMATS[name]


def written_boxes(text: str, name: str = "llava") -> list[tuple[float, ...]]:
    """The four numbers of every box that the text writes, in its order, as they stand there; at most `MAX_BOXES`."""
    text = half_width(text).translate(_JSON_MARKS)
    for finder in box_format(name).finders:
        if found := list(islice(finder(text), MAX_BOXES)):
            return [tuple(float(number) for number in groups) for groups in found]
    return []


@dataclass(frozen=True)
class BoxReading:
    """What boxes a text writes.

    Attributes:
        boxes: those that can be read, in their order, in fractions of the image.
        n_written: all that it writes, readable or not.
        other_scale: which scale the first box that is not in the format's scale looks like; None without such a box.
    """

    boxes: list[Box]
    n_written: int
    other_scale: str | None = None


def read_boxes(text: str, name: str = "llava", size: Size | None = None) -> BoxReading:
    """Every box that the text writes.

    A box without width or height, or of which nothing lies inside the image, cannot be read. Nor can one in another
    scale: with a side beyond the image by more than one step of rounding, or in thousandths or pixels with no
    coordinate beyond 1 (it was written in fractions, and would be a speck in the corner).

    Args:
        size: (width, height): for "qwen2.5-vl" of the image as the model saw it after resizing (image_grid_thw times
            the patch size), for "llava-pad" of the image before padding; not used for other formats.

    Raises:
        ValueError: the format is not known, or needs a size and has none.
    """
    found = _read(text, name, None if size is None else tuple(size))
    return BoxReading(list(found.boxes), found.n_written, found.other_scale)


@lru_cache(maxsize=128)  # an answer is read for its reward, and again to count what could not be read
def _read(text: str, name: str, size: Any) -> BoxReading:
    form = box_format(name)
    written = written_boxes(text, name)
    boxes, other_scale = [], None
    for numbers in written:
        frame = _frame(form, name, size)
        scale = _other_scale(form, numbers, size)
        box = _in_fractions(form, numbers, frame) if scale is None else None
        if box is not None:
            boxes.append(box)
        other_scale = other_scale or scale
    return BoxReading(boxes, len(written), other_scale)


def parse_boxes(text: str, name: str = "llava", size: Size | None = None) -> list[Box]:
    """The readable boxes of `read_boxes`, in their order."""
    return read_boxes(text, name, size).boxes


def parse_box(text: str, name: str = "llava", size: Size | None = None) -> Box | None:
    """The first box of `parse_boxes`, or None."""
    return next(iter(parse_boxes(text, name, size)), None)


def write_boxes(boxes: Sequence[Box], name: str = "llava", size: Size | None = None, label: str = "") -> str:
    """Boxes (fractions of the image) as that family writes them: the inverse of `parse_boxes` up to rounding.

    Raises:
        ValueError: as `parse_boxes`.
    """
    form = box_format(name)
    width, height, left, top = _frame(form, name, size)
    last = 1023.0 if form.tokens else math.inf  # there is no <loc1024>
    quoted = json.dumps(label, ensure_ascii=False)
    written = []
    for x1, y1, x2, y2 in boxes:
        sides = {"x1": x1 * width + left, "y1": y1 * height + top, "x2": x2 * width + left, "y2": y2 * height + top}
        written.append(form.template.format(label=quoted, **{k: min(v, last) for k, v in sides.items()}))
    return form.opening + form.separator.join(written) + form.closing


def _frame(form: BoxFormat, name: str, size: Size | None) -> tuple[float, float, float, float]:
    """(width, height, left, top) of the image, in the coordinates that the format writes."""
    if form.scale is not None and not form.padded:
        return float(form.scale), float(form.scale), 0.0, 0.0
    if size is None or len(size) != 2 or not min(size) > 0:
        raise ValueError(f"box format {name!r} needs the image's size (width, height), got {size!r}")
    width, height = size
    if not form.padded:
        return float(width), float(height), 0.0, 0.0
    side = max(width, height)  # LLaVA pastes at whole pixels
    return width / side, height / side, (side - width) // 2 / side, (side - height) // 2 / side


def _in_fractions(form: BoxFormat, numbers: Sequence[float], frame: Sequence[float]) -> Box | None:
    """The part of the box inside the image, with its corners in order; None where that is empty."""
    width, height, left, top = frame
    y1, x1, y2, x2 = numbers if form.tokens else (numbers[1], numbers[0], numbers[3], numbers[2])
    xs = sorted(min(max((x - left) / width, 0.0), 1.0) for x in (x1, x2))
    ys = sorted(min(max((y - top) / height, 0.0), 1.0) for y in (y1, y2))
    return (xs[0], ys[0], xs[1], ys[1]) if xs[0] < xs[1] and ys[0] < ys[1] else None


def _other_scale(form: BoxFormat, numbers: Sequence[float], size: Size | None) -> str | None:
    """Which scale coordinates look like that cannot be in the format's own; None where they can."""
    largest, step = max(numbers), form.step
    if form.scale is None:
        assert size is not None  # _frame has looked
        limits = [float(side) for side in size] * 2
    else:
        limits = [float(form.scale)] * 4
    if form.scale != 1 and not form.tokens and largest <= 1:
        return "fractions of the image"
    if all(number <= limit + step for number, limit in zip(numbers, limits, strict=True)):
        return None if min(numbers) >= -step else "coordinates outside the image"
    if form.scale is None:
        return "thousandths" if largest <= 1000 + step else "pixels of a larger image"
    return "thousandths or pixels" if form.scale == 1 and largest <= 1000 else "pixels"
