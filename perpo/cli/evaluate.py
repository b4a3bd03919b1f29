"""`perpo evaluate`: models side by side on held-out records, as figures (JSON) and as a page (HTML)."""

from __future__ import annotations

from perpo.evaluation.cards import update_cards
from perpo.evaluation.config import EvaluationConfig
from perpo.evaluation.evaluate import ANSWERS, FIGURES, Evaluation, evaluate, only_evaluation
from perpo.evaluation.report import write_report

SETTINGS = (EvaluationConfig,)
OUT_OF_MEMORY = "set batch_size to fewer answers\n"


def run(config: EvaluationConfig) -> None:
    with only_evaluation(config):
        evaluation = evaluate(config)
        report = write_report(evaluation)
        cards = update_cards(evaluation)
    print(summary(evaluation))
    print(f"\nfigures: {report.with_name(FIGURES)}\nanswers: {report.with_name(ANSWERS)}\nreport:  {report}")
    for card in cards:
        print(f"card:    {card}")


def summary(evaluation: Evaluation) -> str:
    """A table a task: greedy figures with their intervals, and the gap of the no-image test."""
    lines = []
    for task in evaluation.tasks:
        models = list(task.answers)
        lines += ["", f"{task.task}: {len(task.records)} records", " " * 22 + "".join(f"{m[:24]:>26}" for m in models)]
        for metric in task.metrics:
            found = [task.figures.by_model[model][metric.name] for model in models]
            cells = [f"{f.greedy.value:.3f} {f.greedy.words()}" for f in found]
            lines.append(f"{metric.label:22}" + "".join(f"{cell:>26}" for cell in cells))
        metric = task.metrics[0]
        gaps = [task.figures.by_model[model][metric.name].gap for model in models]
        if any(gaps):
            cells = [f"{g.value:+.3f} {g.words(sign='+')}" if g else "–" for g in gaps]
            lines.append(f"{'gap without image':22}" + "".join(f"{cell:>26}" for cell in cells))
    lines += [f"\nNOTE {notice}" for notice in evaluation.notices]
    return "\n".join(lines).strip()
