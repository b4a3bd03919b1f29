"""Tables and figures of the race: OUTPUT/tables.md and at most six pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from perpo.demo.race.arms import BETAS, GAMMAS, NOISES, OBJECTIVES, PASSES, ROUNDS, SFT, SIZES, SWEPT, Arm, questions
from perpo.demo.race.results import Interval, Results, markdown, shown
from perpo.demo.race.rows import Rows

NAMES = {
    SFT: "SFT",
    "perpo": "PerPO",
    "uniform_pairs": "equal weights",
    "dpo": "DPO",
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "gspo": "GSPO",
}
COLOURS = {
    "perpo": "#3b6fd4",
    "uniform_pairs": "#7a8699",
    "dpo": "#e07b39",
    "grpo": "#2a9d5c",
    "dr_grpo": "#b8a11d",
    "gspo": "#c2417c",
}
SHADES = ("#9fc0f5", "#6f9be8", "#3b6fd4", "#1d3f85")
TITLES = {
    "ap50": "AP@50",
    "ap75": "AP@75",
    "ap95": "AP@95",
    "mean_iou": "mean IoU",
    "edit_similarity": "edit similarity",
    "exact": "exact",
}
COMPARED = {"grounding": ("ap50", "ap75", "mean_iou"), "ocr": ("edit_similarity", "exact")}
PLAIN = Arm()
Curve = tuple[str, str, Sequence[Interval]]  # label, colour, a point for each x


def report(folder: Path, rows: Rows, learning_rates: dict[tuple[str, str, int], float]) -> None:
    """Of all rows that there are; what is missing is left out, and the number of seeds is said."""
    results, asked = Results(folder, rows, learning_rates), questions(range(1))
    of = {name: results.of_all(*arms) for name, arms in asked.items()}
    parts = [learning_rates_table(results), race_table(of["race"]), cost_table(of["race"])]
    parts += [differences_table(of["race"], "Differences", "grounding", ROUNDS), reading_table(of["reading"])]
    parts += [
        differences_table(of["reading"], "Differences in reading", "ocr", (1, 4)),
        rates_table(of["rates"]),
        degree_table(of["degree"]),
    ]
    draw_race(of["race"], folder / "race.png")
    parts += [draw_margins(of["margins"], of["copies"], folder / "margins.png")]
    parts += [draw_sizes(results.of_all(*asked["size"], *asked["tokens"]), folder / "sizes.png")]
    parts += [pairs_table(of["pairs"]), draw_passes(of["passes"], folder / "passes.png")]
    parts += [draw_betas(of["beta"], folder / "betas.png")]
    text = "\n\n".join(part for part in parts if part)
    (folder / "tables.md").write_text(text + "\n")
    results.pack()
    print(text)


# --------------------------------------------------------------------------------------------------------------- tables


def learning_rates_table(results: Results) -> str:
    found = sorted(results.learning_rates.items())
    lines = [[task, NAMES[objective], str(rounds), f"{rate:g}"] for (task, objective, rounds), rate in found]
    return "Learning rates, the best of the sweep\n\n" + markdown(["task", "objective", "rounds", "rate"], lines)


def race_table(results: Results) -> str:
    lines = []
    for arm in [replace(PLAIN, objective=SFT)] + [
        replace(PLAIN, objective=o, rounds=r) for o in OBJECTIVES for r in ROUNDS
    ]:
        if results.seeds(arm):
            cells = [shown(results.interval(arm, metric)) for metric in ("ap50", "ap75", "mean_iou")]
            rest = [f"{results.mean(arm, name):.3f}" for name in ("ap95", "gap", "drift")]
            rounds = "" if arm.objective == SFT else str(arm.rounds)
            lines.append([NAMES[arm.objective], rounds, *cells, *rest])
    heads = ["objective", "rounds", "AP@50", "AP@75", "mean IoU", "AP@95", "no-image gap", "drift, nats"]
    return f"Grounding, {results.of_seeds}\n\n" + markdown(heads, lines)


def differences_table(results: Results, title: str, task: str, rounds: Sequence[int]) -> str:
    """PerPO less each other at the same rounds; rounds less one round of the same objective."""
    base, pairs = replace(PLAIN, task=task), []
    for n in rounds:
        ours = replace(base, rounds=n)
        pairs += [(ours, replace(ours, objective=o), f"PerPO − {NAMES[o]}, {n} rounds") for o in OBJECTIVES[1:]]
    for objective in OBJECTIVES:
        one = replace(base, objective=objective)
        pairs += [(replace(one, rounds=n), one, f"{NAMES[objective]}, {n} rounds − one") for n in rounds[1:]]
    lines = [line for pair in pairs if (line := _difference(results, *pair))]
    metrics = [TITLES[metric] for metric in COMPARED[task]]
    heads = ["difference", *metrics, f"seeds with more {metrics[0]}"]
    return f"{title}, {results.of_seeds}\n\n{markdown(heads, lines)}" if lines else ""


def cost_table(results: Results) -> str:
    lines = []
    for rounds in ROUNDS:
        spent = results.spent(replace(PLAIN, rounds=rounds))
        if spent:
            lines.append([str(rounds), *(f"{value:.0f}" for value in spent.values())])
    heads = ["rounds", "sampled tokens", "trained tokens", "sampling, s", "training, s"]
    return "What a run of PerPO costs; the first round takes answers that were sampled before\n\n" + markdown(
        heads, lines
    )


def reading_table(results: Results) -> str:
    base, lines = replace(PLAIN, task="ocr"), []
    for arm in [replace(base, objective=SFT)] + [
        replace(base, objective=o, rounds=r) for o in OBJECTIVES for r in (1, 4)
    ]:
        if results.seeds(arm):
            cells = [shown(results.interval(arm, metric)) for metric in ("edit_similarity", "exact")]
            rest = [f"{results.mean(arm, name):.3f}" for name in ("gap", "drift")]
            rounds = "" if arm.objective == SFT else str(arm.rounds)
            lines.append([NAMES[arm.objective], rounds, *cells, *rest])
    heads = ["objective", "rounds", "edit similarity", "exact", "no-image gap", "drift, nats"]
    return f"Reading, {results.of_seeds}\n\n" + markdown(heads, lines) if lines else ""


def rates_table(results: Results) -> str:
    """Whether the rate that one seed's validation pictures chose is the best of four rounds in reading."""
    lines = []
    for rate in SWEPT:
        arm = replace(PLAIN, task="ocr", rounds=4, learning_rate=rate)
        if results.seeds(arm):
            cells = [shown(results.interval(arm, metric)) for metric in ("edit_similarity", "exact")]
            lines.append([f"{rate:g}", *cells])
    heads = ["rate", "edit similarity", "exact"]
    return f"Rates of PerPO's four rounds in reading, {results.of_seeds}\n\n" + markdown(heads, lines) if lines else ""


