"""Visual grounding: how well the boxes of an answer agree with the true ones.

    IoU(a, b)  = |a ∩ b| / |a ∪ b|                       in [0, 1]
    GIoU(a, b) = IoU − |C \\ (a ∪ b)| / |C|               in [-1, 1], C the smallest box around both (arXiv 1902.09630)

One true box is compared with the first box of the answer. Several are matched with all of the answer's, one to one,
with the largest sum (the Hungarian method). How an answer writes its boxes: `perpo.rewards.formats`.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from perpo.rewards.absence import says_none
from perpo.rewards.completions import RewardFunction, score_each
from perpo.rewards.formats import Box, Size, box_format, read_boxes, written_boxes


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Area of the intersection over area of the union of two boxes; 0 where the union has no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union if union > 0 else 0.0


def giou(a: Sequence[float], b: Sequence[float]) -> float:
    """GIoU. Unlike IoU it still orders boxes by distance where they do not meet; 0 for two points."""
    around = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    if around <= 0:
        return 0.0
    iou = box_iou(a, b)
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    union = both / (1 + iou)  # |A| + |B| = |A ∪ B| + |A ∩ B|
    return iou - (around - union) / around


def scaled_giou(a: Sequence[float], b: Sequence[float]) -> float:
    """(1 + GIoU) / 2, in [0, 1], so that no box at all (0) is never better than a box far off.

    PerPO's weights do not change under r → a·r + b, so among readable answers this is GIoU.
    """
    return (1 + giou(a, b)) / 2


def match(values: ArrayLike) -> list[tuple[int, int]]:
    """The one-to-one assignment of rows to columns of `values` [n, m] with the largest sum, as min(n, m) pairs."""
    from scipy.optimize import linear_sum_assignment  # takes longer to import than everything else here

    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        return []
    rows, columns = linear_sum_assignment(values, maximize=True)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def matched_score(
    found: Sequence[Box],
    truth: Sequence[Box],
    measure: Callable[[Box, Box], float] = box_iou,
    n_written: int = 0,
) -> float:
    """Σ of `measure` over the best one-to-one matching / max(|found|, |truth|): missing and surplus boxes both cost.

    Args:
        n_written: boxes that the answer writes, where it writes more than can be read: all count as found.
    """
    if not found or not truth:
        return 0.0
    values = [[measure(a, b) for b in truth] for a in found]
    return sum(values[i][j] for i, j in match(values)) / max(len(found), len(truth), n_written)


def box_reward(name: str = "llava", measure: Callable[[Box, Box], float] = box_iou) -> RewardFunction:
    """A reward function (TRL's GRPO signature) for answers in the format `name`.

    Its column `answer` holds the truth, always in fractions of the image: four numbers, a text holding a box as "llava"
    writes it, or a list of boxes. One true box is compared with the first readable box of the completion; a list of
    them is matched with all of the completion's (`matched_score`). The empty list says that there is nothing to find:
    then a completion that writes no box and says so (`perpo.rewards.absence`) scores 1, and any other 0. Otherwise a
    completion without a readable box scores 0. Its column `image_size` holds (width, height) where the format needs it.

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
            reading = read_boxes(text, name, size)
            if not true_boxes:
                return float(not reading.n_written and says_none(text))
            if several:
                return matched_score(reading.boxes, true_boxes, measure, reading.n_written)
            return measure(reading.boxes[0], true_boxes[0]) if reading.boxes else 0.0

        return score_each(completions, score, answer=answer, image_size=image_size)

    reward.__name__ = f"{measure.__name__}_reward_{name}"  # trainers name their charts by it
    return reward


def iou_reward(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    """`box_reward()`: IoU of boxes written as "llava" does, `[x1, y1, x2, y2]` in fractions of the image.

    Raises:
        ValueError: the lengths differ, or an answer is not a box. A bad completion is the model's fault and scores 0;
            a bad answer is the data's.
    """
    return box_reward()(prompts, completions, answer=answer)


@lru_cache(maxsize=128)  # the same for all answers of a list
def _written(answer: str) -> tuple[tuple[float, ...], ...]:
    return tuple(written_boxes(answer))


def true_boxes_of(answer: Any) -> tuple[list[Box], bool]:
    """The true boxes, and whether the answer is a list of them (rather than one).

    Raises:
        ValueError: it is neither.
    """
    answer = answer.tolist() if hasattr(answer, "tolist") else answer  # an array
    numbers: list[tuple[float, ...]] = [()]
    several = False
    if isinstance(answer, str):
        numbers = list(_written(answer))
        several = len(numbers) != 1
        if not numbers and answer.strip() != "[]":
            numbers = [()]
    elif isinstance(answer, Sequence):
        several = not answer or not isinstance(answer[0], Real)
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            numbers = [tuple(float(side) for side in box) for box in (answer if several else [answer])]
    if all(len(b) == 4 and min(b) >= 0 and max(b) <= 1 and b[0] < b[2] and b[1] < b[3] for b in numbers):
        return numbers, several  # type: ignore[return-value]  # four each, just tested
    raise ValueError(
        "answer must be a box [x1, y1, x2, y2] in fractions of the image with x1 < x2 and y1 < y2, a text with one, or "
        f"a list of boxes, got {answer!r:.200}"
    )
