"""The list record: one image, one question, k answers with their rewards. Reading, checking and writing it.

    {"id": "glass-1", "image": "train/0001.jpg", "prompt": "Where is …?", "answer": "[0.61, 0.1, 0.77, 0.54]",
     "task": "grounding", "responses": ["[0.6, 0.1, 0.8, 0.5]", …], "rewards": [0.8, …], "ref_log_probs": [-3.1, …]}

Whatever else a record holds is kept in its `columns`, for a reward of one's own.

Files are JSONL (one record a line), JSON (an array) or Parquet; a `datasets.Dataset` or any iterable of mappings does
too. The records of PerPO's authors (image_id, image_path, question, answer, answers_gen, iou_scores) read as they are.
Records without responses or rewards are what there is before sampling and scoring; `require` says what a reader needs.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any, Self

import numpy as np
from PIL import Image

from perpo.data.files import Row, read_rows, write_rows
from perpo.data.images import ImageError, ImageSource, RowImage, resolve_image

Prompt = str | Sequence[Mapping[str, Any]]
Where = str | os.PathLike[str]

# Our name of a field -> the authors'. Their records are grounding, which they do not say.
_AUTHORS = {
    "id": "image_id",
    "image": "image_path",
    "prompt": "question",
    "answer": "answer",
    "responses": "answers_gen",
    "rewards": "iou_scores",
}
_PER_RESPONSE = ("rewards", "ref_log_probs", "flip_probs", "complete")
_FILLED = ("prompt", "responses", "rewards")  # where required, not empty; an empty answer is one
_LARGEST_FP32 = float(np.finfo(np.float32).max)
_KEPT_ERRORS = 20  # of skipped records, to show; all are counted


class FieldError(ValueError):
    """A field of a record is not what it must be."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason


class RecordError(ValueError):
    """A record that cannot be used: in which file, where in it, which field, why."""

    def __init__(self, source: str, place: str, field: str | None, reason: str) -> None:
        gap = ": " if place.startswith("row") else ":"
        super().__init__(f"{source}{gap}{place}: " + (f"{field}: {reason}" if field else reason))
        self.source, self.place, self.field, self.reason = source, place, field, reason


@dataclass(frozen=True)
class ListRecord:
    """One list. Checked when it is made: a record that exists is a good one.

    Attributes:
        id: distinct in its file.
        image: a path, encoded bytes, a PIL image or what `datasets` holds for one; None for a list about text alone.
        prompt: the question, or chat messages `{"role", "content"}`.
        answer: the ground truth, whatever the task's reward takes; for boxes in fractions of the image.
        task: names the reward, see `perpo.rewards.scoring`.
        responses: [k] candidates, in any order. None is the ground truth, unless it was put among them.
        rewards: [k] finite numbers, or None before scoring. They are trained on in fp32: see `_apart_in_fp32`.
        ref_log_probs: [k] log-probabilities of the responses under the reference model, or None.
        flip_probs: [k] probabilities in [0, 1) that a preference over this response is wrong, or None.
        complete: [k] whether a response ended by itself; one that was cut is trained without an end of turn. None:
            all did.
        columns: further columns of the record, which rewards are given by their names. What JSON can hold.

    NumPy's arrays and numbers become lists and numbers of Python.

    Raises:
        FieldError: a field has the wrong type, length or a number that is not finite.
    """

    id: str
    image: ImageSource | None
    prompt: Prompt
    answer: Any = None
    task: str = ""
    responses: tuple[str, ...] = ()
    rewards: tuple[float, ...] | None = None
    ref_log_probs: tuple[float, ...] | None = None
    flip_probs: tuple[float, ...] | None = None
    complete: tuple[bool, ...] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("answer", "responses", *_PER_RESPONSE, "columns"):
            object.__setattr__(self, name, _plain(getattr(self, name)))
        for name in ("id", "task"):
            if not isinstance(getattr(self, name), str):
                raise FieldError(name, f"must be a text, got {_shown(getattr(self, name))}")
        if not self.id:
            raise FieldError("id", "must not be empty")
        kinds = str | os.PathLike | bytes | Image.Image | Mapping | RowImage | None
        if not isinstance(self.image, kinds) or self.image in ("", b""):
            raise FieldError("image", f"must be a path, bytes, an image or null, got {_shown(self.image)}")
        _check_prompt(self.prompt)
        responses = self.responses
        if not isinstance(responses, list | tuple) or not all(isinstance(text, str) for text in responses):
            raise FieldError("responses", f"must be a list of texts, got {_shown(responses)}")
        object.__setattr__(self, "responses", tuple(responses))
        for name in ("rewards", "ref_log_probs", "flip_probs"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, _numbers(name, values, len(responses)))
        if self.rewards is not None:
            object.__setattr__(self, "rewards", _apart_in_fp32(self.rewards))
        if any(not 0 <= p < 1 for p in self.flip_probs or ()):
            raise FieldError("flip_probs", f"must be probabilities in [0, 1), got {_shown(self.flip_probs)}")
        if self.complete is not None:
            object.__setattr__(self, "complete", _booleans("complete", self.complete, len(responses)))
        if not isinstance(self.columns, Mapping) or not all(isinstance(name, str) for name in self.columns):
            raise FieldError("columns", f"must be a mapping by name, got {_shown(self.columns)}")

    @property
    def k(self) -> int:
        return len(self.responses)

    def answered(
        self, responses: Sequence[str], rewards: Sequence[float] | None = None, complete: Sequence[bool] | None = None
    ) -> Self:
        """The record with other responses, and nothing of what was known of those it had."""
        known = {"rewards": rewards, "complete": None if complete is None or all(complete) else complete}
        return replace(self, responses=tuple(responses), **(dict.fromkeys(_PER_RESPONSE) | known))  # type: ignore[arg-type]

    def picked(self, places: Sequence[int]) -> Self:
        """The record with the responses at these places alone, and what is known of them."""
        values: dict[str, Any] = {name: getattr(self, name) for name in ("responses", *_PER_RESPONSE)}
        kept: dict[str, Any] = {n: None if v is None else tuple(v[i] for i in places) for n, v in values.items()}
        return replace(self, **kept)

    @property
    def has_preference(self) -> bool:
        """Whether any two responses have different rewards: the only lists with a gradient."""
        return self.rewards is not None and len(set(self.rewards)) > 1


