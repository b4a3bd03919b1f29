"""Boxes as each model family writes them, and rewards for one box or several.

Inside, a box is always `(x1, y1, x2, y2)` in fractions of the image, x1 < x2, y1 < y2. How a family writes it:

    llava       [0.12, 0.34, 0.56, 0.78]                        fractions; also the format of the PerPO paper
    llava-pad   the same, of the image padded to a square (LLaVA-1.5 with image_aspect_ratio "pad")
    qwen2-vl    <|box_start|>(120,340),(560,780)<|box_end|>     thousandths
    qwen2.5-vl  {"bbox_2d": [77, 163, 358, 374]}                pixels of the image *as resized for the model*
    qwen3-vl    {"bbox_2d": [120, 340, 560, 780]}               thousandths; glm-v is the same
    internvl    <box>[[120, 340, 560, 780]]</box>               thousandths
    paligemma   <loc0348><loc0123><loc0799><loc0573>            1024ths, y before x

The scale is never guessed: a format is declared, and a box that cannot be in its scale is not a box. What a person
would still understand is read: words and code fences around it, a bare `[x1, y1, x2, y2]` for the family's markup,
swapped corners, corners outside the image (clipped). All patterns are possessive: reading is linear in any answer.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from perpo.rewards.completions import RewardFunction, score_each, without_marks
from perpo.rewards.grounding import Box, box_iou

Size = tuple[int, int]  # width, height

_NUMBER = r"([-+]?+(?:\d++(?:\.\d*+)?+|\.\d++)(?:[eE][-+]?+\d{1,3}+)?+)\s*+"
_COMMA = r",\s*+"
_FOUR = _COMMA.join([_NUMBER] * 4)
_QUOTED = _COMMA.join([rf"[\"']?+{_NUMBER}[\"']?+\s*+"] * 4)
_PAIR = rf"[(\[]\s*+{_NUMBER}{_COMMA}{_NUMBER}[)\]]\s*+"
_BARE = re.compile(rf"\[\s*+{_FOUR}\]")
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
_NONE = re.compile(
    r"\[\s*+\]|\b(?:none|nothing|nobody|no(?! idea)|zero)\b|\b(?:is|are|was|were|do|does|can)(?: not|n['’]t|not) "
    r"(?:any|there|see|visible|present|shown|appear|contain)",
    re.IGNORECASE,
)

Finder = Callable[[str], Iterator[tuple[str, ...]]]


def _each(pattern: re.Pattern[str]) -> Finder:
    return lambda text: (found.groups() for found in pattern.finditer(text))


def _json_values(text: str) -> Iterator[tuple[str, ...]]:
    for key in _KEY.finditer(text):
        at = key.end()
        while found := _VALUE.match(text, at):
            yield tuple(number for number in found.groups() if number is not None)
            at = found.end()


MAX_BOXES = 1000  # of one answer: more is a model that repeats itself


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
    finders: tuple[Finder, ...] = (_each(_BARE),)
    opening: str = ""
    separator: str = ", "
    closing: str = ""
    padded: bool = False
    tokens: bool = False


def _json_format(scale: int | None) -> BoxFormat:
    template = '{{"bbox_2d": [{x1:.0f}, {y1:.0f}, {x2:.0f}, {y2:.0f}], "label": {label}}}'
    finders = (_json_values, _each(_BARE), _each(_CORNERS))
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
        (_each(_CORNERS), _each(_BARE)),
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
        ValueError: there is none; the message lists those there are.
    """
    if name not in FORMATS:
        raise ValueError(f"box format {name!r} is not known; known are {', '.join(FORMATS)}")
    return FORMATS[name]


def parse_boxes(text: str, name: str = "llava", size: Size | None = None) -> list[Box]:
    """Every box in the text, in its order, as fractions of the image; empty where there is none.

    A box of which nothing lies inside the image, or without width or height, is left out. So is one in thousandths or
    pixels with no coordinate beyond 1: it was written in fractions, and reading it as a speck in the corner would
    score 0 without anybody noticing.

    Args:
        size: (width, height): for "qwen2.5-vl" of the image as the model saw it after resizing (image_grid_thw times
            the patch size), for "llava-pad" of the image before padding; for other formats not looked at.

    Raises:
        ValueError: the format is not known, or needs a size and has none.
    """
    form = box_format(name)
    found: list[tuple[str, ...]] = []
    for finder in form.finders:
        found = list(islice(finder(text), MAX_BOXES))
        if found:
            break
    boxes = (_inside(_from_written(form, groups, name, size)) for groups in found)
    return [box for box in boxes if box is not None]


def says_none(text: str) -> bool:
    """Whether an answer without any box says that there is none: by an empty list, or in words ("No dogs.")."""
    return _NONE.search(without_marks(text)) is not None


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


def giou(a: Sequence[float], b: Sequence[float]) -> float:
    """Generalised IoU in [-1, 1]: IoU − |C \\ (A ∪ B)| / |C|, C the smallest box around both (arXiv 1902.09630).

    Unlike IoU it still tells near from far where the boxes do not meet.
    """
    around = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    if around <= 0:
        return 0.0
    iou = box_iou(a, b)
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    union = both / (1 + iou)  # |A| + |B| = |A ∪ B| + |A ∩ B|
    return iou - (around - union) / around


def scaled_giou(a: Sequence[float], b: Sequence[float]) -> float:
    """(1 + GIoU) / 2, in [0, 1]: so that no box at all (0) is never better than a box far off.

    PerPO's weights do not change under r → a·r + b, so among readable answers this is GIoU.
    """
    return (1 + giou(a, b)) / 2


