"""Read records from files, data sets and iterables, and find those that a run can use.

Files are JSONL (one record per line), JSON (an array) or Parquet; a `datasets.Dataset` and any iterable of mappings
work too. Before sampling and scoring, records have no responses or rewards; `require` names the fields that a reader
needs.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from PIL import Image
from tqdm import tqdm

from perpo.data.columns import AUTHORS, FIELDS, Seen, further, names_of, note_picture_like, picture
from perpo.data.files import Row, read_rows
from perpo.data.images import ImageError, open_image, resolve_image
from perpo.data.preferences import preference_form, preference_list
from perpo.data.record import FieldError, ListRecord, Where, plain, shown, without_nulls
from perpo.data.summary import summary

FILLED = ("prompt", "responses", "rewards")  # must not be empty where required; an answer may be empty
SCORED = ("responses", "rewards")  # what `perpo generate` makes
KEPT_ERRORS = 20  # of skipped records, to show; all are counted
SKIP_HINT = "skip_bad leaves out such records and counts them"


class RecordError(ValueError):
    """A record that cannot be used: the file, the line or row, the field, the reason."""

    def __init__(self, source: str, place: str, field: str | None, reason: str) -> None:
        gap = ": " if place.startswith("row") else ":"
        super().__init__(f"{source}{gap}{place}: " + (f"{field}: {reason}" if field else reason))
        self.source, self.place, self.field, self.reason = source, place, field, reason


@dataclass
class ReadReport(Seen):
    """What was read. Only bad records, and inactive lists on request, are left out."""

    source: str = ""
    n_records: int = 0  # returned
    n_bad: int = 0
    n_inactive: int = 0  # scored lists without any preference
    n_dropped: int = 0  # of those, left out
    n_tied: int = 0  # lists with two equal rewards
    n_repeated: int = 0  # lists with two equal responses
    n_without_image: int = 0
    sizes: Counter[int] = field(default_factory=Counter)  # k -> lists
    errors: list[RecordError] = field(default_factory=list)  # the first few

    def add(self, record: ListRecord, active: bool) -> None:
        self.sizes[record.k] += 1
        self.n_without_image += record.image is None
        self.n_repeated += len(set(record.responses)) < record.k
        if record.rewards is not None:
            self.n_tied += len(set(record.rewards)) < record.k
            self.n_inactive += not active

    def skip(self, bad: Sequence[RecordError]) -> None:
        self.n_bad += len(bad)
        self.errors += bad[: KEPT_ERRORS - len(self.errors)]

    def summary(self) -> str:
        """One line for people."""
        spread = f"{min(self.sizes)}–{max(self.sizes)}" if len(self.sizes) > 1 else "".join(map(str, self.sizes))
        named = f" (is {' or '.join(map(repr, self.like_picture))} one? name it 'image')" if self.like_picture else ""
        return summary(
            f"{self.source}: {self.n_records} lists of {spread or 0} answers",
            *(f"{n} from preferences as {form} keeps them: rewards 1 and 0" for form, n in self.preferences.items()),
            (self.n_bad, "bad records skipped"),
            (self.n_without_image, f"without an image{named}"),
            (self.n_inactive, f"without any preference ({f'{self.n_dropped} left out' if self.n_dropped else 'kept'})"),
            (self.n_tied, "with ties"),
            (self.n_repeated, "with repeated answers"),
            f"further columns: {', '.join(sorted(self.further))}" if self.further else "",
            f"fields not used: {', '.join(sorted(self.ignored))}" if self.ignored else "",
        )

    def show(self) -> None:
        """The summary on stdout, the first skipped records on stderr."""
        print(self.summary())
        for error in self.errors:
            print(f"  skipped: {error}", file=sys.stderr)

    def check_any(self) -> None:
        """
        Raises:
            ValueError: no record is left.
        """
        if self.n_records:
            return
        first = f"; the first bad one is {self.errors[0]}" if self.errors else ""
        raise ValueError(
            f"no usable record ({self.n_bad} bad, {self.n_dropped} without preference) in {self.source}{first}"
        )


def read_records(
    source: Where | Iterable[Any],
    *,
    require: Collection[str] = SCORED,
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
    report = ReadReport(source=_label(source))
    records = [
        record
        for _, record in _read(source, report, require, skip_bad, drop_inactive, partial(_resolve, root, check_images))
    ]
    report.n_records = len(records)
    report.check_any()
    return records, report


# ------------------------------------------------------------------------------------------------------ before a run


@dataclass(kw_only=True)
class ReadSettings:
    """What a command does with bad records."""

    skip_bad: bool = field(
        default=False,
        metadata={"help": "Leave out bad records (a damaged image makes one too) and count them."},
    )
    text_only: bool = field(
        default=False,
        metadata={"help": "Accept records of which none has an image, although the model takes images."},
    )


class PromptCheck(Protocol):
    """Whether a processor accepts the prompt of a record and its image (None: no image).

    Attributes:
        sees_images: the model takes images.
    """

    sees_images: bool

    def __call__(self, record: ListRecord, image: Image.Image | None) -> object:
        """Raises whatever encoding the record raises."""
        ...


def usable_records(
    source: Where,
    settings: ReadSettings,
    *,
    require: Collection[str],
    root: Where | None,
    drop_inactive: bool = False,
    limit: int | None = None,
    prepare: Callable[[ListRecord], ListRecord] = lambda record: record,
    bad_truths: Callable[[Sequence[ListRecord]], Mapping[str, str]] = lambda records: {},
    checks: Callable[[], Sequence[PromptCheck]] = tuple,
    show: bool = True,
) -> tuple[list[ListRecord], ReadReport]:
    """The records that a run can use; opens every image, checks every prompt and prints what was left out.

    This comes first, so that no run fails on them after hours. The processes of a torch.distributed group share the
    images; all of them must call this with the same arguments.

    Args:
        limit: take only this many records, the first ones.
        prepare: applied to every record; a ValueError marks the record as bad.
        bad_truths: id -> what is wrong with a record's true answer.
        checks: called after reading; returns a check for each processor that will encode the records.
        show: print what was found, and a progress bar.

    Raises:
        ValueError: a bad record, unless skip_bad; no usable record; no record has an image although the model takes
            images, unless text_only.
    """
    report = ReadReport(source=_label(source))
    found: list[tuple[str, ListRecord]] = []
    try:
        for one in _read(source, report, require, settings.skip_bad, drop_inactive, prepare):
            found.append(one)
    except RecordError as error:
        raise ValueError(f"{error}\n{SKIP_HINT}") from error
    found = found[:limit]
    truths = bad_truths([record for _, record in found])
    found = _without(found, {i: truths[r.id] for i, (_, r) in enumerate(found) if r.id in truths}, settings, report)
    asked = checks()
    problems = _problems([record for _, record in found], root, asked, show)
    reasons = {i: f"record {found[i][1].id!r}: {problem}" for i, problem in problems.items()}
    records = [record for _, record in _without(found, reasons, settings, report)]
    if show:
        report.show()
    if any(check.sees_images for check in asked) and all(record.image is None for record in records):
        names = " or ".join(map(repr, report.like_picture))
        hint = f"the column {names} looks like one: name it 'image'" if names else "its field is 'image'"
        if not settings.text_only:
            raise ValueError(
                f"{report.source}: none of {len(records)} records has an image, and the model takes images: {hint}. "
                "For records about text alone set text_only"
            )
    return records, report


def _without(
    found: Sequence[tuple[str, ListRecord]], reasons: Mapping[int, str], settings: ReadSettings, report: ReadReport
) -> list[tuple[str, ListRecord]]:
    """The records without the bad ones; raises for these unless they may be skipped.

    Args:
        reasons: number of each bad one -> why.
    """
    bad = [RecordError(report.source, found[i][0], None, reasons[i]) for i in sorted(reasons)]
    if bad and not settings.skip_bad:
        more = f" ({len(bad)} such records)" if len(bad) > 1 else ""
        raise ValueError(f"{bad[0]}{more}\n{SKIP_HINT}")
    report.skip(bad)
    left = [one for i, one in enumerate(found) if i not in reasons]
    report.n_records = len(left)
    report.check_any()
    return left


def _problems(
    records: Sequence[ListRecord], root: Where | None, checks: Sequence[PromptCheck], show: bool
) -> dict[int, str]:
    """Number of each record whose image cannot be opened or whose prompt cannot be encoded -> why."""
    import torch.distributed as dist  # reading records takes no torch

    joined = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    mine = range(rank, len(records), world_size)
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as threads:
        problems = threads.map(partial(_problem, root, checks), (records[i] for i in mine))
        bar = tqdm(problems, desc="looking at images", total=len(mine), disable=not show or rank != 0)
        found = [(i, problem) for i, problem in zip(mine, bar, strict=True) if problem is not None]
    if joined:
        everyones: list[Any] = [None] * world_size
        dist.all_gather_object(everyones, found)
        found = [one for theirs in everyones for one in theirs]
    return dict(sorted(found))


def _problem(root: Where | None, checks: Sequence[PromptCheck], record: ListRecord) -> str | None:
    try:
        image = None if record.image is None else open_image(record.image, root)
        for check in checks:
            check(record, image)
    except Exception as error:  # processors and decoders raise errors of any type
        return reason_of(error)
    return None


def reason_of(error: Exception) -> str:
    """The message of an error; with its type, unless its messages are meant for users."""
    return str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"


# ----------------------------------------------------------------------------------------------------------- details


def _label(source: Any) -> str:
    return os.fspath(source) if isinstance(source, str | os.PathLike) else type(source).__name__


def _resolve(root: Where | None, check: bool, record: ListRecord) -> ListRecord:
    if check and isinstance(record.image, str | os.PathLike):
        resolve_image(record.image, root)
    return record


def _read(
    source: Any,
    report: ReadReport,
    require: Collection[str],
    skip_bad: bool,
    drop_inactive: bool,
    prepare: Callable[[ListRecord], ListRecord],
) -> Iterator[tuple[str, ListRecord]]:
    """Every good record with its place; counts go into the report."""
    if unknown := set(require) - set(FIELDS):
        raise ValueError(f"require must name fields of a record ({', '.join(sorted(FIELDS))}), got {sorted(unknown)}")
    for place, parsed in _parse(read_rows(source), report, require):
        try:
            if isinstance(parsed, FieldError):
                raise parsed
            record = prepare(parsed)
        except ValueError as error:
            name, reason = (error.field, error.reason) if isinstance(error, FieldError) else (None, str(error))
            bad = RecordError(report.source, place, "image" if isinstance(error, ImageError) else name or None, reason)
            if not skip_bad:
                raise bad from error
            report.skip([bad])
            continue
        active = record.has_preference
        report.add(record, active)
        if drop_inactive and record.rewards is not None and not active:
            report.n_dropped += 1
        else:
            yield place, record


def _parse(
    rows: Iterator[Row], report: ReadReport, require: Collection[str]
) -> Iterator[tuple[str, ListRecord | FieldError]]:
    """Every row as a record or as an error that uses the field names of the file."""
    places: dict[str, str] = {}  # id -> where it was first
    seen: Counter[str] = Counter()  # image_id of the authors' records
    for number, (place, row, problem) in enumerate(rows, 1):
        if isinstance(row, ListRecord):
            row = {name: getattr(row, name) for name in FIELDS}
        if problem or not isinstance(row, Mapping):
            reason = problem or f"must be an object with the fields of a record, got {shown(row)}"
            yield place, FieldError("", reason)
            continue
        names: Mapping[str, str] = {}
        try:
            if (form := preference_form(row)) is not None:
                row = preference_list(row, form)
                report.preferences[form] += 1
            names = names_of(row)
            record = _record(row, names, number, report, require, seen)
            if record.id in places:
                raise FieldError("id", f"{record.id!r:.100} is taken by the record at {places[record.id]}")
        except FieldError as error:
            yield place, FieldError(names.get(error.field, error.field), error.reason)
        except Exception as error:
            yield place, FieldError("", reason_of(error))
        else:
            places[record.id] = place if place.startswith("row") else f"line {place}"
            yield place, record


def _record(
    row: Mapping[str, Any],
    names: Mapping[str, str],
    number: int,
    report: ReadReport,
    require: Collection[str],
    seen: Counter[str],
) -> ListRecord:
    given = {ours: row[name] for ours, name in names.items() if row.get(name) is not None}
    identity = plain(given.get("id", number))
    given["id"] = str(identity) if isinstance(identity, int) and not isinstance(identity, bool) else identity
    if names is AUTHORS:
        given["task"] = "grounding"
        if isinstance(given["id"], str):
            seen[given["id"]] += 1
            given["id"] += f"#{seen[given['id']]}" if seen[given["id"]] > 1 else ""
    given["columns"] = further(row, names.values(), report)
    given["image"] = picture(row, names["image"])
    if given["image"] is None:
        note_picture_like(row, names.values(), report)
    for name in ("prompt", *require):
        if name not in given or (name in FILLED and isinstance(given[name], Sized) and not len(given[name])):
            hint = ": run `perpo generate` first, which samples answers and scores them" if name in SCORED else ""
            raise FieldError(name, ("is missing or empty" if name in FILLED else "is missing") + hint)
    given["prompt"] = without_nulls(given["prompt"])
    return ListRecord(**given)
