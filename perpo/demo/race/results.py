"""Means over seeds and paired intervals, from the rows and from the rewards of single pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from perpo.demo.race.arms import SFT, Arm
from perpo.demo.race.rows import SCORES, Rows, last_pass
from perpo.demo.race.run import METRICS, Scores
from perpo.storage.atomic import atomic_file

DRAWS, SEED = 2000, 0  # of the bootstrap
PACKED = "scores.npz"


class Interval(NamedTuple):
    """A figure, and where 95 % of its bootstrap draws lie."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Results:
    """What came of the arms that have a row."""

    folder: Path
    rows: Rows
    learning_rates: dict[tuple[str, str, int], float]
    only: tuple[int, ...] | None = None  # these seeds; None: of each arm all that it was run with

    def of_all(self, *arms: Arm) -> Results:
        """With the seeds that all of these arms were run with, so that their means are of the same pictures; arms that
        were not run at all are left out of account."""
        run = [arm for arm in arms if self.seeds(arm)]
        return replace(self, only=tuple(self.seeds(*run)) if run else ())

    @property
    def of_seeds(self) -> str:
        return f"{len(self._seeds if self.only is None else self.only)} seeds"

    def arm(self, arm: Arm) -> Arm:
        """As it was run, with the learning rate of the sweep."""
        if arm.learning_rate is not None or arm.objective == SFT:
            return arm
        rate = self.learning_rates.get((arm.task, arm.objective, 1 if arm.rounds <= 2 else 4))
        return replace(arm, learning_rate=rate)

    def seeds(self, *arms: Arm) -> list[int]:
        """Those that all of the arms were run with."""
        seeds = self._seeds if self.only is None else self.only
        return [s for s in seeds if all(self.arm(replace(arm, seed=s)).key in self.rows for arm in arms)]

    def metrics(self, arm: Arm, seed: int, after: int | None = None) -> dict[str, float]:
        row = self.rows[self.arm(replace(arm, seed=seed)).key]
        return dict(row["metrics"][str(last_pass(row) if after is None else after)])

    def spent(self, arm: Arm) -> dict[str, float]:
        """The mean over seeds."""
        found = [self.rows[self.arm(replace(arm, seed=seed)).key]["spent"] for seed in self.seeds(arm)]
        return {name: float(np.mean([one[name] for one in found])) for name in found[0]} if found else {}

    def scores(self, arm: Arm, seed: int, after: int | None = None) -> Scores:
        row = self.rows[self.arm(replace(arm, seed=seed)).key]
        name = f"{row['key']}-{last_pass(row) if after is None else after}"
        path = self.folder / SCORES / f"{name}.npy"
        scores: Scores = np.load(path) if path.exists() else self._packed[name]
        return scores

    def mean(self, arm: Arm, metric: str, after: int | None = None) -> float:
        """Over seeds; NaN where there is none."""
        found = [self.metrics(arm, seed, after).get(metric, np.nan) for seed in self.seeds(arm)]
        return float(np.mean(found)) if found else float("nan")

    def interval(self, arm: Arm, metric: str, after: int | None = None) -> Interval:
        return self._bootstrap([(arm, after)], metric)

    def difference(self, ours: Arm, theirs: Arm, metric: str, after: int | None = None) -> Interval:
        """Ours less theirs on the same pictures of the same seeds."""
        return self._bootstrap([(ours, after), (theirs, after)], metric)

    def signs(self, ours: Arm, theirs: Arm, metric: str, after: int | None = None) -> tuple[int, int]:
        """In how many seeds ours is better, and of how many."""
        seeds = self.seeds(ours, theirs)
        found = [self.metrics(ours, s, after)[metric] - self.metrics(theirs, s, after)[metric] for s in seeds]
        return sum(one > 0 for one in found), len(found)

    def _bootstrap(self, arms: list[tuple[Arm, int | None]], metric: str) -> Interval:
        """Seeds are drawn with replacement, and in each of them pictures; all arms get the same draws."""
        of, seeds = METRICS[arms[0][0].task][metric], self.seeds(*(arm for arm, _ in arms))
        if not seeds:
            return Interval(np.nan, np.nan, np.nan)
        by_seed = []  # [seeds][pictures]
        for seed in seeds:
            first, *second = (np.asarray(of(self.scores(arm, seed, after)), dtype=np.float64) for arm, after in arms)
            by_seed.append(first - second[0] if second else first)
        value = float(np.mean([one.mean() for one in by_seed]))
        weights = self._weights(len(seeds), len(by_seed[0]))
        means = np.stack(
            [w @ one.astype(np.float32) for one, w in zip(by_seed, weights, strict=True)]
        )  # [seeds, draws]
        drawn = np.random.default_rng(SEED).integers(len(seeds), size=(len(seeds), DRAWS))
        draws = np.take_along_axis(means, drawn, axis=0).mean(0)
        return Interval(value, *np.quantile(draws, [0.025, 0.975]).tolist())

    def _weights(self, n_seeds: int, n: int) -> list[Any]:
        """How often each picture is drawn, as a share: [seeds][draws, pictures]."""
        known: dict[int, list[Any]] = self._known_weights
        if n not in known:
            known[n] = []
        while len(known[n]) < n_seeds:
            draw = np.random.default_rng([SEED, n, len(known[n])])
            known[n].append((draw.multinomial(n, [1 / n] * n, size=DRAWS) / n).astype(np.float32))
        return known[n][:n_seeds]

    def pack(self) -> None:
        """All scores that there are, in one file, from which the report can be made again."""
        new = {path.stem: np.load(path) for path in sorted((self.folder / SCORES).glob("*.npy"))}
        if new:
            with atomic_file(self.folder / PACKED) as file:
                np.savez_compressed(file, **(dict(self._packed) | new))

    @cached_property
    def _packed(self) -> Any:
        path = self.folder / PACKED
        return np.load(path) if path.exists() else {}

    @cached_property
    def _seeds(self) -> list[int]:
        return sorted({row["arm"]["seed"] for row in self.rows.values()})

    @cached_property
    def _known_weights(self) -> dict[int, list[Any]]:
        return {}


def shown(one: Interval, sign: bool = False) -> str:
    form = "+.3f" if sign else ".3f"
    return "–" if np.isnan(one.value) else f"{one.value:{form}} [{one.low:{form}}, {one.high:{form}}]"


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