def match(values: ArrayLike) -> list[tuple[int, int]]:
    """The one-to-one assignment of rows to columns of `values` [n, m] with the largest sum, as min(n, m) pairs.

    The Hungarian method with potentials (every row in turn takes the shortest augmenting path), exact,
    O(min(n, m)² · max(n, m)).
    """
    cost = -np.asarray(values, dtype=np.float64)
    if cost.ndim != 2 or cost.size == 0:
        return []
    if cost.shape[0] > cost.shape[1]:
        return sorted((i, j) for j, i in match(-cost.T))
    n, m = cost.shape
    row_potential, column_potential = np.zeros(n), np.zeros(m + 1)
    row_of = np.full(m + 1, -1)  # of every column; column m only holds the row that is being added
    for row in range(n):
        row_of[m], column = row, m
        shortest, previous, done = np.full(m, np.inf), np.full(m, m), np.zeros(m + 1, dtype=bool)
        while row_of[column] != -1:  # Dijkstra over columns until one without a row is reached
            done[column] = True
            reduced = cost[row_of[column]] - row_potential[row_of[column]] - column_potential[:m]
            better = ~done[:m] & (reduced < shortest)
            shortest[better], previous[better] = reduced[better], column
            nearest = int(np.where(done[:m], np.inf, shortest).argmin())
            step = shortest[nearest]
            row_potential[row_of[done]] += step
            column_potential[done] -= step
            shortest -= step
            column = nearest
        while column != m:  # every row on the path moves one column on
            row_of[column], column = row_of[previous[column]], previous[column]
    return sorted((int(row_of[j]), j) for j in range(m) if row_of[j] != -1)


def matched_score(found: Sequence[Box], truth: Sequence[Box], measure: Callable[[Box, Box], float] = box_iou) -> float:
    """Σ of `measure` over the best one-to-one matching / max(|found|, |truth|): missing and surplus boxes both cost."""
    if not found or not truth:
        return 0.0
    values = [[measure(a, b) for b in truth] for a in found]
    return sum(values[i][j] for i, j in match(values)) / max(len(found), len(truth))


def box_reward(name: str = "llava", measure: Callable[[Box, Box], float] = box_iou) -> RewardFunction:
    """A reward function (TRL's GRPO signature) for answers in the format `name`.

    Its column `answer` holds the truth, always in fractions of the image: four numbers, a text holding a box as "llava"
    writes it, or a list of boxes. One true box is compared with the first box of the completion; a list of them is
    matched with all of the completion's (`matched_score`). The empty list says that there is nothing to find: then a
    completion that says so (`says_none`) scores 1, and any other 0. Its column `image_size` holds (width, height)
    where the format needs it. A completion without a box scores 0 otherwise.

    Raises:
        ValueError: the format is not known; and from the reward function: an answer is not a box, or a size is missing.
    """
    box_format(name)

    def reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        answer: Sequence[Any],
        image_size: Sequence[Size] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        def score(text: str, truth: Any, size: Size | None) -> float:
            true_boxes, several = true_boxes_of(truth)
            found = parse_boxes(text, name, size)
            if not true_boxes:
                return float(not found and says_none(text))
            return matched_score(found if several else found[:1], true_boxes, measure)

        return score_each(completions, score, answer=answer, image_size=image_size)

    reward.__name__ = f"{measure.__name__}_reward_{name}"  # trainers name their charts by it
    return reward


def true_boxes_of(answer: Any) -> tuple[list[Box], bool]:
    """The true boxes, and whether the answer is a list of them (rather than one).

    Raises:
        ValueError: it is neither.
    """
    answer = answer.tolist() if hasattr(answer, "tolist") else answer  # an array
    if isinstance(answer, str):
        boxes = parse_boxes(answer)
        if boxes or answer.strip() == "[]":
            return boxes, len(boxes) != 1
    elif isinstance(answer, Sequence):
        several = not answer or not isinstance(answer[0], Real)
        try:
            numbers = [tuple(float(side) for side in box) for box in (answer if several else [answer])]
        except (TypeError, ValueError, OverflowError):
            numbers = [()]
        if all(len(b) == 4 and min(b) >= 0 and max(b) <= 1 and b[0] < b[2] and b[1] < b[3] for b in numbers):
            return numbers, several  # type: ignore[return-value]
    raise ValueError(
        "answer must be a box [x1, y1, x2, y2] in fractions of the image with x1 < x2 and y1 < y2, a text with one, or "
        f"a list of boxes, got {answer!r:.200}"
    )


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


def _from_written(form: BoxFormat, groups: Sequence[str], name: str, size: Size | None) -> tuple[float, ...] | None:
    """Four written numbers as x1, y1, x2, y2 in fractions of the image; None where they are in another scale."""
    numbers = [float(number) for number in groups]
    width, height, left, top = _frame(form, name, size)
    if form.tokens:
        y1, x1, y2, x2 = numbers
    else:
        x1, y1, x2, y2 = numbers
        if form.scale != 1 and max(numbers) <= 1:
            return None
    return (x1 - left) / width, (y1 - top) / height, (x2 - left) / width, (y2 - top) / height


def _inside(corners: tuple[float, ...] | None) -> Box | None:
    """The part of the box inside the image, with its corners in order; None where that is empty."""
    if corners is None:
        return None
    x1, y1, x2, y2 = (min(max(side, 0.0), 1.0) for side in corners)
    box = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
    return box if box[0] < box[2] and box[1] < box[3] else None