@dataclass
class ReadReport:
    """What reading found. Everything but bad records, and inactive lists where asked, is kept."""

    source: str
    n_records: int = 0  # returned
    n_bad: int = 0
    n_inactive: int = 0  # scored lists without any preference
    n_dropped: int = 0  # of those, left out
    n_tied: int = 0  # lists with two equal rewards
    n_repeated: int = 0  # lists with two equal responses
    sizes: Counter[int] = field(default_factory=Counter)  # k -> lists
    errors: list[RecordError] = field(default_factory=list)  # the first few
    further: Counter[str] = field(default_factory=Counter)  # columns of no use but to a reward of one's own -> rows
    ignored: Counter[str] = field(default_factory=Counter)  # the same, left out since JSON cannot hold them -> rows

    def add(self, record: ListRecord) -> None:
        self.sizes[record.k] += 1
        self.n_repeated += len(set(record.responses)) < record.k
        if record.rewards is not None:
            self.n_tied += len(set(record.rewards)) < record.k
            self.n_inactive += not record.has_preference

    def summary(self) -> str:
        """One line for people."""
        spread = f"{min(self.sizes)}–{max(self.sizes)}" if len(self.sizes) > 1 else "".join(map(str, self.sizes))
        kept = f"{self.n_dropped} left out" if self.n_dropped else "kept"
        parts = [
            f"{self.source}: {self.n_records} lists of {spread or 0} answers",
            f"{self.n_bad} bad records skipped" if self.n_bad else "",
            f"{self.n_inactive} without any preference ({kept})" if self.n_inactive else "",
            f"{self.n_tied} with ties" if self.n_tied else "",
            f"{self.n_repeated} with repeated answers" if self.n_repeated else "",
            f"further columns: {', '.join(sorted(self.further))}" if self.further else "",
            f"fields not used: {', '.join(sorted(self.ignored))}" if self.ignored else "",
        ]
        return "; ".join(part for part in parts if part)


