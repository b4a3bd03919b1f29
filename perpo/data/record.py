"""The list record: one image, one question, k answers with their rewards. Its fields and their checks; writing it.

    {"id": "glass-1", "image": "train/0001.jpg", "prompt": "Where is …?", "answer": "[0.61, 0.1, 0.77, 0.54]",
     "task": "grounding", "responses": ["[0.6, 0.1, 0.8, 0.5]", …], "rewards": [0.8, …], "ref_log_probs": [-3.1, …]}

All other columns are kept in `columns`, for custom rewards. `perpo.data.read` reads records.
"""

import math
import os
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any, Self

import numpy as np
from PIL import Image

from perpo.data.files import write_rows
from perpo.data.images import ImageSource, RowImage

Prompt = str | Sequence[Mapping[str, Any]]
Where = str | os.PathLike[str]

_PER_RESPONSE = ("rewards", "ref_log_probs", "flip_probs", "complete")
_SCALARS = frozenset({str, int, float, bool, type(None)})
_TEXT, _NUMBER = frozenset({str}), frozenset({float})
_IMAGES = (str, type(None), bytes, os.PathLike, Image.Image, Mapping, RowImage)  # the common ones first
_LARGEST = sys.float_info.max  # compared with integers too, which may be beyond it
_LARGEST_FP32 = float(np.finfo(np.float32).max)


class FieldError(ValueError):
    """A field of a record has a wrong value."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field, self.reason = field, reason


@dataclass(frozen=True)
class ListRecord:
    """One list. It is checked on construction, so every instance is valid.

    Attributes:
        id: distinct in its file.
        image: a path, encoded bytes, a PIL image or an image of `datasets`; None for a text-only list.
        prompt: the question, or chat messages `{"role", "content"}`.
        answer: the ground truth, whatever the task's reward takes; for boxes in fractions of the image.
        task: names the reward, see `perpo.rewards.scoring`.
        responses: [k] candidates, in any order. The ground truth is not among them unless it was added.
        rewards: [k] finite numbers, or None before scoring. They are trained on in fp32: see `_apart_in_fp32`.
        ref_log_probs: [k] log-probabilities of the responses under the reference model, or None.
        flip_probs: [k] probabilities in [0, 1) that a preference over this response is wrong, or None.
        complete: [k] whether a response ended by itself; a response that was cut is trained without an end of turn.
            None: all of them did.
        weight: what the list counts in the loss, finite and ≥ 0: of its difficulty for example. None: 1.
        columns: further columns, passed to reward functions by name. Their values must be JSON.

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
    weight: float | None = None

    def __post_init__(self) -> None:
        for name in ("answer", "responses", *_PER_RESPONSE, "columns"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, plain(value))
        for name in ("id", "task"):
            if not isinstance(getattr(self, name), str):
                raise FieldError(name, f"must be a text, got {shown(getattr(self, name))}")
        if not self.id:
            raise FieldError("id", "must not be empty")
        if not isinstance(self.image, _IMAGES) or self.image in ("", b""):
            raise FieldError("image", f"must be a path, bytes, an image or null, got {shown(self.image)}")
        _check_prompt(self.prompt)
        responses = self.responses
        if not isinstance(responses, list | tuple) or not _TEXT.issuperset(map(type, responses)):
            raise FieldError("responses", f"must be a list of texts, got {shown(responses)}")
        _check_text("responses", "\0".join(responses))
        object.__setattr__(self, "responses", tuple(responses))
        for name in ("rewards", "ref_log_probs", "flip_probs"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, _numbers(name, values, len(responses)))
        if self.rewards is not None:
            object.__setattr__(self, "rewards", _apart_in_fp32(self.rewards))
        if any(not 0 <= p < 1 for p in self.flip_probs or ()):
            raise FieldError("flip_probs", f"must be probabilities in [0, 1), got {shown(self.flip_probs)}")
        if self.complete is not None:
            object.__setattr__(self, "complete", _booleans("complete", self.complete, len(responses)))
        if self.weight is not None:
            object.__setattr__(self, "weight", _weight(plain(self.weight)))
        if not isinstance(self.columns, Mapping) or not all(isinstance(name, str) for name in self.columns):
            raise FieldError("columns", f"must be a mapping by name, got {shown(self.columns)}")

    @property
    def k(self) -> int:
        return len(self.responses)

    def answered(
        self, responses: Sequence[str], rewards: Sequence[float] | None = None, complete: Sequence[bool] | None = None
    ) -> Self:
        """The record with other responses; rewards, log-probs etc. of the old ones are dropped."""
        known = {"rewards": rewards, "complete": None if complete is None or all(complete) else complete}
        # For the type checker: fields by name.
        return replace(self, responses=tuple(responses), **(dict.fromkeys(_PER_RESPONSE) | known))  # type: ignore[arg-type]

    def picked(self, places: Sequence[int]) -> Self:
        """The record with only the responses at these indices, and their rewards, log-probs etc."""
        values: dict[str, Any] = {name: getattr(self, name) for name in ("responses", *_PER_RESPONSE)}
        kept: dict[str, Any] = {n: None if v is None else tuple(v[i] for i in places) for n, v in values.items()}
        return replace(self, **kept)

    @property
    def has_preference(self) -> bool:
        """Whether any two responses have different rewards: the only lists with a gradient."""
        return self.rewards is not None and len(set(self.rewards)) > 1


