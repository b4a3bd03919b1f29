"""Did it work? Models side by side on held-out records: asked, judged, measured.

    evaluation = evaluate(EvaluationConfig(["base=…", "aligned=…"], records="held_out.jsonl", output="out"))

Answers are saved to `out/answers.jsonl` as they are made, so a killed run resumes from there. The figures go to
`out/evaluation.json`; `perpo.evaluation.report` makes a page of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from perpo.data.fingerprints import record_fingerprint
from perpo.data.read import usable_records
from perpo.data.record import ListRecord
from perpo.encoding.prompt_check import PromptCheck
from perpo.evaluation.answer_store import Answers, AnswerStore, Key
from perpo.evaluation.answers import ask
from perpo.evaluation.config import EvaluationConfig
from perpo.evaluation.figures import Figures, ModelAnswers, figures
from perpo.evaluation.metrics import Metric, judge, metrics_of, task_in_format
from perpo.evaluation.models import ModelSource, parse_models
from perpo.evaluation.text_scores import check_tokenizer
from perpo.rewards.scoring import Tally, Task, UnreadableAnswers, bad_truths, find_task
from perpo.sampling.with_transformers import TransformersSampler
from perpo.storage.atomic import atomic_file
from perpo.storage.lock import held

ANSWERS, FIGURES = "answers.jsonl", "evaluation.json"
QUESTION = ("image", "prompt")  # fields of a record that its answers depend on


@dataclass(frozen=True)
class TaskEvaluation:
    """One task: its records, the answers of every model, the figures."""

    task: str
    records: list[ListRecord]
    answers: dict[str, ModelAnswers]  # model ->
    metrics: list[Metric]
    left_out: dict[str, str]  # metric -> why
    figures: Figures


@dataclass(frozen=True)
class Evaluation:
    config: EvaluationConfig
    models: list[ModelSource]
    identities: dict[str, str]  # model -> hash
    tasks: list[TaskEvaluation]
    notices: list[str] = field(default_factory=list)  # what a reader of the figures must know

    def as_json(self) -> dict[str, Any]:
        """The figures with their settings; what cannot be computed is null."""
        return {
            "settings": dataclasses.asdict(self.config),
            "models": [{**dataclasses.asdict(m), "identity": self.identities[m.name]} for m in self.models],
            "notices": self.notices,
            "tasks": [_task_json(task) for task in self.tasks],
        }


def evaluate(config: EvaluationConfig) -> Evaluation:
    """Ask, judge and measure; writes `answers.jsonl` and `evaluation.json` into `config.output`.

    Raises:
        ValueError: a setting, model, record or ground truth that cannot be used; the message names it.
        OSError: a file or folder that cannot be read or written.
        BlockingIOError: another process is evaluating into `config.output`.
    """
    with only_evaluation(config):
        return _evaluate(config)


def only_evaluation(config: EvaluationConfig) -> contextlib.AbstractContextManager[None]:
    """A block in which no other process evaluates into `config.output`, so that its files belong together."""
    return held(Path(config.output) / ".lock", f"output: {config.output}")


def _evaluate(config: EvaluationConfig) -> Evaluation:
    sources = parse_models(config.models)
    _check_formats(config, sources)
    for source in sources:
        source.check()
    records, report = usable_records(
        config.records,
        config,
        require=("answer",),
        root=config.image_root,
        limit=config.limit,
        prepare=partial(_with_task, config),
        bad_truths=partial(bad_truths, reward=config.reward),
        checks=lambda: [PromptCheck(source.load_processor(config), every=config.skip_bad) for source in sources],
    )
    n_bad = report.n_bad
    notices = [f"{n_bad} bad records were skipped; the first: {report.errors[0]}"] if n_bad else []
    tasks = _by_task(records, config)
    for task in tasks:
        if task in ("ocr", "ocr-words"):
            check_tokenizer(config.bleu_tokenize)
    output = Path(config.output)
    identities: dict[str, str] = {}
    asked: dict[str, dict[str, dict[str, Answers]]] = {}  # model -> kind -> record id -> answers
    with AnswerStore(output / ANSWERS) as store:
        contents = {record.id: record_fingerprint(record, QUESTION, config.image_root) for record in records}
        for source in sources:
            identities[source.name] = source.identity(_answer_options(config))
            asked[source.name] = _ask(source, identities[source.name], records, contents, config, store)
    notices += _seen_differently(records, asked)
    evaluated = []
    for task, members in tasks.items():
        answers = {}
        for source in sources:
            name = task_in_format(task, config.box_format_of(source.name))
            judged_by = find_task(name, of_record=None if config.reward else members[0].id)
            answers[source.name], remarks = _judged(source.name, judged_by, members, asked[source.name])
            notices += remarks
        metrics, left_out = metrics_of(task, config.bleu_tokenize)
        options = {"draws": config.resamples, "confidence": config.confidence, "seed": config.seed}
        found = figures(answers, metrics, **options)  # type: ignore[arg-type]  # each has its type
        evaluated.append(TaskEvaluation(task, members, answers, metrics, left_out, found))
    evaluation = Evaluation(config, sources, identities, evaluated, notices)
    with atomic_file(output / FIGURES) as file:
        text = json.dumps(_without_nan(evaluation.as_json()), indent=1, ensure_ascii=False, allow_nan=False)
        file.write(text.encode(errors="replace") + b"\n")
    return evaluation


def _seen_differently(records: Sequence[ListRecord], asked: dict[str, dict[str, dict[str, Answers]]]) -> list[str]:
    """Notices of models that saw the pictures in other sizes than the first one: they are not compared alike."""
    first, *others = asked
    notices = []
    for other in others:
        sizes = {model: {r.id: asked[model]["greedy"][r.id].image_size for r in records} for model in (first, other)}
        differ = [r.id for r in records if sizes[first][r.id] != sizes[other][r.id]]
        if differ:
            of_one = [sizes[model][differ[0]] or ("no picture",) for model in (first, other)]
            shown = ["×".join(map(str, size)) for size in of_one]
            notices.append(
                f"{first} and {other} saw {len(differ)} of {len(records)} pictures in other sizes (of {differ[0]!r}, "
                f"{first}: {shown[0]} and {other}: {shown[1]}); their processors differ. --processor_options sets them "
                "alike, as in max_pixels"
            )
    return notices


# ----------------------------------------------------------------------------------------------------------- asking


def _ask(
    source: ModelSource,
    identity: str,
    records: Sequence[ListRecord],
    contents: dict[str, str],
    config: EvaluationConfig,
    store: AnswerStore,
) -> dict[str, dict[str, Answers]]:
    """kind -> record id -> answers, from the store if they are there, otherwise from the model."""
    kinds = {
        "greedy": list(records),
        "blank": [record for record in records if record.image is not None] if config.blank_test else [],
        "sampled": list(records) if config.n else [],
    }

    def key(kind: str, record: ListRecord) -> Key:
        return Key(identity, config.condition(kind), record.id, contents[record.id])

    left = {kind: [r for r in members if key(kind, r) not in store] for kind, members in kinds.items()}
    total, n_left = sum(map(len, kinds.values())), sum(map(len, left.values()))
    if n_left:
        model, encoder = source.load(config, config.device)
        with tqdm(total=total, initial=total - n_left, desc=source.name, unit="question") as bar:
            for kind, members in left.items():
                sampler = TransformersSampler(model, encoder, config.sampling(kind), answers_at_once=config.batch_size)
                n = config.n if kind == "sampled" else 1
                members.sort(key=lambda record: record.image is None)  # the sampler splits a batch that mixes them
                for start in range(0, len(members), sampler.batch_size):
                    batch = members[start : start + sampler.batch_size]
                    answers = ask(sampler, batch, n, config.image_root, blank=kind == "blank")
                    store.add((key(kind, r), a) for r, a in zip(batch, answers, strict=True))
                    bar.update(len(batch))
                del sampler
        del model, encoder
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return {kind: {r.id: store[key(kind, r)] for r in members} for kind, members in kinds.items()}


def _answer_options(config: EvaluationConfig) -> dict[str, Any]:
    """Settings that change the answers of every model."""
    names = ("dtype", "attn_implementation", "trust_remote_code", "processor_options")
    return {name: getattr(config, name) for name in names}


# ---------------------------------------------------------------------------------------------------------- judging


def _by_task(records: Sequence[ListRecord], config: EvaluationConfig) -> dict[str, list[ListRecord]]:
    tasks: dict[str, list[ListRecord]] = {}
    for record in records:
        tasks.setdefault(config.reward or record.task, []).append(record)
    return tasks


def _check_formats(config: EvaluationConfig, sources: Sequence[ModelSource]) -> None:
    names = {source.name for source in sources}
    for text in config.box_formats:
        name, equals, _ = text.partition("=")
        if equals and name not in names:
            raise ValueError(f"box_formats: {text!r} is for a model {name!r}; there are {', '.join(sorted(names))}")
    for source in sources:
        config.box_format_of(source.name)


def _with_task(config: EvaluationConfig, record: ListRecord) -> ListRecord:
    if not (config.reward or record.task):
        raise ValueError(f"record {record.id!r} names no task: give its task, or a reward for all records")
    return record


def _judged(
    model: str, task: Task, records: Sequence[ListRecord], asked: dict[str, dict[str, Answers]]
) -> tuple[ModelAnswers, list[str]]:
    """The answers of a model to a task's records with their rewards, and notices for the report."""
    tally, others = Tally(), Tally()
    greedy = [judge(r, (a := asked["greedy"][r.id]).texts, task, a.image_size, tally)[0] for r in records]
    blank = [
        judge(r, (a := asked["blank"][r.id]).texts, task, a.image_size, others)[0] if r.id in asked["blank"] else None
        for r in records
    ]
    sampled = [
        judge(r, (a := asked["sampled"][r.id]).texts, task, a.image_size, others)
        for r in records
        if r.id in asked["sampled"]
    ]
    n_cut = sum(asked["greedy"][r.id].n_cut for r in records)
    notices = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnreadableAnswers)
        tally.check()
    for warning in caught:
        warnings.warn(f"{model}, {task.name}: {warning.message}", UnreadableAnswers, stacklevel=2)
        examples = "; ".join(map(repr, tally.examples))
        notices.append(
            f"{model}, {task.name}: {tally.summary()}. Expected: {tally.expected}. Found, for example: {examples}"
        )
    if 2 * n_cut > len(records):
        notices.append(f"{model}, {task.name}: {n_cut} of {len(records)} answers were cut by max_new_tokens; raise it")
    return ModelAnswers(greedy, blank if any(blank) else None, sampled, n_cut), notices


# ------------------------------------------------------------------------------------------------------------- JSON


def _task_json(task: TaskEvaluation) -> dict[str, Any]:
    models = {}
    for model, answers in task.answers.items():
        figures_of = task.figures.by_model[model]
        models[model] = {
            "metrics": {
                name: {kind: found and found._asdict() for kind, found in figure._asdict().items()}
                for name, figure in figures_of.items()
            },
            "mean_best_reward_of_k": [found._asdict() for found in task.figures.best_of_k.get(model, [])],
            "cut_answers": answers.n_cut,
        }
    return {
        "task": task.task,
        "n_records": len(task.records),
        "n_with_image": sum(record.image is not None for record in task.records),
        "metrics": {m.name: {"label": m.label, "higher_is_better": m.higher_is_better} for m in task.metrics},
        "left_out": task.left_out,
        "models": models,
    }


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
