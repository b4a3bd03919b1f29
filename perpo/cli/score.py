"""`perpo score`: rewards for answers that exist, from whatever model, program or person gave them.

perpo score --records answers.jsonl --task ocr --output lists.jsonl
perpo score --records questions.jsonl --responses answers.jsonl --reward my_rewards:days_apart --output lists.jsonl

Run again after a kill, the same command goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perpo.cli.rewarding import RewardSettings
from perpo.data.documents import mapping
from perpo.data.images import image_size
from perpo.data.read import SKIP_HINT, read_records
from perpo.data.record import ListRecord
from perpo.data.responses import answer_records, read_responses
from perpo.encoding.encoder import Encoder
from perpo.model.load import load_processor
from perpo.model.settings import check_place
from perpo.rewards.formats import box_format
from perpo.rewards.scoring import find_task
from perpo.sampling.existing import TaskTotals, score_existing


@dataclass
class ScoreConfig(RewardSettings):
    """Which answers, and what they are scored by."""

    records: str = field(
        metadata={
            "help": "Prompts, true answers and responses: a file, or hf://owner/name:split. Rewards are replaced."
        }
    )
    output: str = field(
        metadata={"help": "Lists for `perpo train`: .jsonl or .parquet. Finished records are kept in OUTPUT.parts."}
    )
    responses: str | None = field(
        default=None,
        metadata={"help": "Responses that are kept apart: rows of id and response, or of id and responses."},
    )
    image_root: str | None = field(
        default=None, metadata={"help": "Folder that image paths are under; default: any path is allowed."}
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "The model that answered, for boxes in pixels and rewards that take image_size: its processor says "
            "at which size it saw an image. Its weights are not loaded.",
            "aliases": ["--model"],
        },
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the hub."})
    processor_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Those that the answers were made with, as JSON or YAML mapping."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that comes with the model. Only for sources that you trust."}
    )
    skip_bad: bool = field(default=False, metadata={"help": "Leave out bad records and count them."})

    def __post_init__(self) -> None:
        self.processor_options = mapping("processor_options", self.processor_options)
        for name in ("model_revision", "processor_options"):
            if getattr(self, name) and self.model_name_or_path is None:
                raise ValueError(f"{name} has no effect without model_name_or_path: give that too, or leave it out")
        if self.answer_format is not None:
            box_format(self.answer_format)


SETTINGS = (ScoreConfig,)


def run(config: ScoreConfig) -> None:
    if not Path(config.output).parent.is_dir():
        raise ValueError(f"output: there is no folder {str(Path(config.output).parent)!r}")
    reward = config.named(config.reward)
    own = reward is not None and find_task(reward).fault is None
    records = _read(config, needs_answer=not own)
    seen, identity, opened = _seen(config, records, reward)
    scored = score_existing(
        records,
        config.output,
        reward=reward,
        columns=seen,
        identity=identity,
        opened=opened,
        image_root=config.image_root,
        skip_bad=config.skip_bad,
    )
    print(summary(scored))
    print(f"written to {config.output}")


def _read(config: ScoreConfig, needs_answer: bool) -> list[ListRecord]:
    apart = None if config.responses is None else read_responses(config.responses)
    require = ["answer"] * needs_answer + ["responses"] * (apart is None)
    records: Sequence[ListRecord]
    records, report = read_records(config.records, require=require, skip_bad=config.skip_bad)
    report.show()
    if apart is not None:
        records, without = answer_records(records, apart.of_id)
        if without and not config.skip_bad:
            raise ValueError(
                f"responses: {config.responses} has none for {len(without)} records, such as {without[0]!r}\n"
                f"{SKIP_HINT}"
            )
        left_out = f"; {len(without)} records without any left out" if without else ""
        unused = f"; fields not used: {', '.join(sorted(apart.ignored))}" if apart.ignored else ""
        print(f"{config.responses}: {sum(r.k for r in records)} responses to {len(records)} records{left_out}{unused}")
    replaced = sum(record.rewards is not None for record in records)
    if replaced:
        print(f"{replaced} records have rewards already, which are replaced")
    return [config.with_task(record) for record in records]


def _seen(
    config: ScoreConfig, records: Sequence[ListRecord], reward: str | None
) -> tuple[Callable[[ListRecord], Mapping[str, Any]] | None, dict[str, str], str]:
    """What gives the column image_size, what it depends on, and what the model's template begins each answer with.

    Raises:
        ValueError: a record's boxes are in pixels as a model saw them, and nothing says which size that was.
    """
    if config.model_name_or_path is not None:
        check_place(config.model_name_or_path)
        options = mapping("processor_options", config.processor_options)
        options |= {} if config.model_revision is None else {"revision": config.model_revision}
        processor = load_processor(config.model_name_or_path, trust_remote_code=config.trust_remote_code, **options)
        encoder = Encoder(processor)
        if not encoder.sees_images:
            raise ValueError(f"model: {config.model_name_or_path} takes no images, so it says nothing about their size")
        identity = {"image size": encoder.fingerprint()["image processor"]}
        return lambda record: _size(record, config, encoder.seen_size), identity, encoder.opened
    for record in records:
        task, _, form = (reward or record.task).partition("/")
        pixels = task in ("grounding", "grounding-giou") and form and box_format(form).scale is None
        if pixels and "image_size" not in record.columns:
            raise ValueError(
                f"record {record.id!r}: {form} models write boxes in pixels of the image as they saw it; name the "
                "model (its processor says the size), with the processor_options that the answers were made with, or "
                "give each record that (width, height) as image_size"
            )
    if any("llava-pad" in (reward or record.task) for record in records):
        return lambda record: _size(record, config, lambda size: size), {"image size": "as it is"}, ""
    return None, {}, ""


def _size(
    record: ListRecord, config: ScoreConfig, seen: Callable[[tuple[int, int]], tuple[int, int]]
) -> dict[str, Any]:
    return {} if record.image is None else {"image_size": seen(image_size(record.image, config.image_root))}


def summary(scored: Mapping[str, TaskTotals]) -> str:
    """A line a task: how many, how good, and which shares were unreadable or tied."""
    width = max(len("task"), *map(len, scored))
    lines = [f"{'task':{width}}  lists  answers    mean    best  unreadable    tied  lists with a preference"]
    for name, counts in scored.items():
        t = counts.totals
        lists, answers = max(t.n_lists, 1), max(t.n_answers, 1)
        failed = f"; {t.n_failed} bad records skipped" if t.n_failed else ""
        lines.append(
            f"{name:{width}}  {t.n_lists:5}  {t.n_answers:7}  {t.reward_sum / answers:6.3f}  {t.best_sum / lists:6.3f}"
            f"  {t.n_unreadable / answers:10.1%}  {t.n_tied / answers:6.1%}  {t.n_active / lists:.1%}{failed}"
        )
        lines += [f"{'':{width}}  {count} answers: {why}" for why, count in counts.tally.faults.most_common()]
    return "\n".join(lines)
