"""Apply a reward function to the candidates of every record, and notice when the answers cannot be read.

A reward is named by task, "grounding" or "grounding/qwen3-vl" (task / box format), or by import path,
"package.module:function". Importing a module runs it, so only the person who starts a run may name one: a record that
names an import path is refused.

An answer that cannot be read scores 0, like a wrong one. That is right for one answer and ruinous for all of them:
lists of zeros hold no preference, and a run on them trains nothing. So a `Tally` counts, with the reasons, and warns
loudly past one half.
"""

import importlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from perpo.data.record import FieldError, ListRecord
from perpo.rewards.absence import says_none
from perpo.rewards.completions import RewardFunction, final_answer
from perpo.rewards.counting import counting_reward, exact_match_reward, numeric_reward
from perpo.rewards.formats import FORMATS, box_format, read_boxes
from perpo.rewards.grounding import box_iou, box_reward, scaled_giou, true_boxes_of
from perpo.rewards.numerals import read_count, read_number
from perpo.rewards.ocr import normalise, ocr_reward, word_f1_reward

_EARLY = 200  # answers after which a run is warned that it cannot read its answers, rather than at its end


class UnreadableAnswers(UserWarning):
    """More than half of the answers of a run could not be read."""


@dataclass(frozen=True)
class Task:
    """A reward function and what it takes for an answer to be readable.

    Attributes:
        name: as asked for.
        reward: in the signature of TRL's GRPO. None in its result marks an answer as unreadable.
        expected: what an answer should look like, for people.
        fault: why a final answer (given the record's columns) cannot be read: a few words, "" where there is no more
            to say, or None where it can be read. A fault of None leaves it to the reward, which then gets completions
            as they are, with whatever the model thought.
    """

    name: str
    reward: RewardFunction
    expected: str
    fault: Callable[[str, Mapping[str, Any]], str | None] | None = None


def _box_task(name: str, measure: Callable[..., float], form: str) -> Task:
    def fault(text: str, columns: Mapping[str, Any]) -> str | None:
        reading = read_boxes(text, form, columns.get("image_size"))
        nothing = not true_boxes_of(columns["answer"])[0]
        if reading.boxes or (nothing and not reading.n_written and says_none(text)):
            return None
        return f"{reading.other_scale}, by their coordinates" if reading.other_scale else ""

    return Task(name, box_reward(form, measure), f"a box as {form} models write it: {box_format(form).example}", fault)


def _no_text(text: str, columns: Mapping[str, Any]) -> str | None:
    return None if normalise(text) or columns["answer"] == "" else ""


def _without(read: Callable[[str], float | None]) -> Callable[[str, Mapping[str, Any]], str | None]:
    return lambda text, _: "" if read(text) is None else None


_MEASURES: dict[str, Callable[..., float]] = {"grounding": box_iou, "grounding-giou": scaled_giou}
_PLAIN: dict[str, Task] = {
    task.name: task
    for task in (
        Task("ocr", ocr_reward, "the text in the image", _no_text),
        Task("ocr-words", word_f1_reward, "the text in the image", _no_text),
        Task("counting", counting_reward, "a count: 3, or three", _without(read_count)),
        Task("numeric", numeric_reward, "a number: 3.5", _without(read_number)),
        Task("exact", exact_match_reward, "the answer and nothing else", _no_text),
    )
}


def find_task(name: str | RewardFunction, *, of_record: str | None = None) -> Task:
    """The task of that name, or the reward function at that import path, or that function.

    Args:
        of_record: id of the record that gives the name. None: it comes from the command line, a config or a program,
            which alone may name an import path.

    Raises:
        ValueError: no such task, module or function; the message says what there is. Or a record gives an import path.
    """
    if callable(name):
        return _own_task(getattr(name, "__name__", type(name).__name__), name)
    if name in _PLAIN:
        return _PLAIN[name]
    task, _, form = name.partition("/")
    if task in _MEASURES:
        return _box_task(name, _MEASURES[task], form or "llava")
    tasks = (
        f"{', '.join([*_MEASURES, *_PLAIN])}; a grounding task may name a box format, as grounding/qwen3-vl: "
        f"{', '.join(FORMATS)}"
    )
    if of_record is not None:
        raise ValueError(
            f"record {of_record!r}: task {name!r:.200} is not known; known are {tasks}. An import path is taken from "
            "the command line or a config alone, never from a record: give your function as the reward of the run"
        )
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(
            f"reward {name!r} is not known: name a task ({tasks}) or your function as package.module:function"
        )
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # importing runs the module, and anything may go wrong in it
        raise ValueError(f"reward {name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(
            f"reward {name!r} must be a function f(prompts, completions, **columns), got {type(found).__name__}"
        )
    return _own_task(name, found)


def _own_task(name: str, reward: RewardFunction) -> Task:
    first_line = (getattr(reward, "__doc__", None) or "").strip().partition("\n")[0]
    return Task(name, reward, first_line or "whatever the reward function reads (it has no docstring)")


def task_of(record: ListRecord, reward: str | RewardFunction | None = None) -> Task:
    """The task of the run's reward, or else the one that the record names.

    Raises:
        ValueError: as `find_task`; or neither names one.
    """
    if reward is not None:
        return find_task(reward)
    if not record.task:
        raise ValueError(f"record {record.id!r} names no task: give its task, or a reward for the whole run")
    return find_task(record.task, of_record=record.id)


