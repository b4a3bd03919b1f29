"""Rows as pictures: how near the floor, how memory grows, what a shared prompt saves. No point without its row.

Colours are those of Okabe and Ito, which the colour-blind can distinguish. Each peer has its own marker and dashes too,
so that both of two lines on top of each other show.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.harness import FLOOR, OURS
from benchmarks.rows import Row, kind_of_device, newest

# The same work with the prompt repeated for every answer, of each question that has it.
REPEATED = {
    "shared_prefix": "a row for each answer, SDPA",
    "step": f"{OURS}, rows",
    "generation": "a prefill for each answer",
}
SHARED = {
    "step": "A whole training step",
    "shared_prefix": "Attention alone, forward and backward",
    "generation": "Sampling the answers",
}
IDEAL = "ideal: by the number of tokens, in attention of pairs"
TASKS = {
    "linear_loss": "Loss from hidden states",
    "linear_pairs": "Loss of pairs, from hidden states",
    "from_logits": "Log-probs from logits",
    "list_loss": "List loss",
    "shared_prefix": "Attention over a shared prompt",
}
PASSES = {
    "reference": "no gradient",
    "frozen": "frozen head",
    "trainable": "trainable head",
    "forward": "forward",
    "forward+backward": "forward and backward",
}
FAMILIES = {"llava": "LLaVA", "qwen2_5_vl": "Qwen2.5-VL"}
AXES = {"T": "T, response tokens", "V": "V, vocabulary", "k": "k, answers in the list"}
OURS_COLOR = "#D55E00"
COLORS = ("#0072B2", "#009E73", "#000000", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osDv^Pphx*"
DASHES = ((0, (5, 2)), (0, (1, 1.4)), (0, (5, 2, 1, 2)), (0, (9, 3)))


class Style(NamedTuple):
    color: str
    marker: str
    dashes: Any
    width: float


def draw(rows: Sequence[Row], into: Path) -> list[Path]:
    """Each plot that there are rows for, apart for each kind of device."""
    drawn = []
    kinds = dict.fromkeys(map(kind_of_device, rows))
    for kind in kinds:
        here = [row for row in newest(rows) if kind_of_device(row) == kind and row["ok"]]
        for name, plot in (("floor", floors), ("memory", memory), ("prefix-sharing", prefix_sharing)):
            figure = plot(here)
            if figure is not None:
                path = into / f"{name}-{kind}.png"
                figure.savefig(path, dpi=130, bbox_inches="tight")
                plt.close(figure)
                drawn.append(path)
    return drawn


def styles_of(peers: Iterable[str]) -> dict[str, Style]:
    """Ours first in the legend, thick and solid; the others each with its own colour, marker and dashes."""
    others = [peer for peer in dict.fromkeys(peers) if peer != OURS]
    styles = {OURS: Style(OURS_COLOR, "o", "solid", 2.6)}
    for i, peer in enumerate(others):
        color, marker = COLORS[i % len(COLORS)], MARKERS[(i + 1) % len(MARKERS)]
        styles[peer] = Style(color, marker, DASHES[i % len(DASHES)], 1.6)
    return styles


def floors(rows: Iterable[Row]) -> Any:
    """Floor over time, 1 being the floor: one line of points per case, one point per peer."""
    others = ("stage", "tune", "host_time")  # the floor of host time is a launch that does nothing
    timed = [
        row for row in rows if row["ratio_to_floor"] and row["peer"] != FLOOR and not row["question"].startswith(others)
    ]
    if not timed:
        return None
    names = list(dict.fromkeys(name_of(row) for row in timed))
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.42 * len(names)))
    styles = styles_of(row["peer"] for row in timed)
    for i, (peer, style) in enumerate(styles.items()):
        points = [row for row in timed if row["peer"] == peer]
        lift = 0.3 - 0.6 * i / max(1, len(styles) - 1)  # each peer has its own height within the case
        at = [len(names) - names.index(name_of(row)) + lift for row in points]
        achieved = [1 / row["ratio_to_floor"] for row in points]
        size = 52 if peer == OURS else 26
        axes.scatter(achieved, at, color=style.color, marker=style.marker, s=size, label=peer, zorder=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(names), 0, -1), names, fontsize=8)
    axes.set_xlim(left=0)
    axes.set_xlabel("time of the floor / time; the floor, at 1, is the products or the copies alone, in the same round")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def memory(rows: Iterable[Row]) -> Any:
    """Extra memory over T, over V and over k, frozen and trainable head; grey: the gradients that are returned."""
    counted = [
        row for row in rows if row["question"] == "memory" and row["peak_extra_bytes"] and "curve" in row["shapes"]
    ]
    if not counted:
        return None
    heads = list(dict.fromkeys(row["shapes"]["head"] for row in counted))
    curves = list(dict.fromkeys(row["shapes"]["curve"] for row in counted))
    drawn = one_of_each(counted)
    styles = styles_of(drawn)
    size = {"figsize": (4 * len(curves), 3.2 * len(heads))}
    figure, grid = plt.subplots(len(heads), len(curves), squeeze=False, **size)
    for (i, head), (j, curve) in product(enumerate(heads), enumerate(curves)):
        axes = grid[i][j]
        here = [row for row in counted if (row["shapes"]["head"], row["shapes"]["curve"]) == (head, curve)]
        least = {
            r["shapes"][curve]: r["extra"]["gradient_bytes"] / 2**20 for r in here if "gradient_bytes" in r["extra"]
        }
        if least:
            axes.fill_between(
                sorted(least), [least[x] for x in sorted(least)], color="#d1d5db", label="gradients alone"
            )
        for peer, style in reversed(styles.items()):  # ours on top
            points = sorted(
                (row["shapes"][curve], row["peak_extra_bytes"] / 2**20) for row in here if row["peer"] == peer
            )
            if points:
                look: dict[str, Any] = {"color": style.color, "linestyle": style.dashes, "linewidth": style.width}
                label = "\n= ".join(drawn[peer])
                look |= {"marker": style.marker, "markersize": 4 if peer == OURS else 7}  # another's shows behind ours
                axes.plot(*zip(*points, strict=True), label=label, alpha=0.9, **look)
        at = sorted({row["shapes"][curve] for row in here})
        axes.set_xticks(at, [f"{x:,}" for x in at], fontsize=8)
        axes.set_xlabel(AXES.get(curve, curve))
        axes.set_title(f"{head} head", fontsize=9)
        axes.set_ylim(bottom=-0.03 * axes.get_ylim()[1])  # a curve along 0 shows
        axes.grid(alpha=0.3)
        if j == 0:
            axes.set_ylabel("extra MiB")
    grid[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    return figure


def one_of_each(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The peers to draw, each with those that need as much memory everywhere, to 1 %: one would hide the other."""
    needs: dict[str, dict[tuple[Any, ...], float]] = {}
    for row in rows:
        at = tuple(sorted((name, str(value)) for name, value in row["shapes"].items()))
        needs.setdefault(row["peer"], {})[at] = row["peak_extra_bytes"]
    drawn: dict[str, list[str]] = {}
    for peer, found in needs.items():
        same = (
            other
            for other in drawn
            if needs[other].keys() == found.keys() and all(abs(found[x] / needs[other][x] - 1) < 0.01 for x in found)
        )
        drawn.setdefault(next(same, peer), []).append(peer)
    return drawn


