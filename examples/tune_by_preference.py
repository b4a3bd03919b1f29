r"""Tune a run without naming the trade-off: you say which of two runs is better, and it learns what you want.

    python examples/tune_by_preference.py runs.json propose
    python examples/tune_by_preference.py runs.json add learning_rate=1e-5 beta=0.1 gamma=0.5 : \
        ap50=0.61 gap=0.2 drift=1.3 hours=2.5
    python examples/tune_by_preference.py runs.json ask
    python examples/tune_by_preference.py runs.json prefer 3 1
    python examples/tune_by_preference.py runs.json show

A run is worth several numbers that pull apart: AP@50, the gap to answers without the image, the drift from the
reference, hours. Interactive tuning (arXiv 2309.03581) learns the user's utility from comparisons and optimises that
alone. There, fronts of runs are compared and a ranking SVM learns; here two runs are, and Bradley-Terry on the metrics
learns, which needs no front and gives weights that can be read:

    P(a better than b) = σ(wᵀ(z_a − z_b)),   z the metrics, each minus its mean and over its spread among the runs

w is the most probable one under a Gaussian prior of variance 1, by Newton's method, with its covariance: `ask` gives
the pair whose comparison says most about w. `propose` draws 1000 settings at random and takes the one of highest mean +
deviation of the utility under a Gaussian process on the settings (RBF, length 0.3 of the range); with fewer than three
runs or no comparison yet, a random one. That is no optuna: some lines of NumPy do for tens of runs.

Everything is in one JSON file, written after each command, so you can stop at any time. Its "space" may be edited:
name: [low, high, "log" or "linear"].
"""

import argparse
import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from perpo.storage.atomic import atomic_file
from perpo.storage.lock import held

SPACE = {"learning_rate": [1e-6, 1e-4, "log"], "beta": [0.02, 1.0, "log"], "gamma": [0.0, 2.0, "linear"]}
LENGTH, NOISE, N_DRAWN = 0.3, 1e-2, 1000