def read_records(
    source: Where | Iterable[Any],
    *,
    require: Collection[str] = ("responses", "rewards"),
    skip_bad: bool = False,
    drop_inactive: bool = False,
    check_images: bool = False,
    root: Where | None = None,
) -> tuple[list[ListRecord], ReadReport]:
    """All records of a file, `datasets.Dataset` or iterable, and what was noticed on the way.

    A record without an id gets its number in the source; of the authors' records that share an image_id, the second
    becomes "7#2" and so on.

    Args:
        require: fields that must be there: ("answer",) before sampling, the default for training. Prompt, responses
            and rewards must not be empty either; an answer may be (a blank page, no object).
        skip_bad: leave out bad records and count them, instead of raising at the first.
        drop_inactive: leave out scored lists whose rewards are all equal (they have no gradient).
        check_images: that every path is a file under `root` (nothing is decoded).
        root: see `perpo.data.images.open_image`.

    Raises:
        RecordError: a bad record, unless skip_bad.
        ValueError: no usable record at all; a file that cannot be read any further; `require` names no field.
    """
    names = {f.name for f in fields(ListRecord)}
    if unknown := set(require) - names:
        raise ValueError(f"require must name fields of a record ({', '.join(sorted(names))}), got {sorted(unknown)}")
    label = os.fspath(source) if isinstance(source, str | os.PathLike) else type(source).__name__
    report, records = ReadReport(label), []
    for place, parsed in _parse(read_rows(source), report, require):
        try:
            if isinstance(parsed, FieldError):
                raise parsed
            if check_images and isinstance(parsed.image, str | os.PathLike):
                resolve_image(parsed.image, root)
        except (FieldError, ImageError) as error:
            name, reason = (error.field, error.reason) if isinstance(error, FieldError) else ("image", str(error))
            bad = RecordError(label, place, name or None, reason)
            if not skip_bad:
                raise bad from error
            report.n_bad += 1
            report.errors += [bad][: _KEPT_ERRORS - len(report.errors)]
            continue
        report.add(parsed)
        if drop_inactive and parsed.rewards is not None and not parsed.has_preference:
            report.n_dropped += 1
        else:
            records.append(parsed)
    report.n_records = len(records)
    if not records:
        first = f"; the first bad one is {report.errors[0]}" if report.errors else ""
        raise ValueError(
            f"no usable record ({report.n_bad} bad, {report.n_dropped} without preference) in {label}{first}"
        )
    return records, report


def write_records(records: Iterable[ListRecord], path: Where) -> int:
    """Write records to a .jsonl or .parquet file, whole or not at all, and return how many there were."""
    return write_rows(({f.name: getattr(record, f.name) for f in fields(ListRecord)} for record in records), path)


def _parse(
    rows: Iterator[Row], report: ReadReport, require: Collection[str]
) -> Iterator[tuple[str, "ListRecord | FieldError"]]:
    """Every row as a record, or as what is wrong with it, in the field names of its file."""
    places: dict[str, str] = {}  # id -> where it was first
    seen: Counter[str] = Counter()  # image_id of the authors' records
    for number, (place, values, problem) in enumerate(rows, 1):
        if isinstance(values, ListRecord):
            values = {f.name: getattr(values, f.name) for f in fields(ListRecord)}
        if problem or not isinstance(values, Mapping):
            yield (
                place,
                FieldError("", problem or f"must be an object with the fields of a record, got {_shown(values)}"),
            )
            continue
        authors = "answers_gen" in values or {"question", "image_path"} <= values.keys()
        names = _AUTHORS if authors else {f.name: f.name for f in fields(ListRecord)}
        given = {ours: values[name] for ours, name in names.items() if values.get(name) is not None}
        identity = _plain(given.get("id", number))
        given["id"] = str(identity) if isinstance(identity, int) and not isinstance(identity, bool) else identity
        if authors:
            given["task"] = "grounding"
            if isinstance(given["id"], str):
                seen[given["id"]] += 1
                given["id"] += f"#{seen[given['id']]}" if seen[given["id"]] > 1 else ""
        try:
            given["columns"] = _further(values, {*names.values(), "columns"}, report)
            for name in ("prompt", *require):
                if name not in given or (name in _FILLED and isinstance(given[name], Sized) and not len(given[name])):
                    raise FieldError(name, "is missing or empty" if name in _FILLED else "is missing")
            given["prompt"] = _without_nulls(given["prompt"])
            record = ListRecord(**{"image": None, **given})
            if record.id in places:
                raise FieldError("id", f"{record.id!r:.100} is taken by the record at {places[record.id]}")
        except FieldError as error:
            yield place, FieldError(names.get(error.field, error.field), error.reason)
        else:
            places[record.id] = place if place.startswith("row") else f"line {place}"
            yield place, record


