"""The demo's results: tables, pictures, and figures as JSON."""

import json
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image

from perpo.data.read import read_records
from perpo.data.record import ListRecord
from perpo.demo.compare import BEST_OF_K, Result, answers
from perpo.demo.steps import SFT, Job, Recipe
from perpo.demo.tasks import TASKS, reward
from perpo.rewards import parse_box

TRUTH, BEFORE, AFTER = "#2a9d5c", "#e07b39", "#3b6fd4"
PICTURED = 12
PICKED_BY = 0  # seed of the random sample of pictures
Scored = tuple[ListRecord, float, float]  # a record with the reward of its answer before and after
REWARDS = {"grounding": "IoU", "ocr": "edit similarity"}
GAP = "gap"  # of the first metric, with pictures over without
PERPO = "perpo"
NAMES = {
    SFT: "SFT",
    "dpo": "DPO, best against worst",
    "uniform_pairs": "all pairs, equal weights",
    PERPO: "PerPO",
    "lipo": "LiPO-λ",
    "sdpo": "S-DPO",
    "plackett_luce": "Plackett–Luce",
    BEST_OF_K: "best of k (training lists)",
}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error s / √n; NaN for the error of one seed."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def table(task: str, results: list[Result], recipe: Recipe) -> str:
    """One row per model: mean ± standard error over seeds; below, PerPO against each other objective, seed by seed.

    The no-image gap is the first metric with pictures less the same with the pictures blanked, where it was measured.
    """
    metrics = {**TASKS[task].metrics, GAP: "gap without image"}
    lines = [f"{'':26}" + "".join(f"{title:>20}" for title in metrics.values())]
    for model in (SFT, *recipe.objectives, BEST_OF_K):
        cells = [_cell(_values(results, task, model, name)).rjust(20) for name in metrics]
        lines.append(f"{NAMES.get(model, model):26}" + "".join(cells))
    lines += ["", *comparisons(task, results, recipe)] if PERPO in recipe.objectives else []
    return "\n".join(lines)


def comparisons(task: str, results: list[Result], recipe: Recipe) -> list[str]:
    """PerPO less each other objective, over the seeds that both share."""
    lines = []
    for other in recipe.objectives:
        if other == PERPO:
            continue
        cells = []
        for name, title in TASKS[task].metrics.items():
            ours, theirs = (_values(results, task, model, name) for model in (PERPO, other))
            mean, error = mean_and_error([a - b for a, b in zip(ours, theirs, strict=True)])
            verdict = "" if math.isnan(error) else ", more than twice its error" if abs(mean) > 2 * error else ", a tie"
            cells.append(f"{title} {mean:+.3f} ± {error:.3f}{verdict}")
        lines.append(f"PerPO over {NAMES.get(other, other)}: {'; '.join(cells)}")
    return lines


def write_json(path: Path, results: list[Result], recipe: Recipe, seconds: float) -> None:
    """The figures of every run with the settings that made them."""
    record = {
        "recipe": asdict(recipe),
        "seconds": round(seconds, 1),
        "results": [asdict(result) for result in results],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def draw_examples(path: Path, job: Job) -> None:
    """Held-out pictures of a job, drawn at random with `PICKED_BY`, in the order of how much their reward changed: the
    truth and the answers before and after alignment."""
    figures = json.loads((job.folder / "evaluation" / "evaluation.json").read_text())
    identities = {model["name"]: model["identity"] for model in figures["models"]}
    after = PERPO if PERPO in identities else job.recipe.objectives[-1]
    texts = [answers(job, identities[model]) for model in (SFT, after)]
    held_out, _ = read_records(job.folder / "held_out.jsonl", require=("answer",))
    scored: list[Scored] = []
    for record in held_out:
        before, after_it = (reward(job.task, text[record.id], str(record.answer)) for text in texts)
        scored.append((record, before, after_it))
    chosen = sampled(scored)
    figure, axes = plt.subplots(2, PICTURED // 2, figsize=(2.1 * PICTURED / 2, 6.2), layout="constrained")
    for axis, (record, *rewards) in zip(axes.flat, chosen, strict=False):
        axis.set(xticks=[], yticks=[])
        with Image.open(job.folder / str(record.image)) as picture:
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255, extent=(0, 1, 1, 0))
        show = _show_boxes if job.task == "grounding" else _show_texts
        show(axis, record, texts[0][record.id], texts[1][record.id], rewards)
    styles = ((TRUTH, "-"), (BEFORE, "--"), (AFTER, "-"))
    handles = [Rectangle((0, 0), 1, 1, fill=False, edgecolor=c, linestyle=s, linewidth=2) for c, s in styles]
    names = ["truth", "before (SFT)", f"after ({NAMES.get(after, after)})"]
    figure.legend(handles, names, loc="outside upper center", ncols=3, frameon=False)
    figure.supxlabel(sample_caption(job, scored), fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def sampled(scored: Sequence[Scored]) -> list[Scored]:
    """A random sample of pictures, not chosen by what became of them, from the largest fall to the largest rise."""
    chosen = random.Random(PICKED_BY).sample(scored, min(PICTURED, len(scored)))
    return sorted(chosen, key=lambda one: one[2] - one[1])


def sample_caption(job: Job, scored: Sequence[Scored]) -> str:
    """How the pictures were chosen, and what holds for all that they were chosen from."""
    risen, fallen = (sum(sign * (after - before) > 0 for _, before, after in scored) for sign in (1, -1))
    before, after = statistics.mean(one[1] for one in scored), statistics.mean(one[2] for one in scored)
    return (
        f"{min(PICTURED, len(scored))} of {len(scored)} held-out pictures of seed {job.seed}, drawn at random (seed "
        f"{PICKED_BY}), from the largest fall to the largest rise.\nOf all {len(scored)}: mean {REWARDS[job.task]} "
        f"{before:.2f} → {after:.2f}; it rises in {risen}, falls in {fallen}, stays in {len(scored) - risen - fallen}"
    )


def _show_boxes(axis: Axes, record: ListRecord, before: str, after: str, ious: Sequence[float]) -> None:
    for text, colour, style in ((record.answer, TRUTH, "-"), (before, BEFORE, "--"), (after, AFTER, "-")):
        box = parse_box(str(text))
        if box is not None:
            corner, size = box[:2], (box[2] - box[0], box[3] - box[1])
            axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linestyle=style, linewidth=2))
    axis.set_title(str(record.prompt), fontsize=11)
    axis.set_xlabel(f"IoU {ious[0]:.2f} → {ious[1]:.2f}", fontsize=10)


