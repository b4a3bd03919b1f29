"""Visual grounding: the reward of an answer is the IoU of the box it names with the true box.

    IoU(a, b) = |a ∩ b| / |a ∪ b|          in [0, 1], 0 where nothing can be read from the answer

A box is `(x1, y1, x2, y2)` in fractions of the image's width and height, `x1 < x2`, `y1 < y2`: the format of LLaVA
and of the PerPO paper. Another model's way of writing a box belongs in `parse_box`, which every reward here reads
answers through.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

Box = tuple[float, float, float, float]

# Possessive: a number is read once, so that an answer of a thousand digits takes no longer than it is long.
_NUMBER = r"[-+]?+(?:\d++(?:\.\d*+)?+|\.\d++)(?:[eE][-+]?+\d{1,3}+)?+"
_BRACKETED = re.compile(r"\[\s*(" + r"\s*,\s*".join([_NUMBER] * 4) + r")\s*\]")


def parse_box(text: str) -> Box | None:
    """The first `[x1, y1, x2, y2]` in the text, put in order and clipped to the image.

    Words around the box are skipped and swapped corners are put right, as either still says where the thing is.
    None where there is no such box, or where nothing is left of it inside the image.
    """
    found = _BRACKETED.search(text)
    if found is None:
        return None
    x1, y1, x2, y2 = (min(max(float(number), 0.0), 1.0) for number in found[1].split(","))
    box = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
    return box if box[0] < box[2] and box[1] < box[3] else None


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Area of the intersection over area of the union of two boxes; 0 where the union has no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection
    return intersection / union if union > 0 else 0.0


def iou_reward(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **columns: Any
) -> list[float]:
    """IoU of every completion's box with the box of its answer, in the signature of TRL's GRPO reward functions.

    Args:
        prompts: one a completion; not looked at.
        completions: texts, or message lists whose last message holds the text.
        answer: the true box of each completion: four numbers, or a text that holds a box.
        columns: the data set's other columns; not looked at.

    Raises:
        ValueError: the lengths differ, or an answer is not a box. A bad completion is the model's fault and scores 0;
            a bad answer is the data's.
    """
    if len(completions) != len(answer):
        raise ValueError(f"completions and answer must be of one length, got {len(completions)} and {len(answer)}")
    rewards = []
    for completion, truth in zip(completions, answer, strict=True):
        box = parse_box(_text(completion))
        rewards.append(0.0 if box is None else box_iou(box, _truth(truth)))
    return rewards


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _truth(answer: Any) -> Sequence[float]:
    box = parse_box(answer) if isinstance(answer, str) else answer
    if box is None or len(box) != 4 or not all(math.isfinite(side) for side in box):
        raise ValueError(f"answer must be a box [x1, y1, x2, y2] in fractions of the image, got {answer!r}")
    return box
