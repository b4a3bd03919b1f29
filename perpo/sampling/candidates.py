"""Sample and score k candidates for every record: from labelled images to the lists that training takes.

Each process takes every world_size-th record and saves it as soon as it is scored (`perpo.sampling.shards`). The last
process to finish writes the output atomically, in the order of the records.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from perpo.data.images import ImageError, open_image
from perpo.data.read import SKIP_HINT, reason_of
from perpo.data.record import ListRecord, write_records
from perpo.data.summary import summary
from perpo.rewards.scoring import Tally, Task, score_record, task_of
from perpo.sampling.in_flight import InFlight
from perpo.sampling.sampler import Answer, Question, Sampler, distinct_answers
from perpo.sampling.shards import Finished, Shards, check_sources, source_of

SHOWN_ERRORS = 20  # of skipped records; all are counted
# What tokenizers, processors and rewards raise where they stumble over a record; not what a device or a disk does.
RECORD_ERRORS = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError)


# A record, what was asked, and what came of it.
Asked = tuple[ListRecord, Question | None, list[Answer] | Exception]


@dataclass(frozen=True)
class CandidateConfig:
    """How many answers are sampled for each record, and how they are scored.

    Attributes:
        k: answers to each record.
        max_samples: at most this many answers are drawn to find k distinct ones; then repeats are kept. None: 2 k.
        reward: name or import path of the reward for all records. None: each record's task names its own.
        skip_bad: skip and count the records whose image cannot be opened, whose prompt is too long, or whose answer
            the reward cannot read.
        image_root: the folder that image paths must lie in; None allows any path.
    """

    k: int = 20
    max_samples: int | None = None
    reward: str | None = None
    skip_bad: bool = False
    image_root: str | None = None

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be ≥ 1, got {self.k}")
        if self.max_samples is not None and self.max_samples < self.k:
            raise ValueError(f"max_samples must be ≥ k = {self.k}, got {self.max_samples}")

    def identity(self) -> dict[str, str]:
        return {"k": str(self.k), "max_samples": str(self._most), "reward": self.reward or "of each record's task"}

    @property
    def _most(self) -> int:
        return 2 * self.k if self.max_samples is None else self.max_samples

    def answers(self, sampler: Sampler, questions: Sequence[Question]) -> list[list[Answer]]:
        return distinct_answers(sampler, questions, self.k, self._most)


@dataclass
class Totals:
    """Counts over finished lists."""

    n_lists: int = 0
    n_failed: int = 0
    n_answers: int = 0
    n_repeats: int = 0
    n_cut: int = 0
    n_unreadable: int = 0
    n_active: int = 0  # lists with a preference
    n_tied: int = 0  # answers with the reward of another answer of their list
    reward_sum: float = 0.0
    best_sum: float = 0.0

    def add(self, one: Finished) -> None:
        if one.error is not None:
            self.n_failed += 1
            return
        self.n_lists += 1
        self.n_answers += len(one.responses)
        self.n_repeats += len(one.responses) - len(set(one.responses))
        self.n_cut += one.complete.count(False)
        self.n_unreadable += one.unreadable
        rewards = Counter(one.rewards)
        self.n_active += len(rewards) > 1
        self.n_tied += sum(n for n in rewards.values() if n > 1)
        self.reward_sum += sum(one.rewards)
        self.best_sum += max(one.rewards)

    @property
    def short(self) -> str:
        """For a progress bar."""
        lists, answers = max(self.n_lists, 1), max(self.n_answers, 1)
        return summary(
            f"reward {self.reward_sum / answers:.3f}",
            f"best {self.best_sum / lists:.3f}",
            f"active {self.n_active / lists:.0%}",
            f"unreadable {self.n_unreadable / answers:.0%}",
            (self.n_failed, "skipped"),
            separator=", ",
        )

    def summary(self) -> str:
        """A few lines to print."""
        lists, answers = max(self.n_lists, 1), max(self.n_answers, 1)
        return summary(
            f"{self.n_lists} lists, {self.n_answers} answers; mean reward {self.reward_sum / answers:.3f}, of the best "
            f"in a list {self.best_sum / lists:.3f}; {self.n_active / lists:.1%} of the lists hold a preference",
            f"{self.n_repeats / answers:.1%} of the answers repeat another of their list" if self.n_repeats else "",
            f"{self.n_cut / answers:.1%} of the answers were cut by max_new_tokens" if self.n_cut else "",
            f"{self.n_unreadable / answers:.1%} of the answers could not be read" if self.n_unreadable else "",
            (self.n_failed, "bad records skipped"),
            separator="\n",
        )


@dataclass(frozen=True)
class Outcome:
    """The result of `generate`.

    Attributes:
        totals: of all records if the output was written, otherwise of this process' share.
        n_missing: records that other processes have not finished yet; the output is written once this is 0.
    """

    totals: Totals
    n_missing: int


def generate(
    records: Sequence[ListRecord],
    sampler: Sampler,
    output: str | os.PathLike[str],
    config: CandidateConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> Outcome:
    """Answer and score the records that are not in `{output}.parts` yet; write `output` when all of them are.

    Args:
        records: with an answer, and a task unless config.reward is given. Their responses are replaced.
        output: a .jsonl or .parquet file.
        rank, world_size: this process' number, and how many processes there are.

    Raises:
        ValueError: a bad record, unless skip_bad; an unknown reward; an output that cannot hold the records.
        StaleError: `{output}.parts` holds answers made with another model, setting or record.
        OSError: no space left; what was finished before is kept.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1} (world_size - 1), got {rank}")
    path = Path(output)
    folder = parts_folder(path)
    check_output(records, path, folder)
    naming = {config.reward or record.task: record for record in records}
    tasks = {name: task_of(record, config.reward) for name, record in naming.items() if name}
    worker = _Worker(sampler, config, tasks)
    with Shards(folder, config.identity() | sampler.identity(), rank) as shards:
        finished = shards.read()
        check_sources(records, finished, folder, config.image_root)
        share = records[rank::world_size]
        done = {one.id for one in finished.values() if one.error is None}
        for record in share:
            if record.id in done:
                worker.recall(finished[record.id])
        left = [i for i, record in enumerate(share) if record.id not in done]
        label = "generate" if world_size == 1 else f"generate {rank}/{world_size}"
        bar = tqdm(total=len(share), initial=len(share) - len(left), desc=label, unit="list", disable=rank != 0)
        del finished  # their memory is free while the others are answered
        with bar:
            for one in worker.run(share, left):
                shards.add(one)
                worker.totals.add(one)
                bar.set_postfix_str(worker.totals.short, refresh=False)
                bar.update()
                if one.error is not None and worker.totals.n_failed <= SHOWN_ERRORS:
                    bar.write(f"skipped: {one.error}")
                worker.tally.check(finished=False)
        worker.tally.check()
        finished = shards.read()
    n_missing = sum(record.id not in finished for record in records)
    if n_missing:
        return Outcome(worker.totals, n_missing)
    return Outcome(merge(records, finished, path), 0)