class Study:
    """Space, runs and comparisons, in a file.

    Attributes:
        runs: {"settings": {name: number}, "metrics": {name: number}} each.
        preferences: (better, worse), places in runs.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        known = json.loads(file.read_text()) if file.exists() else {}
        self.space: dict[str, Any] = known.get("space", SPACE)
        for name, (low, high, scale) in self.space.items():
            if scale not in ("log", "linear") or not low < high or (scale == "log" and low <= 0):
                raise ValueError(f'{file}: {name} must be [low, high, "log" or "linear"], above 0 for "log"')
        self.runs: list[dict[str, dict[str, float]]] = known.get("runs", [])
        self.preferences: list[tuple[int, int]] = [(a, b) for a, b in known.get("preferences", [])]
        self.proposed: int = known.get("proposed", 0)  # also the seed of the next proposal

    def save(self) -> None:
        names = ("space", "runs", "preferences", "proposed")
        with atomic_file(self.file) as out:
            out.write(json.dumps({name: getattr(self, name) for name in names}, indent=1).encode())

    def add(self, settings: dict[str, float], metrics: dict[str, float]) -> int:
        self.unit(settings)
        expected = set(self.runs[0]["metrics"]) if self.runs else set(metrics)
        if not metrics or set(metrics) != expected:
            raise ValueError(f"metrics must be those of the first run, {sorted(expected)}; got {sorted(metrics)}")
        if not all(np.isfinite(value) for value in (*settings.values(), *metrics.values())):
            raise ValueError("settings and metrics must be finite numbers")
        self.runs.append({"settings": settings, "metrics": metrics})
        return len(self.runs) - 1

    def prefer(self, better: int, worse: int) -> None:
        if better == worse or not all(0 <= i < len(self.runs) for i in (better, worse)):
            raise ValueError(f"prefer takes two different runs of 0 to {len(self.runs) - 1}, got {better} and {worse}")
        self.preferences.append((better, worse))

    @property
    def metrics(self) -> list[str]:
        return sorted(self.runs[0]["metrics"]) if self.runs else []

    def standardised(self) -> np.ndarray:  # [n, m]
        """z of every run; a metric that is the same in all is 0."""
        x = np.array([[run["metrics"][name] for name in self.metrics] for run in self.runs], dtype=float)
        spread = x.std(0)
        same = spread <= 1e-12 * np.abs(x).max(0)
        return np.where(same, 0.0, (x - x.mean(0)) / np.where(same, 1.0, spread))

    def trade_off(self) -> tuple[np.ndarray, np.ndarray]:  # [m], [m, m]
        """w and its covariance: argmax of Σ log σ(wᵀd) − |w|²/2, d = z_better − z_worse, and the inverse Hessian."""
        z = self.standardised()
        d = np.array([z[a] - z[b] for a, b in self.preferences]).reshape(-1, z.shape[1])
        w = np.zeros(z.shape[1])
        for _ in range(50):
            p = _sigmoid(d @ w)
            hessian = (d * (p * (1 - p))[:, None]).T @ d + np.eye(len(w))
            step = np.linalg.solve(hessian, d.T @ (1 - p) - w)
            w = w + step / max(1.0, float(np.linalg.norm(step)))  # far steps could overshoot
            if np.linalg.norm(step) < 1e-10:
                break
        return w, np.linalg.inv(hessian)

    def ask(self) -> tuple[int, int]:
        """The pair, not compared yet, whose comparison is expected to say most: p (1 − p) dᵀ Σ d."""
        compared = {frozenset(pair) for pair in self.preferences}
        left = [pair for pair in combinations(range(len(self.runs)), 2) if frozenset(pair) not in compared]
        if not left:
            raise ValueError(f"there is no pair of {len(self.runs)} runs that was not compared; add a run")
        z, (w, covariance) = self.standardised(), self.trade_off()

        def worth(pair: tuple[int, int]) -> float:
            d = z[pair[0]] - z[pair[1]]
            p = _sigmoid(d @ w)
            return float(p * (1 - p) * (d @ covariance @ d))

        return max(left, key=worth)

    def propose(self) -> dict[str, float]:
        """Settings of the next run."""
        random = np.random.default_rng(self.proposed)
        self.proposed += 1
        drawn = random.random((N_DRAWN, len(self.space)))
        best = 0
        if len(self.runs) > 2 and self.preferences:
            utility = self.standardised() @ self.trade_off()[0]
            utility = (utility - utility.mean()) / max(utility.std(), 1e-12)
            known = np.array([self.unit(run["settings"]) for run in self.runs])
            covariance = _kernel(known, known) + NOISE * np.eye(len(known))
            across = _kernel(drawn, known)
            mean = across @ np.linalg.solve(covariance, utility)
            variance = 1 - (across * np.linalg.solve(covariance, across.T).T).sum(1)
            best = int(np.argmax(mean + np.sqrt(variance.clip(0))))
        return {name: self._number(name, share) for name, share in zip(self.space, drawn[best], strict=True)}

    def unit(self, settings: dict[str, float]) -> list[float]:
        """Each setting as its share of its range."""
        if set(settings) != set(self.space):
            raise ValueError(f"settings must be {', '.join(self.space)}, got {', '.join(settings) or 'none'}")
        shares = []
        for name, (low, high, scale) in self.space.items():
            value = settings[name]
            if not low <= value <= high:
                raise ValueError(f"{name} must lie in the space, {low} to {high}, got {value}; widen it in {self.file}")
            log = scale == "log"
            shares.append(float(np.log(value / low) / np.log(high / low) if log else (value - low) / (high - low)))
        return shares

    def _number(self, name: str, share: float) -> float:
        low, high, scale = self.space[name]
        return float(f"{low * (high / low) ** share if scale == 'log' else low + (high - low) * share:.4g}")


def _sigmoid(x: Any) -> Any:
    return 0.5 * (1 + np.tanh(x / 2))


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """exp(−|a − b|² / 2 ℓ²)."""
    return np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * LENGTH**2))


def _numbers(words: Sequence[str]) -> dict[str, float]:
    found = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise ValueError(f"expected name=number, got {word!r}") from None
    return found


def _line(study: Study, i: int) -> str:
    numbers = {**study.runs[i]["settings"], **study.runs[i]["metrics"]}
    return f"run {i}: " + " ".join(f"{name}={value:g}" for name, value in numbers.items())


def command(study: Study, name: str, words: Sequence[str]) -> list[str]:
    """Do one command; returns the lines to print."""
    if name == "add":
        at = words.index(":") if ":" in words else len(words)
        return [_line(study, study.add(_numbers(words[:at]), _numbers(words[at + 1 :])))]
    if name == "prefer":
        if len(words) != 2 or not all(word.isdecimal() for word in words):
            raise ValueError("prefer takes two numbers of runs: the better one, then the worse one")
        study.prefer(int(words[0]), int(words[1]))
        return [f"{len(study.preferences)} comparisons"]
    if words:
        raise ValueError(f"{name} takes no words, got {' '.join(words)}")
    if name == "propose":
        return ["perpo train … " + " ".join(f"--{key} {value:g}" for key, value in study.propose().items())]
    if not study.runs:
        raise ValueError("there is no run yet; propose one, run it, and add what came out")
    if name == "ask":
        pair = study.ask()
        return [
            *(_line(study, i) for i in pair),
            f"which is better? prefer {pair[0]} {pair[1]}, or the other way round",
        ]
    w, covariance = study.trade_off()
    utility = study.standardised() @ w
    ranked = sorted(range(len(study.runs)), key=lambda i: -utility[i])
    weights = [
        f"{name}: {a:+.2f} ± {b**0.5:.2f}" for name, a, b in zip(study.metrics, w, covariance.diagonal(), strict=True)
    ]
    against = sum(utility[a] < utility[b] for a, b in study.preferences)
    head = f"{len(study.preferences)} comparisons, {against} of them against the utility; weights of a spread of each:"
    return [head, *weights, *(f"utility {utility[i]:+.2f}  {_line(study, i)}" for i in ranked)]


def main(arguments: Sequence[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON file of the study; made if missing.")
    parser.add_argument("command", choices=["propose", "add", "ask", "prefer", "show"])
    parser.add_argument("words", nargs="*", help="add: settings, a colon, metrics; prefer: the better run, the worse.")
    args = parser.parse_args(arguments)
    with held(args.file.with_name(f".{args.file.name}.lock"), str(args.file)):
        try:
            study = Study(args.file)
            lines = command(study, args.command, args.words)
        except ValueError as error:
            parser.error(str(error))
        study.save()
    print("\n".join(lines))
    return lines


if __name__ == "__main__":
    main()