def _show_texts(axis: Axes, record: ListRecord, before: str, after: str, similarities: Sequence[float]) -> None:
    axis.set_title(str(record.answer), fontsize=11, color=TRUTH)
    for line, (text, colour, value) in enumerate(zip((before, after), (BEFORE, AFTER), similarities, strict=True)):
        at = (0.5, -0.03 - 0.1 * line)
        shown = f"{text}  ({value:.2f})"
        axis.text(*at, shown, color=colour, fontsize=10, ha="center", va="top", transform=axis.transAxes)
    axis.set_xlabel("\n\n\n", fontsize=8)  # keeps the room


def draw_chart(path: Path, results: list[Result], recipe: Recipe) -> None:
    """Each metric of each model: bars for means over seeds, whiskers for their standard errors, a dot for each seed."""
    tasks = list(dict.fromkeys(result.task for result in results))
    rows = (SFT, *recipe.objectives, BEST_OF_K)
    columns = max(len(TASKS[task].metrics) for task in tasks)
    size = (5 * columns, (0.6 + 0.45 * len(rows)) * len(tasks) + 0.4)
    figure, axes = plt.subplots(len(tasks), columns, figsize=size, layout="constrained", sharey=True, squeeze=False)
    for line, task in zip(axes, tasks, strict=True):
        for axis in line[len(TASKS[task].metrics) :]:
            axis.set_visible(False)
        for axis, (name, title) in zip(line, TASKS[task].metrics.items(), strict=False):
            _bars(axis, {model: _values(results, task, model, name) for model in rows})
            axis.set_title(f"{task}: {title}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _bars(axis: Axes, values_of: dict[str, list[float]]) -> None:
    for position, (model, values) in enumerate(values_of.items()):
        mean, error = mean_and_error(values)
        error = 0.0 if math.isnan(error) else error
        colour = AFTER if model == PERPO else BEFORE if model == SFT else "#c3c8d1"
        axis.barh(position, mean, xerr=error, color=colour, height=0.68, ecolor="#333333", capsize=3)
        axis.plot(values, [position] * len(values), "o", color="white", markeredgecolor="#333333", markersize=4)
        axis.text(max(mean + error, *values, mean) + 0.02, position, f"{mean:.3f}", va="center", fontsize=10)
    axis.set_yticks(range(len(values_of)), [NAMES.get(model, model) for model in values_of])
    axis.set_ylim(len(values_of) - 0.5, -0.5)  # the first row on top
    axis.set_xlim(0, 1.1)
    axis.spines[["top", "right"]].set_visible(False)


def _values(results: list[Result], task: str, model: str, metric: str) -> list[float]:
    """Of each seed, in the order of seeds."""
    rows = sorted((r for r in results if (r.task, r.model) == (task, model)), key=lambda result: result.seed)
    return [row.metrics[metric] for row in rows if metric in row.metrics]


def _cell(values: list[float]) -> str:
    if not values:
        return "–"
    mean, error = mean_and_error(values)
    return f"{mean:.3f}" if math.isnan(error) else f"{mean:.3f} ± {error:.3f}"
