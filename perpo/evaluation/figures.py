"""From judged answers to figures with intervals: each model, each against the first, best of n, with and without image.

All figures of a task come from one bootstrap, so that every difference is one of the same draws of records.

    head-room = best of n − greedy        what choosing among the model's own answers could give
    gap       = with image − without      what the model owes to looking; near 0, it answers from the question alone
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from perpo.evaluation.bootstrap import Array, Interval, interval, resampled_sums
from perpo.evaluation.metrics import Judged, Metric


@dataclass(frozen=True)
class ModelAnswers:
    """What one model answered to the N records of a task.

    `blank` is None where the no-image test is left out; else its entries are None for records without an image.
    `sampled` is empty where nothing was sampled.
    """

    greedy: list[Judged]  # [N]
    blank: list[Judged | None] | None = None  # [N]
    sampled: list[list[Judged]] = field(default_factory=list)  # [N][n]
    n_cut: int = 0  # greedy answers that had not ended

    @property
    def best(self) -> list[Judged]:
        """Of each record the first sampled answer with the largest reward."""
        return [max(answers, key=lambda a: a.reward) for answers in self.sampled]


class Figure(NamedTuple):
    """One metric of one model. None: not measured."""

    greedy: Interval
    over_first: Interval | None = None  # greedy − the first model's
    best_of_n: Interval | None = None
    head_room: Interval | None = None
    with_image: Interval | None = None  # greedy, over the records with an image
    blank: Interval | None = None
    gap: Interval | None = None
    gap_over_first: Interval | None = None  # gap − the first model's


class Series(NamedTuple):
    """A figure and its values over the draws."""

    value: float
    draws: Array

    def __sub__(self, other: Series) -> Series:
        return Series(self.value - other.value, self.draws - other.draws)


@dataclass(frozen=True)
class Figures:
    by_model: dict[str, dict[str, Figure]]  # model -> metric -> figure
    best_of_k: dict[str, list[Interval]]  # model -> expected best reward of k = 1..n sampled answers


def figures(
    answers: Mapping[str, ModelAnswers], metrics: Sequence[Metric], *, draws: int, confidence: float, seed: int
) -> Figures:
    """All figures of one task; the first model is what the others are compared with."""
    columns: dict[tuple[str, str, str], Array] = {}
    for model, given in answers.items():
        for metric in metrics:
            for kind, terms in _terms(given, metric).items():
                columns[model, metric.name, kind] = terms
        if given.sampled:
            rewards = np.array([[a.reward for a in row] for row in given.sampled])
            columns[model, "", "best of k"] = expected_best(rewards)
    joined = np.concatenate(list(columns.values()), axis=1)
    ends = np.cumsum([terms.shape[1] for terms in columns.values()])[:-1]
    sums = dict(zip(columns, np.split(joined.sum(0), ends), strict=True))
    drawn = dict(zip(columns, np.split(resampled_sums(joined, draws, seed), ends, axis=1), strict=True))

    def series(model: str, metric: Metric, kind: str) -> Series | None:
        key = model, metric.name, kind
        return Series(float(metric.value(sums[key])), metric.value(drawn[key])) if key in columns else None

    def shown(found: Series | None, n: int) -> Interval | None:
        return None if found is None else interval(found.value, found.draws, confidence, n)

    def minus(a: Series | None, b: Series | None) -> Series | None:
        return None if a is None or b is None else a - b

    first, n_records = next(iter(answers)), len(joined)
    by_model: dict[str, dict[str, Figure]] = {}
    for model in answers:
        by_model[model] = {}
        for metric in metrics:
            of = {kind: series(model, metric, kind) for kind in ("greedy", "best", "with", "blank")}
            of_first = {kind: series(first, metric, kind) for kind in ("greedy", "with", "blank")}
            gap = minus(of["with"], of["blank"])
            others = model != first
            n_seen = sum(answer is not None for answer in answers[model].blank or ())
            greedy = shown(of["greedy"], n_records)
            assert greedy is not None
            by_model[model][metric.name] = Figure(
                greedy,
                shown(minus(of["greedy"], of_first["greedy"]), n_records) if others else None,
                shown(of["best"], n_records),
                shown(minus(of["best"], of["greedy"]), n_records),
                shown(of["with"], n_seen),
                shown(of["blank"], n_seen),
                shown(gap, n_seen),
                shown(minus(gap, minus(of_first["with"], of_first["blank"])), n_seen) if others else None,
            )
    curves = {}
    for model in answers:
        key = model, "", "best of k"
        if key in columns:
            means, resampled = sums[key] / n_records, drawn[key] / n_records
            curves[model] = [
                interval(float(m), d, confidence, n_records) for m, d in zip(means, resampled.T, strict=True)
            ]
    return Figures(by_model, curves)


def expected_best(rewards: Array) -> Array:  # [N, n] -> [N, n]
    """Mean best reward over all subsets of k of the n answers, for k = 1..n: Σ_i r_(i) C(i−1, k−1) / C(n, k)."""
    n = rewards.shape[1]
    weights = np.array([[math.comb(i, k - 1) / math.comb(n, k) for k in range(1, n + 1)] for i in range(n)])
    return np.sort(rewards, axis=1) @ weights


def _terms(given: ModelAnswers, metric: Metric) -> dict[str, Array]:
    """The metric's terms [N, F] of every kind of answer; 0 for records that a kind is not about."""
    greedy = metric.terms(given.greedy)
    terms = {"greedy": greedy}
    if given.sampled:
        terms["best"] = metric.terms(given.best)
    if given.blank is not None and any(given.blank):
        seen = np.array([answer is not None for answer in given.blank])
        terms["with"] = greedy * seen[:, None]
        terms["blank"] = np.zeros_like(greedy)
        terms["blank"][seen] = metric.terms([answer for answer in given.blank if answer is not None])
    return terms
