"""The report of an evaluation: one HTML page that needs nothing else, with tables, plots and example pictures.

Every text in it comes from data or models and is escaped; the page forbids itself to load anything or to run scripts.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from perpo.data.files import atomic_file
from perpo.evaluation.bootstrap import Interval
from perpo.evaluation.evaluate import Evaluation, TaskEvaluation
from perpo.evaluation.examples import Example, choose_examples, example_picture, question
from perpo.evaluation.figures import Figure
from perpo.evaluation.metrics import Metric
from perpo.evaluation.plots import TRUTH, best_of_k_plot, metrics_plot, model_colours, no_image_plot

REPORT = "report.html"
_LONGEST = 400  # characters of a text shown

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d6dde6; padding-bottom: .3rem; }
table { border-collapse: collapse; margin: .6rem 0 1.2rem; }
th, td { padding: .3rem .8rem; text-align: left; border-bottom: 1px solid #e6ebf1; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.interval { color: #687687; font-size: 85%; } .better { color: #14773d; } .worse { color: #b3261e; }
.notice { background: #fff4e0; border-left: 4px solid #e0a030; padding: .5rem .9rem; margin: .6rem 0; }
.note { color: #55616e; max-width: 80ch; } img { max-width: 100%; height: auto; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 1.2rem; }
figure { margin: 0; } figcaption { font-size: 85%; overflow-wrap: anywhere; }
.answer { border-left: 4px solid; padding-left: .5rem; margin: .2rem 0; white-space: pre-wrap; }
""".strip()


def write_report(evaluation: Evaluation, folder: str | os.PathLike[str] | None = None) -> Path:
    """Write `report.html` into the folder (the evaluation's own unless told otherwise), whole or not at all."""
    path = Path(evaluation.config.output if folder is None else folder) / REPORT
    with atomic_file(path) as file:
        file.write(report_html(evaluation).encode(errors="replace"))
    return path


def report_html(evaluation: Evaluation) -> str:
    """The whole page."""
    config = evaluation.config
    models = [[model.name, model.shown, evaluation.identities[model.name]] for model in evaluation.models]
    settings = (
        f"{escape(config.records)} · answers of at most {config.max_new_tokens} tokens · intervals: "
        f"{config.confidence:.0%} percentile bootstrap over records, {config.resamples} draws · seed {config.seed}"
    )
    parts = [
        "<h1>Evaluation</h1>",
        f'<p class="note">{settings}</p>',
        *(f'<p class="notice">{escape(notice)}</p>' for notice in evaluation.notices),
        _table(["Model", "From", "Hash"], ([escape(cell) for cell in row] for row in models), 0),
        *(_task(task, evaluation) for task in evaluation.tasks),
    ]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Evaluation</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>",
            *parts,
            "</body>\n</html>\n",
        ]
    )


# ---------------------------------------------------------------------------------------------------------- sections


def _task(task: TaskEvaluation, evaluation: Evaluation) -> str:
    config = evaluation.config
    first = escape(next(iter(task.answers)))
    left_out = "".join(f" {escape(name)} is left out: {escape(why)}." for name, why in task.left_out.items())
    parts = [
        f"<h2>{escape(task.task)}: {len(task.records)} records</h2>",
        f'<p class="note">Greedy answers; below each figure its interval, and in the columns of other models the '
        f"paired difference to {first}, coloured where its interval excludes 0.{left_out}</p>",
        _greedy_table(task),
        _image(metrics_plot(task), f"Metrics of {task.task}"),
    ]
    if curve := best_of_k_plot(task):
        parts += [
            "<h3>Head-room: the best of the model's own answers</h3>",
            f'<p class="note">Of {config.n} answers sampled at temperature {config.temperature:g} the one '
            "with the largest reward; head-room is best of n − greedy.</p>",
            _kinds_table(task, ("greedy", "best_of_n", "head_room"), ("greedy", "best of n", "head-room")),
            _image(curve, "Mean best reward of k answers"),
        ]
    if gap := no_image_plot(task):
        parts += [
            "<h3>The no-image test</h3>",
            '<p class="note">The same questions, every image replaced by its mean colour. The gap, with − without, is '
            "what the model owes to looking (below 0 for metrics marked ↓): where it is near 0, or shrinks, the model "
            "answers without the image.</p>",
            _kinds_table(
                task,
                ("with_image", "blank", "gap", "gap_over_first"),
                ("with image", "without", "gap", f"gap − that of {first}"),
            ),
            _image(gap, "With and without the image"),
        ]
    elif config.blank_test:
        parts.append('<p class="note">No-image test left out: no record of this task has an image.</p>')
    return "\n".join([*parts, *_examples(task, evaluation)])


