"""What the demo leaves behind: the table, the two pictures and the figures as JSON."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from perpo.demo.align import PERPO, Recipe
from perpo.demo.compare import ROWS, SFT, Result, held_out_scenes
from perpo.demo.vocabulary import question_text
from perpo.rewards import box_iou

TRUTH, BEFORE, AFTER = "#2a9d5c", "#e07b39", "#3b6fd4"
PICTURED = 12
METRICS = (("ap50", 15), ("mean_iou", 17))  # with the widths of their columns


def spread(values: Sequence[float]) -> float:
    """Standard deviation over the seeds; 0 for one seed."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def table(results: list[Result]) -> str:
    """A row a method: mean ± standard deviation over the seeds, and the gain over SFT, seed by seed."""
    lines = [f"{'':24}{'AP@50':>15}{'mean IoU':>17}{'AP@50 over SFT':>18}{'mean IoU over SFT':>20}"]
    base = _by_seed(results, SFT)
    for method in ROWS:
        rows = _by_seed(results, method)
        cells = [f"{method:24}"]
        cells += [_cell([getattr(row, name) for row in rows.values()], width) for name, width in METRICS]
        if method != SFT:
            for name, width in (("ap50", 18), ("mean_iou", 20)):
                gains = [getattr(rows[seed], name) - getattr(base[seed], name) for seed in rows]
                cells.append(_cell(gains, width, signed=True))
        lines.append("".join(cells))
    return "\n".join(lines)


def write_json(path: Path, results: list[Result], recipe: Recipe, scenes: int, seconds: float) -> None:
    """The figures of every run with the settings that made them."""
    rows = [{key: value for key, value in asdict(result).items() if key != "boxes"} for result in results]
    record = {
        "recipe": asdict(recipe),
        "held_out_scenes_per_seed": scenes,
        "seconds": round(seconds, 1),
        "results": rows,
    }
    path.write_text(json.dumps(record, indent=2) + "\n")


def draw_boxes(path: Path, results: list[Result], held_out: int) -> None:
    """The first held-out scenes of the first seed, as they come: the true box, SFT's and PerPO's.

    `held_out` must be the number of scenes that were judged: another number gives other scenes.
    """
    seed = min(result.seed for result in results)
    before, after = (_by_seed(results, method)[seed].boxes for method in (SFT, PERPO))
    scenes = held_out_scenes(held_out, seed)
    figure, axes = plt.subplots(2, PICTURED // 2, figsize=(2.1 * PICTURED / 2, 5.6), layout="constrained")
    for index, axis in enumerate(axes.flat):
        x1, y1, x2, y2 = scenes.boxes[index].tolist()
        truth = (x1, y1, x2, y2)
        axis.imshow(1 - scenes.images[index, 0].numpy(), cmap="gray", vmin=0, vmax=1, extent=(0, 1, 1, 0))
        axis.set(xticks=[], yticks=[])
        ious = []
        for box, colour, style, width in (
            (truth, TRUTH, "-", 2.2),
            (before[index], BEFORE, "--", 1.8),
            (after[index], AFTER, "-", 1.8),
        ):
            ious.append(0.0 if box is None else box_iou(box, truth))
            if box is not None:
                corner, size = box[:2], (box[2] - box[0], box[3] - box[1])
                axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linestyle=style, linewidth=width))
        axis.set_title(question_text(int(scenes.asked[index])), fontsize=11)
        axis.set_xlabel(f"IoU {ious[1]:.2f} → {ious[2]:.2f}", fontsize=10)
    handles = [
        Rectangle((0, 0), 1, 1, fill=False, edgecolor=colour, linestyle=style, linewidth=2)
        for colour, style in ((TRUTH, "-"), (BEFORE, "--"), (AFTER, "-"))
    ]
    figure.legend(
        handles, ["truth", "before (SFT)", "after (PerPO)"], loc="outside upper center", ncols=3, frameon=False
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_chart(path: Path, results: list[Result]) -> None:
    """AP@50 and mean IoU of each method: a bar for the mean over seeds, a whisker for the spread, a dot a seed."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    for axis, metric, title in zip(axes, ("ap50", "mean_iou"), ("AP@50", "mean IoU"), strict=True):
        _bars(axis, results, metric)
        axis.set_title(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _bars(axis: Axes, results: list[Result], metric: str) -> None:
    positions = range(len(ROWS))
    for position, method in zip(positions, ROWS, strict=True):
        values = [getattr(row, metric) for row in _by_seed(results, method).values()]
        mean = statistics.mean(values)
        colour = AFTER if method == PERPO else BEFORE if method == SFT else "#c3c8d1"
        axis.barh(position, mean, xerr=spread(values), color=colour, height=0.68, ecolor="#333333", capsize=3)
        axis.plot(values, [position] * len(values), "o", color="white", markeredgecolor="#333333", markersize=4)
        axis.text(mean + spread(values) + 0.012, position, f"{mean:.3f}", va="center", fontsize=10)
    axis.set_yticks(positions, ROWS)
    axis.set_ylim(len(ROWS) - 0.5, -0.5)  # the first row on top
    axis.set_xlim(0, 1)
    axis.spines[["top", "right"]].set_visible(False)


def _by_seed(results: list[Result], method: str) -> dict[int, Result]:
    return {result.seed: result for result in results if result.method == method}


def _cell(values: list[float], width: int, signed: bool = False) -> str:
    mean = statistics.mean(values)
    return f"{mean:{'+' if signed else ''}.3f} ± {spread(values):.3f}".rjust(width)