def prefix_sharing(rows: Iterable[Row]) -> Any:
    """How many times longer it takes with the prompt repeated: measured, and by count of tokens or pairs."""
    repeated = [
        row
        for row in rows
        if row["peer"] == REPEATED.get(row["question"]) and row["ratio_to_ours"] and "ideal_ratio" in row["extra"]
    ]
    if not repeated:
        return None
    parts = {question: [r for r in repeated if r["question"] == question] for question in SHARED}
    parts = {question: sorted(found, key=_sizes) for question, found in parts.items() if found}
    figure, grid = plt.subplots(
        len(parts),
        sharex=True,
        squeeze=False,
        figsize=(8, 1.2 + 0.42 * len(parts) + 0.32 * len(repeated)),
        height_ratios=[len(found) + 0.4 for found in parts.values()],
        layout="constrained",
    )
    for axes, (question, found) in zip(grid[:, 0], parts.items(), strict=True):
        at = range(len(found), 0, -1)
        axes.barh(at, [row["extra"]["ideal_ratio"] for row in found], height=0.7, color="#d1d5db", label=IDEAL)
        axes.barh(at, [row["ratio_to_ours"] for row in found], height=0.4, color=OURS_COLOR, label="measured")
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks(at, [in_words(row["case"]) for row in found], fontsize=8)
        axes.set_ylim(0.3, len(found) + 0.7)
        axes.set_title(SHARED[question], fontsize=9, loc="left")
        axes.grid(axis="x", alpha=0.3)
    grid[-1, 0].set_xlabel("time with the prompt repeated for every answer / time with it shared; 1: no gain")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=2)
    return figure


def _sizes(row: Row) -> tuple[Any, ...]:
    """Cases of a size stand together, the largest gain on top."""
    return -row["extra"]["ideal_ratio"], row["case"]


def in_words(case: str) -> str:
    """ "llava P576 R24 k20" -> "LLaVA: 576 prompt tokens, 20 answers of 24", "frozen laptop T800" -> "frozen head, 800
    tokens"; another text as it is."""
    if found := re.fullmatch(r"(\S+) (\S+) T(\d+)", case):
        how, model, tokens = found.groups()
        of = "" if model == "laptop" else f" of {model}"
        return f"{PASSES.get(how, how)}{of}, {int(tokens):,} tokens"
    found = re.fullmatch(r"(?:(\w+) )?P(\d+) R(\d+) k(\d+)", case)
    if found is None:
        return case
    family, prompt, response, k = found.groups()
    named = f"{FAMILIES.get(family, family)}: " if family else ""
    return f"{named}{int(prompt):,} prompt tokens, {k} answers of {response}"


def name_of(row: Row) -> str:
    return f"{TASKS.get(row['question'], row['question'])}: {in_words(row['case'])}"