def _check_prompt(prompt: Any) -> None:
    if isinstance(prompt, str) and prompt.strip():
        return
    if not isinstance(prompt, list | tuple) or not prompt:
        raise FieldError("prompt", f"must be a text that is not empty, or chat messages, got {_shown(prompt)}")
    for i, message in enumerate(prompt):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise FieldError("prompt", f'message {i} must be {{"role": text, "content": …}}, got {_shown(message)}')
        content = message.get("content")
        parts = isinstance(content, list | tuple) and all(isinstance(p, Mapping) and "type" in p for p in content)
        if not isinstance(content, str) and not parts:
            raise FieldError(
                "prompt", f'content of message {i} must be a text or a list of {{"type": …}}, got {_shown(content)}'
            )


def _numbers(name: str, values: Any, k: int) -> tuple[float, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise FieldError(name, f"must be a list of numbers, got {_shown(values)}")
    if len(values) != k:
        raise FieldError(name, f"must hold one number a response: {k} responses, {len(values)} {name}")
    for i, value in enumerate(values):
        finite = isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= 1.7e308  # type: ignore[operator]
        if not finite:  # NaN compares false
            raise FieldError(name, f"item {i} must be a finite number, got {_shown(value)}")
    return tuple(float(value) for value in values)


def _apart_in_fp32(rewards: tuple[float, ...]) -> tuple[float, ...]:
    """The rewards, those moved up by a step of fp32 that would else be equal in it; rounding noise of fp64 may be.

    Raises:
        FieldError: rewards or their differences are beyond fp32, or a step is more than a thousandth of their range.
    """
    low, high = min(rewards, default=0.0), max(rewards, default=0.0)
    if max(high, -low, high - low) > _LARGEST_FP32:
        raise FieldError(
            "rewards", f"must be numbers of fp32 and so must their differences, at most 3.4e38; got {low!r} to {high!r}"
        )
    if len(set(np.asarray(rewards, dtype=np.float32).tolist())) == len(set(rewards)):
        return rewards
    apart = list(rewards)
    before, before_fp32 = -math.inf, np.float32(-math.inf)
    for i in sorted(range(len(rewards)), key=lambda i: rewards[i]):
        differs = rewards[i] - before > 1e-12 * abs(rewards[i])
        if differs and np.float32(rewards[i]) <= before_fp32:
            apart[i] = float(np.nextafter(before_fp32, np.float32(math.inf)))
            if abs(apart[i] - rewards[i]) > 1e-3 * (high - low):
                raise FieldError(
                    "rewards",
                    f"{before!r} and {rewards[i]!r} are equal in fp32, in which they are trained on: subtract what all "
                    "rewards have in common, or scale them",
                )
        before, before_fp32 = rewards[i], np.float32(apart[i])
    return tuple(apart)


def _booleans(name: str, values: Any, k: int) -> tuple[bool, ...]:
    if not isinstance(values, list | tuple) or not all(isinstance(value, bool) for value in values):
        raise FieldError(name, f"must be a list of true and false, got {_shown(values)}")
    if len(values) != k:
        raise FieldError(name, f"must hold one value a response: {k} responses, {len(values)} {name}")
    return tuple(values)


def _further(values: Mapping[str, Any], known: Collection[str], report: ReadReport) -> dict[str, Any]:
    """Columns of a row that are no field of a record: side by side with the fields, or gathered in one of them."""
    gathered = values.get("columns") or {}
    if not isinstance(gathered, Mapping):
        raise FieldError("columns", f"must be a mapping by name, got {_shown(gathered)}")
    found = {}
    for name, value in {**gathered, **{name: values[name] for name in values if name not in known}}.items():
        if value is None:
            continue
        try:
            json.dumps(plain := _plain(value), allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            report.ignored[name] += 1
        else:
            found[name] = plain
            report.further[name] += 1
    return found


def _plain(value: Any) -> Any:
    """Arrays, and numbers of NumPy, wherever they are in the value, as lists and numbers of Python."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def _without_nulls(value: Any) -> Any:
    """Columnar files give every part of a message the keys of all parts, as nulls: leave those out."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list | tuple) else value


def _shown(value: Any) -> str:
    text = f"{value!r:.120}" if not isinstance(value, bytes) else f"{len(value)} bytes"
    return f"{text} ({type(value).__name__})"