def degree_table(results: Results) -> str:
    lines = [
        _difference(results, replace(PLAIN, degree_weight=weight), PLAIN, f"degree_weight {weight:g} − 0")
        for weight in (0.1, 1.0)
    ]
    lines = [line for line in lines if line]
    heads = ["", "AP@50", "AP@75", "mean IoU", "seeds with more AP@50"]
    return f"Awareness of degree, {results.of_seeds}\n\n{markdown(heads, lines)}" if lines else ""


def _difference(results: Results, ours: Arm, theirs: Arm, name: str) -> list[str]:
    if not results.seeds(ours, theirs):
        return []
    metrics = COMPARED[ours.task]
    better, n = results.signs(ours, theirs, metrics[0])
    cells = [shown(results.difference(ours, theirs, metric), sign=True) for metric in metrics]
    return [name, *cells, f"{better} of {n}"]


# -------------------------------------------------------------------------------------------------------------- figures


def draw_race(results: Results, path: Path) -> None:
    """Metrics over rounds."""

    def curves(metric: str) -> list[Curve]:
        return [
            (
                NAMES[objective],
                COLOURS[objective],
                [results.interval(replace(PLAIN, objective=objective, rounds=r), metric) for r in ROUNDS],
            )
            for objective in OBJECTIVES
        ]

    _draw(path, curves, ROUNDS, "rounds, at the same number of sampled and trained tokens", ("ap50", "ap75"))


def draw_margins(results: Results, of_copies: Results, path: Path) -> str:
    """γ with truths that are off."""

    def curves(metric: str) -> list[Curve]:
        return [
            (
                f"truths off by {noise:.0%}" if noise else "exact truths",
                colour,
                [results.interval(replace(PLAIN, gamma=gamma, noise=noise), metric) for gamma in GAMMAS],
            )
            for noise, colour in zip(NOISES, reversed(SHADES), strict=True)
        ]

    _draw(path, curves, GAMMAS, "γ (0: equal weights)", ("ap50", "ap75"))
    heads = ["truths off by", *(f"γ {gamma:g}" for gamma in GAMMAS), "DPO", "GRPO", "γ 2 − γ 0"]
    parts = []
    for metric in ("ap50", "ap75"):
        lines = []
        for noise in NOISES:
            arms = [Arm(gamma=gamma, noise=noise) for gamma in GAMMAS]
            arms += [replace(PLAIN, objective=o, noise=noise) for o in ("dpo", "grpo")]
            cells = [f"{results.mean(arm, metric):.3f}" for arm in arms]
            lines.append([f"{noise:.0%}", *cells, shown(results.difference(arms[3], arms[0], metric), sign=True)])
        copies = [Arm(gamma=gamma, answers="copies") for gamma in GAMMAS]
        cells = [f"{of_copies.mean(arm, metric):.3f}" for arm in copies]
        last = shown(of_copies.difference(copies[3], copies[0], metric), sign=True)
        lines.append(["exact, half of the list copies", *cells, "", "", last])
        parts.append(f"Margins, {TITLES[metric]}, {results.of_seeds}\n\n" + markdown(heads, lines))
    return "\n\n".join(parts)


