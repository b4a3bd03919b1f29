"""Which records an evaluation shows, and their pictures with the boxes of truth and answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from perpo.data.images import ImageError, open_image
from perpo.data.record import ListRecord
from perpo.evaluation.evaluate import TaskEvaluation
from perpo.evaluation.metrics import Judged, is_grounding
from perpo.evaluation.plots import TRUTH, picture
from perpo.rewards.formats import Box, parse_boxes
from perpo.rewards.grounding import true_boxes_of


@dataclass(frozen=True)
class Example:
    record: ListRecord
    answers: dict[str, Judged]  # model ->
    boxes: bool  # whether the task is one of boxes


def choose_examples(task: TaskEvaluation, count: int, seed: int) -> dict[str, list[Example]]:
    """Half of them drawn at random; with several models a quarter where the last one gained most over the first, and
    a quarter where it lost most. Title -> examples, without empty groups and without repeats."""
    n = len(task.records)
    rewards = np.array([[a.reward for a in answers.greedy] for answers in task.answers.values()])
    gain = rewards[-1] - rewards[0]
    several = len(rewards) > 1
    n_random = (count + 1) // 2 if several else count
    groups = {"drawn at random": np.random.default_rng(seed).permutation(n)[:n_random].tolist()}
    if several:
        order = np.argsort(-gain, kind="stable").tolist()
        quarter = count - n_random
        first, *_, last = task.answers
        groups[f"where {last} gained most over {first}"] = [i for i in order if gain[i] > 0][: (quarter + 1) // 2]
        groups[f"where {last} lost most"] = [i for i in order[::-1] if gain[i] < 0][: quarter // 2]
    shown: set[int] = set()
    chosen = {}
    for title, indices in groups.items():
        new = [i for i in indices if i not in shown]
        shown.update(new)
        if new:
            chosen[title] = [_example(task, i) for i in new]
    return chosen


def example_picture(example: Example, colours: Mapping[str, str], root: str | None) -> bytes | None:
    """The record's image, for grounding with the boxes of truth and answers; None where there is no image."""
    if example.record.image is None:
        return None
    try:
        image = open_image(example.record.image, root)
    except ImageError:  # gone since it was asked about
        return None
    boxes: list[tuple[str, list[Box]]] = []
    if example.boxes:
        boxes.append((TRUTH, true_boxes_of(example.record.answer)[0]))
        for model, answer in example.answers.items():
            found = parse_boxes(answer.final or "", answer.form, answer.image_size)
            boxes.append((colours[model], found))
    return picture(image, boxes)


def question(record: ListRecord) -> str:
    """The words of a record's prompt."""
    if isinstance(record.prompt, str):
        return record.prompt
    words = []
    for message in record.prompt:
        content = message.get("content", "")
        parts = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
        words.append(" ".join(part for part in parts if part))
    return "\n".join(words)


def _example(task: TaskEvaluation, index: int) -> Example:
    answers = {model: given.greedy[index] for model, given in task.answers.items()}
    return Example(task.records[index], answers, is_grounding(task.task))
