"""Data sets as TRL's users have them, as list records.

    lists   prompt, responses, rewards               k answers and a reward for each
    pairs   prompt, chosen, rejected                 a list of two with rewards 1 and 0
            chosen, rejected, both whole dialogues   what they have in common is the prompt

with `image` or `images` (one a row). A prompt is a text or chat messages; where it is messages, an answer may be one
message of the assistant, in a list as TRL writes it. Every other column is kept in the record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers.utils import logging

from perpo.data.files import read_rows
from perpo.data.read import RecordError, read_records
from perpo.data.record import FieldError, ListRecord, Where, plain, shown, without_nulls
from perpo.rewards.completions import completion_text

logger = logging.get_logger(__name__)

_WHAT = "a row has prompt, responses and rewards, or prompt, chosen and rejected"
_OF_TEMPLATES = ("tools", "chat_template_kwargs")


@dataclasses.dataclass(frozen=True)
class Lists:
    """Records of a data set; `plain` where its prompts are texts, which TRL feeds as they stand."""

    records: Sequence[ListRecord]
    plain: bool


def trl_lists(name: str, source: Any, root: Where | None = None) -> Lists:
    """The lists of a data set in TRL's columns.

    Args:
        name: of the argument that `source` is, for errors.
        source: a `datasets.Dataset` or a sequence of mappings.
        root: the folder that image paths are under, see `perpo.data.images.open_image`.

    Raises:
        TypeError: a stream, or several data sets.
        ValueError: a row that cannot be used: which one, which column, why.
    """
    if type(source).__module__.partition(".")[0] == "datasets" and not hasattr(source, "__len__"):
        raise TypeError(
            f"{name}: {type(source).__name__} is a stream, and lists are read whole before training; give "
            "datasets.Dataset.from_list(list(stream.take(n)))"
        )
    if isinstance(source, Mapping):
        raise TypeError(f"{name}: got several data sets ({', '.join(map(str, source))}); give one of them")
    kinds: dict[bool, str] = {}  # whether the prompt is a text -> the first such row
    try:
        records, report = read_records(_rows(source, kinds), root=root)
    except RecordError as error:
        field = f"{error.field}: " if error.field else ""
        raise ValueError(f"{name}: {error.place}: {field}{error.reason}") from error
    except ValueError as error:
        raise error if kinds else ValueError(f"{name}: it has no rows") from error
    if len(kinds) > 1:
        raise ValueError(
            f"{name}: prompt is a text in {kinds[True]} and messages in {kinds[False]}; give all of one kind: a text "
            "model is fed a text as it stands, messages through its chat template"
        )
    report.source = name
    logger.info(report.summary())
    return Lists(records, True in kinds)


def _rows(source: Any, kinds: dict[bool, str]) -> Iterator[Any]:
    for place, row, problem in read_rows(source):
        if problem is not None or not isinstance(row, Mapping):
            yield row  # refused by the reader, with its place
            continue
        try:
            converted = _list_of(row)
        except FieldError as error:
            raise RecordError("", place, error.field, error.reason) from error
        kinds.setdefault(isinstance(converted.get("prompt"), str), place)
        yield converted


def _list_of(row: Mapping[str, Any]) -> dict[str, Any]:
    for column in _OF_TEMPLATES:
        if row.get(column):
            raise FieldError(column, "is not given to the chat template; write it into the prompt or leave it out")
    pair = [column for column in ("chosen", "rejected") if row.get(column) is not None]
    if pair and (row.get("responses") is not None or len(pair) < 2):
        raise FieldError(pair[0], f"{_WHAT}; this one has {', '.join(map(str, row))}")
    if not pair:
        if row.get("responses") is None:
            raise FieldError("responses", f"is missing: {_WHAT}; this one has {', '.join(map(str, row))}")
        answers = plain(row["responses"])
        if isinstance(answers, str) or not isinstance(answers, Sequence):
            raise FieldError("responses", f"must be a list of answers, got {shown(answers)}")
        prompt = row.get("prompt")
        return {**row, "responses": [_text("responses", prompt, answer) for answer in answers]}
    if row.get("rewards") is not None:
        raise FieldError("rewards", "belong to responses; the rewards of chosen and rejected are 1 and 0")
    kept = {column: value for column, value in row.items() if column not in pair}
    prompt, chosen, rejected = row.get("prompt"), plain(row["chosen"]), plain(row["rejected"])
    if prompt is None:
        prompt, chosen, rejected = _apart(chosen, rejected)
    texts = [_text(column, prompt, answer) for column, answer in zip(pair, (chosen, rejected), strict=True)]
    return {**kept, "prompt": prompt, "responses": texts, "rewards": [1.0, 0.0]}


def _apart(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The prompt that two dialogues share, and how each goes on."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise FieldError("prompt", "is missing; of chosen and rejected that are texts nobody can tell where it ends")
    n = 0
    while n < min(len(chosen), len(rejected)) and without_nulls(chosen[n]) == without_nulls(rejected[n]):
        n += 1
    return chosen[:n], chosen[n:], rejected[n:]


def _text(column: str, prompt: Any, answer: Any) -> Any:
    """An answer as a text; a message of the assistant becomes its words."""
    if isinstance(answer, Mapping):
        answer = [answer]
    if not isinstance(answer, list | tuple):
        return answer  # a text, or refused by the record
    if isinstance(prompt, str):
        raise FieldError(column, "holds messages, but the prompt is a text; give both as messages, or both as texts")
    said = [without_nulls(message) for message in answer]
    if len(said) != 1 or not isinstance(said[0], Mapping) or said[0].get("role") != "assistant":
        raise FieldError(
            column,
            f"must be one message of the assistant, got {shown(said)}; what comes before the last answer belongs into "
            "the prompt",
        )
    (message,) = said
    if more := [key for key, value in message.items() if key not in ("role", "content") and value]:
        raise FieldError(column, f"{', '.join(more)} of a message are not trained on here; write them into its content")
    content = message.get("content")
    if isinstance(content, list) and any(part.get("type") != "text" for part in content):
        raise FieldError(column, f"an answer must consist of text, got {shown(content)}")
    try:
        return completion_text([message])
    except TypeError as error:
        raise FieldError(column, f"an answer must consist of text, got {shown(content)}") from error