def write_records(records: Iterable[ListRecord], path: Where) -> int:
    """Write records to a .jsonl or .parquet file atomically; returns how many."""
    return write_rows(({f.name: getattr(record, f.name) for f in fields(ListRecord)} for record in records), path)


def _check_text(name: str, text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FieldError(
            name,
            f"holds half of a surrogate pair ({text[error.start]!a} after {text[: error.start][-20:]!a}), which no "
            "tokenizer takes: write the whole character",
        ) from error


def _check_prompt(prompt: Any) -> None:
    if isinstance(prompt, str) and prompt.strip():
        _check_text("prompt", prompt)
        return
    if not isinstance(prompt, list | tuple) or not prompt:
        raise FieldError("prompt", f"must be a text that is not empty, or chat messages, got {shown(prompt)}")
    for i, message in enumerate(prompt):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise FieldError("prompt", f'message {i} must be {{"role": text, "content": …}}, got {shown(message)}')
        content = message.get("content")
        parts: Any = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list | tuple) or not all(isinstance(p, Mapping) and "type" in p for p in parts):
            raise FieldError(
                "prompt", f'content of message {i} must be a text or a list of {{"type": …}}, got {shown(content)}'
            )
        for text in [part.get("text") for part in parts if part["type"] == "text"]:
            if not isinstance(text, str):
                raise FieldError(
                    "prompt", f'a text part of message {i} must be {{"type": "text", "text": …}}, got {shown(text)}'
                )
            _check_text("prompt", text)


def _weight(value: Any) -> float:
    # For the type checker: Real compares.
    known = isinstance(value, Real) and not isinstance(value, bool) and 0 <= value <= _LARGEST_FP32  # type: ignore[operator]
    if not known:  # NaN compares false
        raise FieldError(
            "weight",
            f"must be a number from 0 to 3.4e38, what the list counts in the loss, got {shown(value)}; a column "
            "that means something else needs another name",
        )
    return float(value)


def _numbers(name: str, values: Any, k: int) -> tuple[float, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise FieldError(name, f"must be a list of numbers, got {shown(values)}")
    if len(values) != k:
        raise FieldError(name, f"must hold one number a response: {k} responses, {len(values)} {name}")
    if _NUMBER.issuperset(map(type, values)) and all(map(math.isfinite, values)):  # the common case, fast
        return tuple(values)
    for i, value in enumerate(values):
        # For the type checker: Real compares.
        finite = isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= _LARGEST  # type: ignore[operator]
        if not finite:  # NaN compares false
            raise FieldError(name, f"item {i} must be a finite number, got {shown(value)}")
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
    if len(set(array("f", rewards))) == len(set(rewards)):
        return rewards
    apart = list(rewards)
    before, before_fp32 = -math.inf, np.float32(-math.inf)
    for i in sorted(range(len(rewards)), key=lambda i: rewards[i]):
        differs = rewards[i] - before > 1e-12 * abs(rewards[i])
        if not differs and np.float32(rewards[i]) < before_fp32:
            apart[i] = float(before_fp32)  # equal to one that was moved
        elif differs and np.float32(rewards[i]) <= before_fp32:
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
        raise FieldError(name, f"must be a list of true and false, got {shown(values)}")
    if len(values) != k:
        raise FieldError(name, f"must hold one value a response: {k} responses, {len(values)} {name}")
    return tuple(values)


def plain(value: Any) -> Any:
    """The value with NumPy arrays and numbers, at any depth, as lists and numbers of Python."""
    kind = type(value)
    if kind in _SCALARS:
        return value
    if kind is list or kind is tuple:
        return kind(value if _SCALARS.issuperset(map(type, value)) else map(plain, value))
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return value


def without_nulls(value: Any) -> Any:
    """The value without null entries: columnar files give every part of a message the keys of all parts, as nulls."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list | tuple) else value


def shown(value: Any) -> str:
    text = f"{value!r:.120}" if not isinstance(value, bytes) else f"{len(value)} bytes"
    return f"{text} ({type(value).__name__})"