def _greedy_table(task: TaskEvaluation) -> str:
    def cell(metric: Metric, figure: Figure) -> str:
        difference = "" if figure.over_first is None else "<br>" + _difference(figure.over_first, metric)
        return _figure(figure.greedy, metric) + difference

    rows = (
        [_label(metric), *(cell(metric, task.figures.by_model[model][metric.name]) for model in task.answers)]
        for metric in task.metrics
    )
    return _table(["", *map(escape, task.answers)], rows)


def _kinds_table(task: TaskEvaluation, kinds: Sequence[str], titles: Sequence[str]) -> str:
    """A row for each metric and model, a column for each kind of figure; titles are HTML already."""
    rows = []
    for metric in task.metrics:
        for model in task.answers:
            figure = task.figures.by_model[model][metric.name]._asdict()
            cells = []
            for kind in kinds:
                found: Interval | None = figure[kind]
                difference = kind in ("head_room", "gap", "gap_over_first")
                shown = "–" if found is None else (_difference if difference else _figure)(found, metric)
                cells.append(shown)
            rows.append([f"{_label(metric)}, {escape(model)}", *cells])
    return _table(["", *titles], rows)


def _examples(task: TaskEvaluation, evaluation: Evaluation) -> Iterable[str]:
    colours = model_colours(list(task.answers))
    chosen = choose_examples(task, evaluation.config.examples, evaluation.config.seed)
    for title, examples in chosen.items():
        yield f"<h3>Examples: {escape(title)}</h3>"
        yield '<div class="examples">'
        yield from (_example(example, colours, evaluation.config.image_root) for example in examples)
        yield "</div>"


def _example(example: Example, colours: dict[str, str], root: str | None) -> str:
    drawn = example_picture(example, colours, root)
    image = "" if drawn is None else _image(drawn, f"Record {example.record.id}", "jpeg")
    lines = [_answer("truth", str(example.record.answer), TRUTH)]
    for model, answer in example.answers.items():
        lines.append(_answer(f"{model}, reward {answer.reward:.2f}", answer.text, colours[model]))
    caption = f"<b>{escape(example.record.id)}</b> {escape(_short(question(example.record)))}"
    return f"<figure>{image}<figcaption>{caption}{''.join(lines)}</figcaption></figure>"


# ------------------------------------------------------------------------------------------------------------ pieces


def _answer(who: str, text: str, colour: str) -> str:
    return (
        f'<div class="answer" style="border-color: {colour}"><b style="color: {colour}">{escape(who)}:</b> '
        f"{escape(_short(text))}</div>"
    )


def _label(metric: Metric) -> str:
    return f"{escape(metric.label)} {'↑' if metric.higher_is_better else '↓'}"


def _figure(one: Interval, metric: Metric) -> str:
    digits = 1 if metric.scale == 100 else 3
    if math.isnan(one.value):
        return "–"
    return f'{one.value:.{digits}f} <span class="interval">[{one.low:.{digits}f}, {one.high:.{digits}f}]</span>'


def _difference(one: Interval, metric: Metric) -> str:
    digits = 1 if metric.scale == 100 else 3
    if math.isnan(one.value):
        return "–"
    kind = "same" if not one.excludes_zero else "better" if (one.value > 0) == metric.higher_is_better else "worse"
    return (
        f'<span class="{kind}">{one.value:+.{digits}f}</span> '
        f'<span class="interval">[{one.low:+.{digits}f}, {one.high:+.{digits}f}]</span>'
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], first_number: int = 1) -> str:
    """Cells are HTML already; columns from `first_number` on (0: none) hold numbers."""

    def line(tag: str, cells: Sequence[Any]) -> str:
        kinds = (' class="number"' if 0 < first_number <= i else "" for i in range(len(cells)))
        return "<tr>" + "".join(f"<{tag}{k}>{c}</{tag}>" for k, c in zip(kinds, cells, strict=True)) + "</tr>"

    return "<table>\n" + "\n".join([line("th", header), *(line("td", row) for row in rows)]) + "\n</table>"


def _image(content: bytes, alt: str, kind: str = "png") -> str:
    data = base64.b64encode(content).decode()
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{data}">'


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
