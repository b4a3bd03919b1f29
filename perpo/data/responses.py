"""Answers that are kept apart from their records: rows of an id and one answer, or an id and several.

    {"id": "glass-1", "response": "[0.6, 0.1, 0.8, 0.5]"}          # any number of rows of an id, in their order
    {"id": "glass-1", "responses": ["[0.6, 0.1, 0.8, 0.5]", …]}

`complete`, a truth value for each answer, may stand beside them: false where an answer was cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from perpo.data.files import read_rows
from perpo.data.record import FieldError, ListRecord, Where, plain, shown

_KNOWN = ("id", "response", "responses", "complete")


class Responses(NamedTuple):
    """Answers by id, each with whether it ended by itself."""

    of_id: dict[str, list[tuple[str, bool]]]
    ignored: Counter[str]  # other fields -> rows that have them


def read_responses(source: Where) -> Responses:
    """All answers of a file.

    Raises:
        ValueError: a row that is no answer, with its place.
    """
    found = Responses({}, Counter())
    for place, row, problem in read_rows(source):
        try:
            if problem or not isinstance(row, Mapping):
                raise ValueError(problem or f'must be an object {{"id": …, "response": …}}, got {shown(row)}')
            identity = row.get("id")
            if isinstance(identity, bool) or not isinstance(identity, str | int) or identity == "":
                raise ValueError(f"id: must be that of a record, got {shown(identity)}")
            found.of_id.setdefault(str(identity), []).extend(_answers(row))
            found.ignored.update(name for name, value in row.items() if name not in _KNOWN and value is not None)
        except ValueError as error:
            raise ValueError(f"responses: {source}, {place}: {error}") from error
    return found


def _answers(row: Mapping[str, Any]) -> list[tuple[str, bool]]:
    given = [name for name in ("response", "responses") if row.get(name) is not None]
    if len(given) != 1:
        raise ValueError(f"needs one of response (a text) and responses (a list of texts), has {given or 'neither'}")
    texts, complete = plain(row[given[0]]), plain(row.get("complete"))
    if given == ["response"]:
        if not isinstance(texts, str):
            raise ValueError(f"response: must be a text, got {shown(texts)}")
        texts, complete = [texts], None if complete is None else [complete]
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"responses: must be a list of texts, got {shown(texts)}")
    ends = [True] * len(texts) if complete is None else complete
    if not isinstance(ends, list | tuple) or len(ends) != len(texts) or not all(isinstance(end, bool) for end in ends):
        raise ValueError(f"complete: must be true or false for each answer, got {shown(complete)}")
    return list(zip(texts, ends, strict=True))


def answer_records(
    records: Sequence[ListRecord], answers: Mapping[str, Sequence[tuple[str, bool]]]
) -> tuple[list[ListRecord], list[str]]:
    """The records with their answers, and the ids of those that have none, which are left out.

    Raises:
        ValueError: an id of no record; a record that has answers of its own.
    """
    unknown = answers.keys() - {record.id for record in records}
    if unknown:
        first = min(unknown)
        raise ValueError(f"responses: {len(unknown)} ids belong to no record, such as {first!r}")
    for record in records:
        if record.responses:
            raise ValueError(
                f"responses: record {record.id!r} has {record.k} answers of its own; leave out one of both"
            )
    answered, without = [], []
    for record in records:
        given = answers.get(record.id)
        if given is None:
            without.append(record.id)
            continue
        try:
            answered.append(record.answered([text for text, _ in given], None, [end for _, end in given]))
        except FieldError as error:
            raise ValueError(f"responses: record {record.id!r}: {error}") from error
    return answered, without
