"""Rows as pictures: how near the floor, how memory grows, what a shared prompt saves. No point without its row."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.harness import FLOOR, OURS
from benchmarks.rows import Row

# The same work with the prompt repeated for every answer, of each question that has it.
REPEATED = {
    "shared_prefix": "a row for each answer, SDPA",
    "step": f"{OURS}, rows",
    "generation": "a prefill for each answer",
}
OURS_COLOR = "#c2410c"
OTHERS = ("#1d4ed8", "#047857", "#7c3aed", "#b45309", "#0e7490", "#be185d", "#4d7c0f", "#475569", "#a16207", "#111827")


def draw(rows: Sequence[Row], into: Path) -> list[Path]:
    """Each plot that there are rows for, apart for each kind of device."""
    drawn = []
    kinds = dict.fromkeys(map(kind_of_device, rows))
    for kind in kinds:
        here = [row for row in rows if kind_of_device(row) == kind and row["ok"]]
        for name, plot in (("floor", floors), ("memory", memory), ("prefix-sharing", prefix_sharing)):
            figure = plot(here)
            if figure is not None:
                path = into / f"{name}-{kind}.png"
                figure.savefig(path, dpi=130, bbox_inches="tight")
                plt.close(figure)
                drawn.append(path)
    return drawn


def kind_of_device(row: Row) -> str:
    device = row["device"]
    return "cpu" if device.endswith("cores") else device.lower().replace(" ", "-")


def floors(rows: Iterable[Row]) -> Any:
    """Floor over time, 1 being the floor: one line of points a case, one point a peer."""
    timed = [row for row in rows if row["ratio_to_floor"] and row["peer"] != FLOOR and row["question"] != "stage"]
    if not timed:
        return None
    names = list(dict.fromkeys(name_of(row) for row in timed))
    colors = colors_of(row["peer"] for row in timed)
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.32 * len(names)))
    for peer, color in colors.items():
        points = [row for row in timed if row["peer"] == peer]
        at = [len(names) - names.index(name_of(row)) for row in points]
        achieved = [1 / row["ratio_to_floor"] for row in points]
        axes.scatter(achieved, at, color=color, s=42 if peer == OURS else 22, label=peer, zorder=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(names), 0, -1), names, fontsize=8)
    axes.set_xlim(left=0)
    axes.set_xlabel("floor / time: 1 is the least that the products or the bytes can take")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def memory(rows: Iterable[Row]) -> Any:
    """Extra memory over T, over V and over k, frozen and trainable head."""
    counted = [
        row for row in rows if row["question"] == "memory" and row["peak_extra_bytes"] and "curve" in row["shapes"]
    ]
    if not counted:
        return None
    heads = list(dict.fromkeys(row["shapes"]["head"] for row in counted))
    curves = list(dict.fromkeys(row["shapes"]["curve"] for row in counted))
    colors = colors_of(row["peer"] for row in counted)
    size = {"figsize": (4 * len(curves), 3.2 * len(heads))}
    figure, grid = plt.subplots(len(heads), len(curves), squeeze=False, sharey="row", **size)
    for i, head in enumerate(heads):
        for j, curve in enumerate(curves):
            axes = grid[i][j]
            for peer, color in colors.items():
                points = sorted(
                    (row["shapes"][curve], row["peak_extra_bytes"] / 2**20)
                    for row in counted
                    if (row["shapes"]["head"], row["shapes"]["curve"], row["peer"]) == (head, curve, peer)
                )
                if points:
                    width = 2.4 if peer == OURS else 1.2
                    axes.plot(*zip(*points, strict=True), "o-", color=color, linewidth=width, markersize=3, label=peer)
            axes.set_xlabel(curve)
            axes.set_title(f"{head} head", fontsize=9)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
        grid[i][0].set_ylabel("extra MiB")
    grid[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    return figure


def prefix_sharing(rows: Iterable[Row]) -> Any:
    """How many times longer it takes with the prompt repeated: measured, and by count of tokens or pairs."""
    repeated = [
        row
        for row in rows
        if row["peer"] == REPEATED.get(row["question"]) and row["ratio_to_ours"] and "ideal_ratio" in row["extra"]
    ]
    if not repeated:
        return None
    names = [name_of(row) for row in repeated]
    at = range(len(repeated), 0, -1)
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.34 * len(repeated)))
    axes.barh(at, [row["extra"]["ideal_ratio"] for row in repeated], height=0.7, color="#e5e7eb", label="ideal")
    axes.barh(at, [row["ratio_to_ours"] for row in repeated], height=0.4, color=OURS_COLOR, label="measured")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(at, names, fontsize=8)
    axes.set_xlabel("time with the prompt repeated / time with it shared")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def name_of(row: Row) -> str:
    return f"{row['question']}: {row['case']}"


def colors_of(peers: Iterable[str]) -> dict[str, str]:
    """Ours last, so that it is drawn on top."""
    others: Iterator[str] = (peer for peer in dict.fromkeys(peers) if peer != OURS)
    return {peer: OTHERS[i % len(OTHERS)] for i, peer in enumerate(others)} | {OURS: OURS_COLOR}