@dataclass
class Tally:
    """Answers scored so far, how many of them could not be read, why, and the first few of those."""

    total: int = 0
    unreadable: int = 0
    expected: str = ""
    examples: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)  # reasons -> answers, where there is a reason to give
    warned: bool = False

    @property
    def share(self) -> float:
        return self.unreadable / self.total if self.total else 0.0

    def add(self, text: str, fault: str | None, expected: str) -> None:
        """Count an answer; `fault` as of `Task`: None where it could be read."""
        self.total += 1
        if fault is None:
            return
        self.unreadable += 1
        if fault:
            self.faults[fault] += 1
        if len(self.examples) < 3:
            self.examples.append(text if len(text) <= 160 else text[:160] + "…")
            self.expected = expected

    def summary(self) -> str:
        why = ", ".join(f"{count} {fault}" for fault, count in self.faults.most_common())
        share = f"{self.unreadable} of {self.total} answers could not be read ({self.share:.1%})"
        return f"{share}: {why}" if why else share

    def check(self, finished: bool = True) -> None:
        """Warn, once, where more than half of the answers could not be read; before the end only after enough."""
        if self.warned or self.share <= 0.5 or not (finished or self.total >= _EARLY):
            return
        self.warned = True
        lines = "\n".join(f"    {example!r}" for example in self.examples)
        rule = "!" * 100
        warnings.warn(
            f"\n{rule}\n{self.summary()}. They score 0, so most lists hold no preference and training on them teaches "
            f"nothing.\nExpected: {self.expected}\nFound, for example:\n{lines}\n"
            f"Name the format that this model writes, or ask for the format in the prompt.\n{rule}",
            UnreadableAnswers,
            stacklevel=3,
        )


def score_record(
    record: ListRecord,
    reward: str | RewardFunction | Task | None,
    tally: Tally,
    columns: Mapping[str, Any] | None = None,
) -> ListRecord:
    """The record with the rewards of its responses; what could not be read is counted in `tally`.

    Args:
        reward: a task, name, import path or function; None takes the name in `record.task`, which is no import path.
        columns: further columns for the reward function, one value for the whole record: {"image_size": (1024, 768)}.
            They and the record's own fields go before its further columns of the same name.

    Raises:
        ValueError: the reward is not known, fails, or gives anything but one finite number or None a response; the
            message names the record.
    """
    task = reward if isinstance(reward, Task) else task_of(record, reward)
    k = len(record.responses)
    known = {"id": record.id, "answer": record.answer, "task": record.task, **(columns or {})}
    further = {name: value for name, value in record.columns.items() if name not in ("prompts", "completions")}
    values = further | known
    try:
        results = task.reward(
            prompts=[record.prompt] * k,
            completions=list(record.responses),
            **{name: [value] * k for name, value in values.items()},
        )
    except Exception as error:
        raise ValueError(
            f"reward {task.name!r} failed on record {record.id!r}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(results, Iterable) or len(results := list(results)) != k:
        raise ValueError(
            f"reward {task.name!r} must give one number a response: record {record.id!r} has {k}, got {results!r:.200}"
        )
    rewards = []
    for text, result in zip(record.responses, results, strict=True):
        try:
            value = 0.0 if result is None else float(result)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(
                f"reward {task.name!r} gave {result!r:.80} for {text!r:.160} of record {record.id!r}: a reward must be "
                "a finite number, or None where the answer cannot be read"
            )
        tally.add(text, "" if result is None else _fault(task, text, values), task.expected)
        rewards.append(value)
    try:
        return replace(record, rewards=tuple(rewards))
    except FieldError as error:
        raise ValueError(f"reward {task.name!r} gave record {record.id!r} {error}") from error


def _fault(task: Task, text: str, columns: Mapping[str, Any]) -> str | None:
    if task.fault is None:
        return None
    answer = final_answer(text)
    return "cut while thinking" if answer is None else task.fault(answer, columns)


def bad_truths(records: Iterable[ListRecord], reward: str | None = None) -> dict[str, str]:
    """id -> what is wrong with the true answer of a record, found by scoring an empty response to each.

    So that it is known before hours of sampling. A record whose task is not known is bad too, one that names an import
    path above all. The run's own reward is left out: it may be slow, or take no empty response.

    Raises:
        ValueError: the run's reward is not known.
    """
    if reward is not None and find_task(reward).fault is None:
        return {}
    bad: dict[str, str] = {}
    for record in records:
        try:
            score_record(record.answered([""]), reward, Tally(), {"image_size": (1, 1)})
        except ValueError as error:
            bad[record.id] = str(error)
    return bad


def score_records(
    records: Iterable[ListRecord],
    reward: str | RewardFunction | None = None,
    *,
    columns: Callable[[ListRecord], Mapping[str, Any]] | None = None,
    tally: Tally | None = None,
) -> Iterator[ListRecord]:
    """`score_record` for every record in turn, warning (`UnreadableAnswers`) when most answers cannot be read.

    Args:
        columns: further columns of a record, as in `score_record`.
        tally: to read the counts from, or to go on counting after a resume.
    """
    tally = Tally() if tally is None else tally
    for record in records:
        scored = score_record(record, reward, tally, columns(record) if columns else None)
        tally.check(finished=False)
        yield scored
    tally.check()
