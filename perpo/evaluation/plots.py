"""Plots and example pictures of an evaluation, as bytes of image files."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw

from perpo.evaluation.bootstrap import Interval
from perpo.evaluation.evaluate import TaskEvaluation
from perpo.evaluation.metrics import Metric
from perpo.rewards.formats import Box

TRUTH = "#1f9d55"
_FIRST, _LAST = "#e07b39", "#3b6fd4"
_BETWEEN = ("#8e5bd0", "#b8a11d", "#c2417c", "#3fa7a0", "#7a6a5a", "#5c6b7a")

PICTURE_SIDE = 320  # pixels of the longer side
MAX_DRAWN = 20  # boxes of one answer


def model_colours(models: Sequence[str]) -> dict[str, str]:
    """The first and the last model stand out: mostly they are before and after."""
    middle = {name: _BETWEEN[i % len(_BETWEEN)] for i, name in enumerate(models[1:-1])}
    return {models[0]: _FIRST, **middle, **({models[-1]: _LAST} if len(models) > 1 else {})}


def metrics_plot(task: TaskEvaluation) -> bytes:
    """One row per metric, with a point and its interval for each model."""
    models, metrics = list(task.answers), task.metrics
    colours = model_colours(models)
    canvas, axis = _canvas(8, 0.9 + len(metrics) * max(0.34, 0.2 * len(models)))
    for i, model in enumerate(models):
        offset = (i - (len(models) - 1) / 2) * 0.6 / len(models)
        found = [task.figures.by_model[model][metric.name].greedy for metric in metrics]
        for row, (metric, one) in enumerate(zip(metrics, found, strict=True)):
            _point(axis, one, metric, row + offset, colours[model], model if row == 0 else None)
    axis.set_yticks(range(len(metrics)), [_label(metric) for metric in metrics])
    axis.set_ylim(len(metrics) - 0.5, -0.5)
    axis.set_xlim(-0.02, 1.02)
    axis.grid(axis="x", alpha=0.3)
    canvas.legend(loc="outside upper center", ncols=min(4, len(models)), frameon=False)
    return _png(canvas)


def best_of_k_plot(task: TaskEvaluation) -> bytes | None:
    """Expected best reward of k sampled answers, with the greedy answer's as a dashed line; None without samples."""
    curves = task.figures.best_of_k
    if not curves:
        return None
    colours = model_colours(list(task.answers))
    canvas, axis = _canvas(6, 3.6)
    for model, curve in curves.items():
        k = np.arange(1, len(curve) + 1)
        low, high = np.array([c.low for c in curve]), np.array([c.high for c in curve])
        axis.fill_between(k, low, high, color=colours[model], alpha=0.15, linewidth=0)
        axis.plot(k, [c.value for c in curve], "o-", color=colours[model], markersize=3, label=model)
        greedy = float(np.mean([answer.reward for answer in task.answers[model].greedy]))
        axis.axhline(greedy, color=colours[model], linestyle="--", linewidth=1.2, label=f"{model}, greedy")
    axis.set_xlabel("sampled answers k")
    axis.set_ylabel("mean best reward of k")
    axis.grid(alpha=0.3)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    canvas.legend(loc="outside upper center", ncols=2, frameon=False)
    return _png(canvas)


def no_image_plot(task: TaskEvaluation) -> bytes | None:
    """The first metric of every model with the image (filled) and without (hollow); None without the test."""
    metric = task.metrics[0]
    rows = [(model, task.figures.by_model[model][metric.name]) for model in task.answers]
    tested = [(model, f.blank, f.with_image) for model, f in rows if f.blank and f.with_image]
    if not tested:
        return None
    colours = model_colours(list(task.answers))
    canvas, axis = _canvas(6, 1.2 + 0.5 * len(tested))
    for row, (model, blank, with_image) in enumerate(tested):
        _dumbbell(axis, blank, with_image, metric.scale, row, colours[model])
    axis.set_yticks(range(len(tested)), [model for model, *_ in tested])
    axis.set_ylim(len(tested) - 0.5, -0.5)
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel(f"{_label(metric)}: hollow with the image blanked, filled with it")
    axis.grid(axis="x", alpha=0.3)
    return _png(canvas)


