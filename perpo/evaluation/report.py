"""The report of an evaluation: one HTML page that needs nothing else, with tables, plots and example pictures.

What it looks like is in report.html.jinja. Every text in it comes from data or models and is escaped by the template;
the page forbids itself to load anything or to run scripts.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from perpo.evaluation.bootstrap import ENOUGH
from perpo.evaluation.evaluate import Evaluation, TaskEvaluation
from perpo.evaluation.examples import choose_examples, example_picture, question
from perpo.evaluation.plots import TRUTH, best_of_k_plot, metrics_plot, model_colours, no_image_plot, rounds_plot
from perpo.rewards.completions import final_answer
from perpo.storage.atomic import atomic_file

REPORT = "report.html"
_LONGEST = 400  # characters of a text shown


def write_report(evaluation: Evaluation, folder: str | os.PathLike[str] | None = None) -> Path:
    """Write `report.html` into the folder (by default the evaluation's own), whole or not at all."""
    path = Path(evaluation.config.output if folder is None else folder) / REPORT
    with atomic_file(path) as file:
        file.write(report_html(evaluation).encode(errors="replace"))
    return path


def report_html(evaluation: Evaluation) -> str:
    """The whole page."""
    environment = Environment(
        loader=PackageLoader("perpo.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"base64": lambda content: base64.b64encode(content).decode(), "shown": _shown}
    return environment.get_template("report.html.jinja").render(
        evaluation=evaluation,
        config=evaluation.config,
        sections=[_section(task, evaluation) for task in evaluation.tasks],
        question=question,
        truth_colour=TRUTH,
        enough=ENOUGH,
    )


def _section(task: TaskEvaluation, evaluation: Evaluation) -> dict[str, Any]:
    """A task with its plots and examples; each example with its picture, or None where there is no image."""
    config, colours = evaluation.config, model_colours(list(task.answers))
    chosen = choose_examples(task, config.examples, config.seed)
    return {
        "task": task,
        "colours": colours,
        "metrics_plot": metrics_plot(task),
        "rounds_plot": rounds_plot(task),
        "best_of_k_plot": best_of_k_plot(task),
        "no_image_plot": no_image_plot(task),
        "examples": {
            title: [(example, example_picture(example, colours, config.image_root)) for example in examples]
            for title, examples in chosen.items()
        },
    }


def _shown(text: str) -> str:
    """A text as it stands, cut where it is long; of an answer with thoughts, how long they are and what follows."""
    final = final_answer(text)
    if final is not None and len(final) < len(text) - _LONGEST // 2:
        text = f"({len(text) - len(final)} characters before the answer) {final.strip()}"
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