def draw_sizes(results: Results, path: Path) -> str:
    """List size at a fixed number of pictures, and at a fixed number of sampled answers."""
    few = SIZES

    def curves(metric: str) -> list[Curve]:
        return [
            ("PerPO, 256 pictures", COLOURS["perpo"], [results.interval(Arm(k=k), metric) for k in few]),
            ("DPO, 256 pictures", COLOURS["dpo"], [results.interval(Arm(objective="dpo", k=k), metric) for k in few]),
            (
                "PerPO, 4096 answers",
                COLOURS["grpo"],
                [results.interval(Arm(k=k, pictures=4096 // k), metric) for k in few],
            ),
        ]

    _draw(path, curves, SIZES, "answers a list", ("ap50", "ap75"), logarithmic=True)
    lines = []
    for name, colour, points in curves("ap50"):
        del colour
        lines.append([name, *(shown(point) for point in points)])
    return f"List size, AP@50, {results.of_seeds}\n\n" + markdown(["", *map(str, SIZES)], lines)


def pairs_table(results: Results) -> str:
    """Which answers are trained on."""
    kinds = {"all": "all 16", "best": "the best 8", "worst": "the worst 8", "ends": "the best 4 and the worst 4"}
    lines = []
    for objective in ("perpo", "uniform_pairs"):
        for kind, words in kinds.items():
            arm = Arm(objective=objective, answers=kind)
            if results.seeds(arm):
                cells = [shown(results.interval(arm, metric)) for metric in ("ap50", "ap75", "mean_iou")]
                less = results.difference(arm, replace(arm, answers="all"), "ap50")
                lines.append([NAMES[objective], words, *cells, "" if kind == "all" else shown(less, sign=True)])
    heads = ["", "answers", "AP@50", "AP@75", "mean IoU", "AP@50 less that of all"]
    return f"Which answers, {results.of_seeds}\n\n{markdown(heads, lines)}" if lines else ""


def draw_passes(results: Results, path: Path) -> str:
    def curves(metric: str) -> list[Curve]:
        return [
            (
                NAMES[objective],
                COLOURS[objective],
                [
                    results.interval(Arm(objective=objective, passes=PASSES[-1], measured=PASSES), metric, after=after)
                    for after in PASSES
                ],
            )
            for objective in ("perpo", "dpo", "grpo", "gspo")
        ]

    _draw(path, curves, PASSES, "passes over lists sampled once", ("ap50", "ap75"), logarithmic=True)
    lines = [[name, *map(shown, points)] for name, _, points in curves("ap50")]
    return f"Passes, AP@50, {results.of_seeds}\n\n" + markdown(["", *map(str, PASSES)], lines)


def draw_betas(results: Results, path: Path) -> str:
    def curves(metric: str) -> list[Curve]:
        return [
            (NAMES[o], COLOURS[o], [results.interval(Arm(objective=o, beta=beta), metric) for beta in BETAS])
            for o in ("perpo", "dpo")
        ]

    _draw(path, curves, BETAS, "β", ("ap50", "ap75"), logarithmic=True)
    lines = [[name, *map(shown, points)] for name, _, points in curves("ap50")]
    return f"β, AP@50, {results.of_seeds}\n\n" + markdown(["", *(f"{beta:g}" for beta in BETAS)], lines)


def _draw(
    path: Path,
    curves: Callable[[str], list[Curve]],
    xs: Sequence[float],
    label: str,
    metrics: Sequence[str],
    logarithmic: bool = False,
) -> None:
    """A panel for each metric, a line with its interval for each curve that has a point."""
    figure, axes = plt.subplots(1, len(metrics), figsize=(4.6 * len(metrics), 3.6), layout="constrained")
    for axis, metric in zip(axes, metrics, strict=True):
        drawn = [curve for curve in curves(metric) if sum(not np.isnan(point.value) for point in curve[2]) > 1]
        for place, (name, colour, points) in enumerate(drawn):
            _line(axis, xs, points, colour, name, (place - (len(drawn) - 1) / 2) * 0.04, logarithmic)
        axis.set_title(TITLES[metric], loc="left", fontsize=11)
        axis.set_xlabel(label)
        if logarithmic:
            axis.set_xscale("log", base=2 if isinstance(xs[0], int) else 10)
        axis.set_xticks(list(xs), [f"{x:g}" for x in xs])
        axis.minorticks_off()
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(labels)), frameon=False)
        figure.savefig(path, dpi=140)
    plt.close(figure)


def _line(
    axis: Axes,
    xs: Sequence[float],
    points: Sequence[Interval],
    colour: str,
    name: str,
    shift: float,
    logarithmic: bool,
) -> None:
    """Whiskers stand a little beside each other, so that each can be seen."""
    width = (max(xs) - min(xs)) * 0.25
    places = [x * 2**shift if logarithmic else x + shift * width for x in xs]
    values, low, high = (np.array(side) for side in zip(*points, strict=True))
    axis.errorbar(
        places, values, [values - low, high - values], color=colour, marker="o", markersize=4, capsize=2, label=name
    )
