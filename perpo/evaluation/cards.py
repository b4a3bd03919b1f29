"""What an evaluation found, written into the model cards of the models that perpo trained."""

from __future__ import annotations

from pathlib import Path

from perpo.evaluation.bootstrap import Interval
from perpo.evaluation.evaluate import Evaluation
from perpo.storage.atomic import atomic_file
from perpo.training.card import CARD, with_evaluation


def update_cards(evaluation: Evaluation) -> list[Path]:
    """Replace the section on evaluation of every card that has one; returns those cards."""
    updated = []
    for source in evaluation.models:
        card = Path(source.adapter or source.base) / CARD
        if not card.is_file():
            continue
        text = with_evaluation(card.read_text(encoding="utf-8"), _section(evaluation, source.name))
        if text is not None:
            with atomic_file(card) as file:
                file.write(text.encode())
            updated.append(card)
    return updated


def _section(evaluation: Evaluation, model: str) -> str:
    """Greedy figures of a model beside those of the first, with intervals over records."""
    first, config = evaluation.models[0].name, evaluation.config
    others = [first] if model != first else []
    head = [f"with {config.confidence:.0%} intervals of a bootstrap over records; greedy answers"]
    lines = [f"On held-out records, {head[0]}:", ""]
    columns = ["task", "records", "metric", model, *others, *(["difference"] if others else [])]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for task in evaluation.tasks:
        for metric in task.metrics:
            figure = task.figures.by_model[model][metric.name]
            cells = [task.task, str(len(task.records)), metric.label, _shown(figure.greedy)]
            cells += [_shown(task.figures.by_model[name][metric.name].greedy) for name in others]
            cells += [_shown(figure.over_first, "+")] if others else []
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join([*lines, *(f"\n- {notice.splitlines()[0]}" for notice in evaluation.notices)])


def _shown(found: Interval | None, sign: str = "") -> str:
    return "–" if found is None else f"{found.value:{sign}.3f} {found.words(sign=sign)}"