def rounds_plot(task: TaskEvaluation) -> bytes | None:
    """The first metric over the rounds of `perpo align`; None for models that are not its rounds."""
    models = list(task.answers)
    if len(models) < 3 or models[1:] != [f"round-{number}" for number in range(1, len(models))]:
        return None
    metric = task.metrics[0]
    found = [task.figures.by_model[model][metric.name].greedy for model in models]
    value, low, high = (np.array(side) / metric.scale for side in zip(*found, strict=True))
    canvas, axis = _canvas(6, 3.2)
    axis.fill_between(range(len(models)), low, high, color=_LAST, alpha=0.15, linewidth=0)
    axis.plot(range(len(models)), value, "o-", color=_LAST)
    axis.set_xticks(range(len(models)), models)
    axis.set_ylabel(_label(metric))
    axis.grid(alpha=0.3)
    return _png(canvas)


def picture(image: Image.Image, boxes: Sequence[tuple[str, Sequence[Box]]] = ()) -> bytes:
    """The image at report size with boxes (fractions of it) drawn in their colours, the first at the bottom; JPEG."""
    scale = PICTURE_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    drawn = image.convert("RGB").resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(drawn)
    for i, (colour, some) in enumerate(boxes):
        for x1, y1, x2, y2 in some[:MAX_DRAWN]:
            corners = [x1 * (size[0] - 1), y1 * (size[1] - 1), x2 * (size[0] - 1), y2 * (size[1] - 1)]
            pen.rectangle(corners, outline="white", width=6 if i == 0 else 5)  # a rim, to be seen on any picture
            inset = 1 if min(corners[2] - corners[0], corners[3] - corners[1]) > 4 else 0
            inner = [corners[0] + inset, corners[1] + inset, corners[2] - inset, corners[3] - inset]
            pen.rectangle(inner, outline=colour, width=4 if i == 0 else 3)
    buffer = io.BytesIO()
    drawn.save(buffer, "JPEG", quality=88, subsampling=0)
    return buffer.getvalue()


def _label(metric: Metric) -> str:
    arrow = "↑" if metric.higher_is_better else "↓"
    return f"{metric.label} {arrow}" + (f" (÷ {metric.scale:g})" if metric.scale != 1 else "")


def _point(axis: Axes, one: Interval, metric: Metric, y: float, colour: str, label: str | None) -> None:
    x, low, high = (v / metric.scale for v in one)
    axis.plot([low, high], [y, y], color=colour, linewidth=2.2, solid_capstyle="butt")
    axis.plot([x], [y], "o", color=colour, markersize=6, label=label)


def _dumbbell(axis: Axes, blank: Interval, with_image: Interval, scale: float, y: float, colour: str) -> None:
    axis.plot([blank.value / scale, with_image.value / scale], [y, y], color=colour, alpha=0.35, linewidth=5)
    for side, face, shift in ((blank, "white", 0.12), (with_image, colour, -0.12)):
        axis.plot([side.low / scale, side.high / scale], [y + shift] * 2, color=colour, linewidth=1.4)
        axis.plot([side.value / scale], [y], "o", markerfacecolor=face, markeredgecolor=colour, markersize=9)


def _canvas(width: float, height: float) -> tuple[Canvas, Axes]:
    """Without pyplot: nothing global is touched, and no display is looked for."""
    canvas = Canvas(figsize=(width, height), layout="constrained")
    axis = canvas.add_subplot()
    axis.spines[["top", "right"]].set_visible(False)
    return canvas, axis


def _png(canvas: Canvas) -> bytes:
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