def merge(records: Sequence[ListRecord], finished: Mapping[str, Finished], path: Path) -> Totals:
    """Write the records that did not fail, with their answers."""
    totals = Totals()
    for record in records:
        totals.add(finished[record.id])
    if not totals.n_lists:
        first = next(iter(finished.values())).error if finished else "there are none"
        raise ValueError(f"no usable record: all {totals.n_failed} were skipped; the first: {first}")
    kept = (finished[record.id].attach(record) for record in records if finished[record.id].error is None)
    try:
        write_records(kept, path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror or error}: {path} was not written, but all answers are in {path.name}.parts: fix this "
            "and run the same command again",
        ) from error
    return totals


def check_output(records: Sequence[ListRecord], path: Path, folder: Path) -> None:
    """Raise at the start what would otherwise fail at the end."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"output must be a .jsonl or .parquet file, got {str(path)!r}")
    held = next((r for r in records if not isinstance(r.image, str | os.PathLike | None)), None)
    if path.suffix == ".jsonl" and held is not None:
        raise ValueError(
            f"output: record {held.id!r} contains its image, and {path.name!r} can store only paths; name a .parquet "
            "file"
        )
    if path.exists() and not folder.exists():
        raise ValueError(
            f"output: {path} exists, and there is no {folder.name} to resume from; move it away or name another file"
        )
    if len({record.id for record in records}) < len(records):
        raise ValueError("records: ids must be distinct, since finished records are found by their id")


def parts_folder(output: str | os.PathLike[str]) -> Path:
    """Where finished records are kept, before and after the output is written."""
    return Path(f"{os.fspath(output)}.parts")


class _Worker:
    """Answers and scores records, and counts the results."""

    def __init__(self, sampler: Sampler, config: CandidateConfig, tasks: Mapping[str, Task]) -> None:
        self.sampler = sampler
        self.config = config
        self.tasks = tasks
        self.tally = Tally()
        self.totals = Totals()

    def recall(self, one: Finished) -> None:
        """Count a record that was finished before this run resumed."""
        self.totals.add(one)
        self.tally.total += len(one.responses)
        self.tally.unreadable += one.unreadable

    def run(self, records: Sequence[ListRecord], left: Sequence[int]) -> Iterator[Finished]:
        """Those of these numbers, in the order in which they are answered.

        After an error no further question is asked, and those that were are finished first.
        """
        size = self.sampler.batch_size
        batches = ([records[i] for i in left[start : start + size]] for start in range(0, len(left), size))
        flights = InFlight(self._asked, getattr(self.sampler, "in_flight", 1))
        first: Exception | None = None
        while True:
            while first is None and flights.has_room and (batch := next(batches, None)) is not None:
                flights.begin(batch)
            if not flights.pending:
                break
            try:
                results = flights.result()
            except Exception as error:
                first = first or error
                continue
            for record, question, answers in results:
                try:
                    one = self._finished(record, question, answers)
                except ValueError as error:
                    first = first or error
                else:
                    yield one
        if first is not None:
            raise first

    def _asked(self, records: Sequence[ListRecord]) -> list[Asked]:
        """Each with its answers, or why it has none. Called in several threads if the sampler can be."""
        unopened: list[Asked] = []
        asked: list[tuple[ListRecord, Question]] = []
        for record in records:
            try:
                image = None if record.image is None else open_image(record.image, self.config.image_root)
            except ImageError as error:
                unopened.append((record, None, error))
            else:
                # For the type checker: a prompt was checked as the record was made.
                asked.append((record, Question(record.id, record.prompt, image)))  # type: ignore[arg-type]
        return [*self._answered(asked), *unopened]

    def _answered(self, asked: Sequence[tuple[ListRecord, Question]]) -> list[Asked]:
        if not asked:
            return []
        try:
            lists = self.config.answers(self.sampler, [question for _, question in asked])
        except RECORD_ERRORS as error:
            if len(asked) == 1:
                return [(*asked[0], error)]
            half = len(asked) // 2  # one of them is bad: a search by halves keeps batches large
            return [*self._answered(asked[:half]), *self._answered(asked[half:])]
        return [(record, question, answers) for (record, question), answers in zip(asked, lists, strict=True)]

    def _finished(self, record: ListRecord, question: Question | None, answers: list[Answer] | Exception) -> Finished:
        if isinstance(answers, Exception):
            return self._failed(record, answers)
        assert question is not None
        try:
            return self._scored(record, question, answers)
        except RECORD_ERRORS as error:
            return self._failed(record, error)

    def _scored(self, record: ListRecord, question: Question, answers: Sequence[Answer]) -> Finished:
        columns = {} if question.image is None else {"image_size": self.sampler.encoder.seen_size(question.image.size)}
        unreadable = self.tally.unreadable
        scored = score_record(
            record.answered([self.sampler.encoder.opened + answer.text for answer in answers]),
            self.tasks.get(self.config.reward or record.task),
            self.tally,
            columns,
        )
        return Finished(
            record.id,
            source_of(record, self.config.image_root),
            [answer.text for answer in answers],
            list(scored.rewards or ()),
            [answer.complete for answer in answers],
            self.tally.unreadable - unreadable,
        )

    def _failed(self, record: ListRecord, error: Exception) -> Finished:
        said = reason_of(error)
        shown = said if repr(record.id) in said else f"record {record.id!r}: {said}"
        if not self.config.skip_bad:
            raise ValueError(f"{shown}\n{SKIP_HINT}") from error
        return Finished(record.id, source_of(record, self.config.image_root), error=shown)
