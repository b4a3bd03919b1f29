"""examples/tune_by_preference.py: a scripted user's hidden trade-off is recovered, by commands that each end."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau

ROOT = Path(__file__).parents[2]
HIDDEN = {"ap50": 8.0, "gap": 5.0, "drift": -0.5, "hours": -0.1}  # what the user would give for one of each


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("tune_by_preference")


def outcome(settings: dict[str, float]) -> dict[str, float]:
    """Larger steps and a smaller beta: better boxes, up to a point, and more drift."""
    strength = np.log10(settings["learning_rate"]) + 5 - 0.7 * np.log10(settings["beta"] / 0.1)
    return {
        "ap50": 0.6 - 0.15 * (strength - 0.4) ** 2,
        "gap": 0.2 - 0.05 * abs(settings["gamma"] - 1),
        "drift": float(np.exp(1.2 * strength)),
        "hours": 2 + settings["gamma"],
    }


def utility(metrics: dict[str, float]) -> float:
    return sum(HIDDEN[name] * value for name, value in metrics.items())


def words(values: dict[str, float]) -> list[str]:
    return [f"{name}={value}" for name, value in values.items()]


def settings_of(line: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"--(\w+) (\S+)", line)}


def add_noisy(tune: Any, file: str, n: int, seed: int = 0) -> None:
    """Runs whose metrics are independent of each other."""
    random = np.random.default_rng(seed)
    for _ in range(n):
        settings = settings_of(tune.main([file, "propose"])[0])
        drawn = zip(HIDDEN, random.normal(size=4) * [0.1, 0.1, 1.0, 3.0] + [0.5, 0.2, 2.0, 6.0], strict=True)
        tune.main([file, "add", *words(settings), ":", *words(dict(drawn))])


def test_the_hidden_trade_off_of_a_user_is_recovered(tune: Any, tmp_path: Path) -> None:
    file = str(tmp_path / "runs.json")
    add_noisy(tune, file, 14)
    for _ in range(40):  # every command reads the file and ends
        lines = tune.main([file, "ask"])
        pair = [int(re.match(r"run (\d+):", line)[1]) for line in lines[:2]]
        runs = json.loads(Path(file).read_text())["runs"]
        pair.sort(key=lambda i: -utility(runs[i]["metrics"]))
        tune.main([file, "prefer", *map(str, pair)])
    study = tune.Study(Path(file))
    x = np.array([[run["metrics"][name] for name in study.metrics] for run in study.runs])
    hidden = np.array([HIDDEN[name] for name in study.metrics]) * x.std(0)
    w, covariance = study.trade_off()
    assert w @ hidden / np.linalg.norm(w) / np.linalg.norm(hidden) > 0.97
    assert kendalltau(study.standardised() @ w, x @ [HIDDEN[name] for name in study.metrics]).statistic > 0.9
    assert (covariance.diagonal() < 1).all()  # less than before any comparison
    assert tune.main([file, "show"])[0].startswith("40 comparisons, ")


def test_the_weights_are_the_most_probable_ones(tune: Any, tmp_path: Path) -> None:
    file = str(tmp_path / "runs.json")
    add_noisy(tune, file, 6)
    study = tune.Study(Path(file))
    study.preferences = [(0, 1), (2, 3), (3, 2), (4, 0), (4, 5)]
    z, (w, _) = study.standardised(), study.trade_off()

    def log_probability(v: np.ndarray) -> float:
        return sum(-np.log1p(np.exp(-(z[a] - z[b]) @ v)) for a, b in study.preferences) - v @ v / 2

    for step in (*np.eye(4), *-np.eye(4)):
        slope = (log_probability(w + 1e-5 * step) - log_probability(w - 1e-5 * step)) / 2e-5
        assert abs(slope) < 1e-6


def test_proposals_become_better_than_chance(tune: Any, tmp_path: Path) -> None:
    file = str(tmp_path / "runs.json")
    found = []
    for _ in range(16):
        settings = settings_of(tune.main([file, "propose"])[0])
        metrics = outcome(settings)
        found.append(utility(metrics))
        tune.main([file, "add", *words(settings), ":", *words(metrics)])
        for _ in range(2 * (len(found) > 2)):
            lines = tune.main([file, "ask"])
            pair = [int(re.match(r"run (\d+):", line)[1]) for line in lines[:2]]
            pair.sort(key=lambda i: -found[i])
            tune.main([file, "prefer", *map(str, pair)])
    study = tune.Study(tmp_path / "none.json")
    chance = [utility(outcome(study.propose())) for _ in range(200)]  # without runs: random settings
    assert np.mean(found[6:]) > np.quantile(chance, 0.75)
    assert max(found) > np.quantile(chance, 0.95)


def test_a_study_is_as_it_was_left(tune: Any, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    study = tune.Study(whole)
    for file in (whole, cut):
        add_noisy(tune, str(file), 4)
        tune.main([str(file), "prefer", "0", "1"])
    assert json.loads(whole.read_text()) == json.loads(cut.read_text())
    study = tune.Study(whole)
    assert study.propose() == settings_of(tune.main([str(cut), "propose"])[0])
    before = cut.read_text()
    with pytest.raises(SystemExit):
        tune.main([str(cut), "prefer", "0", "9"])
    assert cut.read_text() == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["add", "beta=0.1", ":", "ap50=1"], "settings must be learning_rate, beta, gamma, got beta"),
        (
            ["add", *["learning_rate=1e-5", "beta=0.1", "gamma=1", ":", "ap50=1"]],
            "metrics must be those of the first run",
        ),
        (
            ["add", *["learning_rate=1e-5", "beta=0.1", "gamma=1", ":", "ap50=nan", "gap=1", "drift=1", "hours=1"]],
            "must be finite",
        ),
        (
            ["add", *["learning_rate=1", "beta=0.1", "gamma=1", ":", "ap50=1", "gap=1", "drift=1", "hours=1"]],
            "must lie in the space",
        ),
        (["add", "beta"], "expected name=number, got 'beta'"),
        (["prefer", "0", "0"], "prefer takes two different runs of 0 to 1, got 0 and 0"),
        (["prefer", "0"], "prefer takes two numbers of runs"),
        (["show", "all"], "show takes no words, got all"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tune: Any, given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "runs.json")
    add_noisy(tune, file, 2)
    with pytest.raises(SystemExit):
        tune.main([file, *given])
    assert message in capsys.readouterr().err
    assert len(tune.Study(Path(file)).runs) == 2


def test_there_is_nothing_to_ask_without_runs_or_when_all_are_compared(tune: Any, tmp_path: Path) -> None:
    study = tune.Study(tmp_path / "runs.json")
    with pytest.raises(ValueError, match="there is no run yet"):
        tune.command(study, "ask", [])
    add_noisy(tune, str(study.file), 2)
    study = tune.Study(study.file)
    study.prefer(1, 0)
    with pytest.raises(ValueError, match="no pair of 2 runs that was not compared; add a run"):
        study.ask()
