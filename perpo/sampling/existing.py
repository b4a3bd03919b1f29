"""Score answers that exist already, whoever gave them: a finished record is kept at once, as in sampling.

What is finished lies in `{output}.parts`, so that a slow reward (a judge behind a network) is not asked twice.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from perpo.data.read import SKIP_HINT, reason_of
from perpo.data.record import ListRecord, write_records
from perpo.rewards.scoring import Tally, Task, score_record, task_of
from perpo.sampling.candidates import RECORD_ERRORS, SHOWN_ERRORS, Totals, check_output, parts_folder
from perpo.sampling.shards import SOURCE, Finished, Shards, check_sources, source_of
from perpo.storage.fingerprints import fingerprint

FLUSH_SECONDS = 1.0  # a kill costs at most this much scoring


@dataclass
class TaskTotals:
    """Counts of the records of one task."""

    totals: Totals = field(default_factory=Totals)
    tally: Tally = field(default_factory=Tally)


def score_existing(
    records: Sequence[ListRecord],
    output: str | os.PathLike[str],
    *,
    reward: str | None = None,
    columns: Callable[[ListRecord], Mapping[str, Any]] | None = None,
    identity: Mapping[str, str] | None = None,
    opened: str = "",
    image_root: str | os.PathLike[str] | None = None,
    skip_bad: bool = False,
) -> dict[str, TaskTotals]:
    """Write `output`, the records with the rewards of their responses; returns the counts by task.

    Rewards that a record has are replaced; its reference log-probs, which belong to the responses, stay.

    Args:
        reward: name or import path for all records; None: each record's task, which is no import path.
        columns: further columns for the reward, from the image: {"image_size": …}. identity: what they depend on.
        opened: goes in front of each answer where it is judged, see `Encoder.opened`.
        skip_bad: leave out and count the records that cannot be scored, instead of raising at the first.

    Raises:
        ValueError: a bad record, unless skip_bad; a reward that is not known; no record is left.
        StaleError: `{output}.parts` holds rewards of another reward, other records or other answers.
        OSError: no space; what was finished before is kept.
    """
    path = Path(output)
    folder = parts_folder(path)
    check_output(records, path, folder)
    names = {record.id: reward or record.task for record in records}
    found: dict[str, Task] = {}
    for record in records:
        found.setdefault(names[record.id], task_of(record, reward))
    seen = [name for name in (*SOURCE, "responses") if columns is not None or name != "image"]
    by_task = {name: TaskTotals() for name in found}
    of_answers = {"scored": "existing answers", **({"opened by the template": opened} if opened else {})}
    with Shards(folder, {**of_answers, **_of_reward(reward, found), **(identity or {})}) as shards:
        finished = shards.read()
        check_sources(records, finished, folder, image_root, seen)
        done = {one.id: one for one in finished.values() if one.error is None}
        waiting: list[Finished] = []
        last = time.monotonic()
        try:
            for record in tqdm(records, desc="score", unit="list"):
                counts = by_task[names[record.id]]
                one = done.get(record.id)
                if one is not None:
                    counts.tally.total += len(one.responses)
                    counts.tally.unreadable += one.unreadable
                else:
                    one = _scored(record, found[names[record.id]], counts.tally, columns, opened, skip_bad)
                    done[record.id] = one
                    waiting.append(replace(one, source=source_of(record, image_root, seen)))
                counts.totals.add(one)
                if one.error is not None and sum(c.totals.n_failed for c in by_task.values()) <= SHOWN_ERRORS:
                    tqdm.write(f"skipped: {one.error}")
                counts.tally.check(finished=False)
                if time.monotonic() - last > FLUSH_SECONDS:
                    waiting, last = _keep(shards, waiting), time.monotonic()
        finally:
            _keep(shards, waiting)
    for counts in by_task.values():
        counts.tally.check()
    kept = [record for record in records if done[record.id].error is None]
    if not kept:
        raise ValueError(f"no usable record: all {len(records)} were skipped; the first: {done[records[0].id].error}")
    write_records((replace(record, rewards=tuple(done[record.id].rewards)) for record in kept), path)
    return by_task


def _of_reward(reward: str | None, tasks: Mapping[str, Task]) -> dict[str, str]:
    """What the rewards depend on: the name and, of a function of one's own, its source."""
    known = {"reward": reward or "of each record's task"}
    own = tasks.get(reward or "")
    if own is not None and own.fault is None:
        with contextlib.suppress(OSError, TypeError):  # an object, or code that is in no file
            known["source of the reward"] = fingerprint(inspect.getsource(own.reward))
    return known


def _scored(
    record: ListRecord,
    task: Task,
    tally: Tally,
    columns: Callable[[ListRecord], Mapping[str, Any]] | None,
    opened: str,
    skip_bad: bool,
) -> Finished:
    before = tally.unreadable
    try:
        judged = replace(record, responses=tuple(opened + answer for answer in record.responses)) if opened else record
        scored = score_record(judged, task, tally, columns(record) if columns else None)
    except RECORD_ERRORS as error:
        said = reason_of(error)
        shown = said if repr(record.id) in said else f"record {record.id!r}: {said}"
        if not skip_bad:
            raise ValueError(f"{shown}\n{SKIP_HINT}") from error
        return Finished(record.id, {}, error=shown)
    complete = list(record.complete or [True] * record.k)
    rewards = list(scored.rewards or ())
    return Finished(record.id, {}, list(record.responses), rewards, complete, tally.unreadable - before)


def _keep(shards: Shards, waiting: Sequence[Finished]) -> list[Finished]:
    if waiting:
        shards.append(*map(vars, waiting), what=f"the reward of {len(waiting)} records")
    return []
