"""What is measured for each perception task, each metric as terms of every record and a function of their sums.

    grounding         AP@50, AP@75: share of answers with IoU > 0.5, 0.75; mean IoU
    ocr               edit distance (normalised, lower is better), exact, word F1, precision and recall, BLEU, METEOR
    counting/numeric  share of exact answers; closeness
    exact             share of exact answers
    your own reward   its mean

and for all of them the share of answers that cannot be read. AP is taken over the one answer to each question, as
in the PerPO paper: there are no confidences to rank by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from perpo.data.record import ListRecord
from perpo.evaluation.bootstrap import Array
from perpo.evaluation.text_scores import bleu_from_sums, bleu_terms, meteor, why_no_meteor
from perpo.rewards.completions import RewardFunction, final_answer
from perpo.rewards.formats import Size
from perpo.rewards.grounding import box_reward
from perpo.rewards.numerals import read_count, read_number
from perpo.rewards.ocr import edit_similarity, normalise, word_scores
from perpo.rewards.scoring import Tally, Task, find_task, score_record

AP_THRESHOLD, STRICT_THRESHOLD = 0.5, 0.75


@dataclass(frozen=True)
class Judged:
    """One answer to one record, with its reward."""

    record: ListRecord
    text: str
    reward: float
    readable: bool
    image_size: Size | None = None
    form: str = ""  # box format

    @property
    def final(self) -> str | None:
        """What of the text is judged: the answer without thoughts; None where it was cut while thinking."""
        return final_answer(self.text)


@dataclass(frozen=True)
class Metric:
    """A figure over answers: `value` of the sums over records of `terms` [N, F].

    `value` takes sums [..., F] and is NaN where they are over no record.
    """

    name: str
    label: str
    terms: Callable[[Sequence[Judged]], Array]
    value: Callable[[Array], Array]
    higher_is_better: bool = True
    scale: float = 1.0  # the largest value


def mean_metric(name: str, label: str, score: Callable[[Judged], float], higher_is_better: bool = True) -> Metric:
    """The mean of a score of single answers."""

    def terms(answers: Sequence[Judged]) -> Array:
        return np.array([[score(answer), 1.0] for answer in answers], dtype=np.float64).reshape(-1, 2)

    return Metric(name, label, terms, _mean, higher_is_better)


def _mean(sums: Array) -> Array:
    total, n = sums[..., 0], sums[..., 1]
    return np.divide(total, n, out=np.full_like(total, np.nan), where=n > 0)


def task_in_format(task: str, form: str | None) -> str:
    """`grounding` in the box format of one model; other tasks as they are."""
    measure = task.partition("/")[0]
    return f"{measure}/{form}" if form and is_grounding(task) else task


def is_grounding(task: str) -> bool:
    return task.partition("/")[0] in ("grounding", "grounding-giou")


def judge(
    record: ListRecord, texts: Sequence[str], reward: Task | RewardFunction | str, image_size: Size | None, tally: Tally
) -> list[Judged]:
    """Each text with its reward and whether it could be read.

    Raises:
        ValueError: as `perpo.rewards.scoring.score_record`: the record's answer is not what its task takes, …
    """
    task = reward if isinstance(reward, Task) else find_task(reward)
    form = (task.name.partition("/")[2] or "llava") if is_grounding(task.name) else ""
    columns: dict[str, Any] = {} if image_size is None else {"image_size": tuple(image_size)}
    judged = []
    for text in texts:
        before = tally.unreadable
        scored = score_record(record.answered([text]), task, tally, columns)
        assert scored.rewards is not None
        judged.append(Judged(record, text, scored.rewards[0], tally.unreadable == before, image_size, form))
    return judged


def metrics_of(task: str, bleu_tokenize: str = "13a") -> tuple[list[Metric], dict[str, str]]:
    """The metrics of a task, the most telling first; and those that are left out, with the reason.

    Raises:
        ValueError: a task that is not known.
    """
    find_task(task)
    unreadable = mean_metric("unreadable", "unreadable answers", lambda a: 1.0 - a.readable, False)
    left_out: dict[str, str] = {}
    if is_grounding(task):
        metrics = [
            mean_metric("ap50", "AP@50", lambda a: float(_iou(a) > AP_THRESHOLD)),
            mean_metric("ap75", "AP@75", lambda a: float(_iou(a) > STRICT_THRESHOLD)),
            mean_metric("mean_iou", "mean IoU", _iou),
        ]
        if task.startswith("grounding-giou"):
            metrics.append(mean_metric("reward", "mean reward (GIoU)", lambda a: a.reward))
    elif task in ("ocr", "ocr-words"):
        metrics = [
            mean_metric("edit_distance", "edit distance", lambda a: 1 - _of_text(a, edit_similarity), False),
            mean_metric("exact", "exact", lambda a: _of_text(a, lambda x, y: normalise(x) == normalise(y))),
            mean_metric("f1", "word F1", lambda a: _of_text(a, lambda x, y: word_scores(x, y).f1)),
            mean_metric("precision", "word precision", lambda a: _of_text(a, lambda x, y: word_scores(x, y).precision)),
            mean_metric("recall", "word recall", lambda a: _of_text(a, lambda x, y: word_scores(x, y).recall)),
            _bleu(bleu_tokenize),
        ]
        reason = why_no_meteor()
        if reason is None:
            metrics.append(mean_metric("meteor", "METEOR", lambda a: _of_text(a, meteor)))
        else:
            left_out["METEOR"] = reason
    elif task in ("counting", "numeric"):
        read = read_count if task == "counting" else read_number
        metrics = [
            mean_metric("exact", "exact", lambda a: float(_same_number(read(a.final or ""), a.record.answer))),
            mean_metric("closeness", "closeness", lambda a: a.reward),
        ]
    elif task == "exact":
        metrics = [mean_metric("exact", "exact", lambda a: a.reward)]
    else:
        metrics = [mean_metric("reward", "mean reward", lambda a: a.reward)]
    return [*metrics, unreadable], left_out


def _iou(answer: Judged) -> float:
    size = None if answer.image_size is None else [answer.image_size]
    (value,) = box_reward(answer.form)([""], [answer.text], answer=[answer.record.answer], image_size=size)
    return float(value or 0.0)


def _bleu(tokenize: str) -> Metric:
    def terms(answers: Sequence[Judged]) -> Array:
        return bleu_terms([a.final or "" for a in answers], [_truth(a) for a in answers], tokenize)

    return Metric("bleu", "BLEU", terms, bleu_from_sums, scale=100.0)


def _of_text(answer: Judged, score: Callable[[str, str], float]) -> float:
    """A score of the final answer's text with the true one, larger where better; 0 where it was cut while thinking."""
    return 0.0 if answer.final is None else float(score(answer.final, _truth(answer)))


def _truth(answer: Judged) -> str:
    return str(answer.record.answer)


def _same_number(number: float | None, truth: Any) -> bool:
    true_number = read_number(truth) if isinstance(truth, str) else float(truth)
    return number is not None and number == true_number
