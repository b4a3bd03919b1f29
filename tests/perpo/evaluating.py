"""Small projects, and evaluations of made-up answers, that the evaluation tests share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import perpo.evaluation.evaluate
from perpo.data.record import ListRecord, write_records
from perpo.evaluation.answer_store import Answers
from perpo.evaluation.config import EvaluationConfig
from perpo.evaluation.evaluate import Evaluation, evaluate
from perpo.evaluation.models import ModelSource

from . import tiny_models


class AnyPrompt:
    """A processor that takes everything."""

    sees_images = True

    def __call__(self, *record: Any) -> None:
        pass


def save_models(folder: Path, *names: str) -> None:
    """A tiny LLaVA of other weights under each name."""
    for seed, name in enumerate(names):
        model, processor = tiny_models.build("llava", seed=seed)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)


def save_records(folder: Path, records: Sequence[ListRecord]) -> Path:
    """The records as a file, their pictures beside it."""
    kept = []
    for i, record in enumerate(records):
        tiny_models.picture((40, 28) if i % 2 else (28, 40), i).save(folder / f"{record.id}.png")
        kept.append(ListRecord(record.id, f"{record.id}.png", record.prompt, record.answer, record.task))
    write_records(kept, folder / "held_out.jsonl")
    return folder / "held_out.jsonl"


def ocr_records(n: int = 4) -> list[ListRecord]:
    return [ListRecord(f"r{i}", None, f"Read {i}.", f"word {i}", "ocr") for i in range(n)]


def settings(folder: Path, *models: str, **options: Any) -> EvaluationConfig:
    small: dict[str, Any] = {"n": 3, "batch_size": 2, "max_new_tokens": 4, "resamples": 50, "device": "cpu"}
    return EvaluationConfig(
        models=[f"{name}={folder / name}" for name in models],
        records=str(folder / "held_out.jsonl"),
        output=str(folder / "out"),
        image_root=str(folder),
        **(small | options),
    )


def evaluate_made_up(
    folder: Path,
    records: Sequence[ListRecord],
    answers: Mapping[str, Mapping[str, Sequence[Sequence[str]]]],  # model -> kind -> of each record its texts
    monkeypatch: pytest.MonkeyPatch,
    **options: Any,
) -> Evaluation:
    """`evaluate`, with these answers in the place of models'."""
    for name in answers:
        (folder / name).mkdir(exist_ok=True)
    if not (folder / "held_out.jsonl").exists():
        save_records(folder, records)

    def ask(source: Any, *rest: Any) -> dict[str, dict[str, Answers]]:
        given = {"greedy": [], "blank": [], "sampled": [], **answers[source.name]}
        return {
            kind: {r.id: Answers(tuple(t), (40, 28)) for r, t in zip(records, texts, strict=False)}
            for kind, texts in given.items()
        }

    monkeypatch.setattr(perpo.evaluation.evaluate, "_ask", ask)
    monkeypatch.setattr(perpo.evaluation.evaluate, "PromptCheck", lambda *_, **__: AnyPrompt())
    monkeypatch.setattr(ModelSource, "load_processor", lambda *_: None)
    return evaluate(settings(folder, *answers, **options))
