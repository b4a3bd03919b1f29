"""The race: what an arm is, what it trains on, that it resumes, and its statistics."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from perpo.data.record import ListRecord
from perpo.demo.race import results as results_module
from perpo.demo.race import rows as rows_module
from perpo.demo.race.__main__ import beyond, finalists, learning_rates, tuned_arm
from perpo.demo.race.arms import SFT, Arm, questions, sweep
from perpo.demo.race.report import report
from perpo.demo.race.results import Results
from perpo.demo.race.rows import SCORES, read_rows, run_all
from perpo.demo.race.run import chosen, moved, run, scored, summary
from perpo.rewards import box_iou, parse_box

SMALL = Arm(pictures=16, k=4, held_out=24, learning_rate=1e-4)
TRUTH = "[0.20, 0.20, 0.60, 0.60]"


def listed(*boxes: str) -> ListRecord:
    return ListRecord("r", None, "where is the 7?", TRUTH, "grounding", boxes)


def test_an_arm_has_one_name() -> None:
    assert Arm(gamma=0.5).key == Arm().key == Arm(beta=0.1).key
    assert Arm(probes=True).key == Arm().key
    arms = [arm for of in questions([0, 1]).values() for arm in of]
    named = {json.dumps(arm.named(), sort_keys=True, default=list) for arm in (replace(a, probes=False) for a in arms)}
    assert len({arm.key for arm in arms}) == len(named)
    with pytest.raises(ValueError, match="rounds"):
        Arm(rounds=3)


def test_all_arms_sample_and_train_on_as_much() -> None:
    for arm in questions([0])["race"]:
        assert arm.objective == SFT or (arm.pictures, arm.k, arm.passes) == (256, 16, 1)
    assert all(arm.pictures * arm.k == 4096 for arm in questions([0])["tokens"])


def test_each_is_trained_at_its_own_best_rate() -> None:
    made = [(arm, 0.5 if arm.learning_rate == 2e-4 else 0.4) for arm in sweep(["grounding"])]
    rows = {a.key: {"arm": a.named(), "metrics": {"1": {"ap50": value}}} for a, value in made}
    best = learning_rates(rows)
    assert list(best.values()) == [2e-4] * 12
    assert tuned_arm(Arm(rounds=8), best).learning_rate == 2e-4
    assert tuned_arm(Arm(objective=SFT), best).learning_rate is None


@pytest.mark.parametrize(("best", "more"), [(5e-5, 2.5e-5), (1e-4, None), (4e-4, 8e-4)])
def test_a_best_rate_at_the_end_of_the_sweep_is_not_the_end_of_it(best: float, more: float | None) -> None:
    arms = [arm for arm in sweep(["ocr"]) if (arm.objective, arm.rounds) == ("dpo", 4)]
    rows = {
        arm.key: {"arm": arm.named(), "metrics": {"1": {"edit_similarity": float(arm.learning_rate == best)}}}
        for arm in arms
    }
    assert beyond(arms, rows) == ([] if more is None else [replace(arms[0], learning_rate=more)])


def test_the_two_best_rates_are_tried_with_more_seeds() -> None:
    arms = [arm for arm in sweep(["ocr"]) if (arm.objective, arm.rounds) == ("dpo", 4)]
    of_first = dict(zip([5e-5, 1e-4, 2e-4, 4e-4], [0.1, 0.6, 0.5, 0.2], strict=True))
    rows = {
        arm.key: {"arm": arm.named(), "metrics": {"1": {"edit_similarity": of_first[arm.learning_rate or 0]}}}
        for arm in arms
    }
    more = finalists(arms, rows)
    assert {(arm.learning_rate, arm.seed) for arm in more} == {(r, s) for r in (1e-4, 2e-4) for s in (101, 102)}
    assert learning_rates(rows) == {("ocr", "dpo", 4): 1e-4}
    for arm in more:  # the other seeds know better
        value = 0.7 if arm.learning_rate == 2e-4 else 0.1
        rows[arm.key] = {"arm": arm.named(), "metrics": {"1": {"edit_similarity": value}}}
    assert learning_rates(rows) == {("ocr", "dpo", 4): 2e-4}


def test_a_truth_that_is_off_is_off_by_that_much_and_only_for_the_rewards() -> None:
    box, true_box = parse_box(moved(TRUTH, Arm(noise=0.2))), parse_box(TRUTH)
    assert box is not None
    assert true_box is not None
    assert [round(abs(a - b), 2) for a, b in zip(box, true_box, strict=True)] == [0.08] * 4
    record = scored(listed(TRUTH, "[0.3, 0.3, 0.5, 0.5]"), Arm(noise=0.2, k=2))
    assert record.answer == TRUTH
    assert record.rewards is not None
    assert record.rewards[0] == pytest.approx(box_iou(true_box, box), abs=1e-6)


def test_parts_of_a_list() -> None:
    boxes = [f"[0.20, 0.20, 0.60, {0.30 + 0.02 * i:.2f}]" for i in range(16)]  # better and better up to the truth
    record = scored(listed(*boxes), Arm())
    assert chosen(record, Arm(answers="best")).responses == tuple(boxes[8:])
    assert chosen(record, Arm(answers="worst")).responses == tuple(boxes[:8])
    assert chosen(record, Arm(answers="ends")).responses == tuple(boxes[:4] + boxes[12:])
    copies = chosen(record, Arm(answers="copies"))
    assert copies.responses[:8] == tuple(boxes[:8])
    assert len(copies.responses) == 16
    for one, copy in zip(boxes[:8], copies.responses[8:], strict=True):
        a, b = parse_box(one), parse_box(copy)
        assert a is not None
        assert b is not None
        assert sorted(round(abs(x - y), 2) for x, y in zip(a, b, strict=True)) == [0, 0, 0, 0.01]


def test_two_rounds_train_on_pictures_of_their_own_and_count_what_they_cost(tmp_path: Path) -> None:
    (one,), spent = run(replace(SMALL, rounds=2, probes=True, objective="grpo"), tmp_path)
    assert len(one.scores) == 24
    assert {"ap50", "ap75", "gap", "drift"} <= one.metrics.keys()
    assert one.metrics["drift"] > 0
    (again,), same = run(replace(SMALL, rounds=1), tmp_path)
    assert not np.array_equal(one.scores, again.scores)
    assert spent.sampled_tokens == pytest.approx(same.sampled_tokens, rel=0.05)  # an answer may be cut
    (untrained,), nothing = run(replace(SMALL, objective=SFT, probes=True), tmp_path)
    assert (untrained.metrics["drift"], nothing.trained_tokens) == (0, 0)


def test_measured_in_between(tmp_path: Path) -> None:
    outcomes, _ = run(replace(SMALL, passes=2, measured=(1, 2)), tmp_path)
    assert [one.after for one in outcomes] == [1, 2]


class InThisProcess:
    """An executor whose work is done as it is submitted."""

    ran: ClassVar[list[Arm]] = []

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def submit(self, call: Any, arm: Arm, folder: Path) -> Any:
        from concurrent.futures import Future

        self.ran.append(arm)
        future: Future[Any] = Future()
        (folder / SCORES).mkdir(exist_ok=True)
        scores = np.random.default_rng([arm.seed, len(arm.objective)]).random(arm.held_out).astype(np.float32)
        np.save(folder / SCORES / f"{arm.key}-1.npy", scores)
        metrics = {"1": summary(arm.task, scores) | ({"gap": 0.1, "drift": 1.0} if arm.probes else {})}
        spent = {"sampled_tokens": 1, "trained_tokens": 1, "sampling": 1, "training": 1}
        row = {"key": arm.key, "arm": arm.named(), "learning_rate": arm.learning_rate}
        future.set_result({**row, "metrics": metrics, "spent": spent})
        return future


def test_rows_are_kept_and_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(InThisProcess, "ran", [])
    arms = [replace(SMALL, seed=seed, objective=o) for seed in (0, 1, 2) for o in ("perpo", "dpo", SFT)]
    run_all("first", arms[:4], tmp_path, 1)
    run_all("again", [*arms, *arms], tmp_path, 1)
    assert len(InThisProcess.ran) == len(arms) == len(read_rows(tmp_path))
    run_all("with probes", [replace(arms[0], probes=True)], tmp_path, 1)  # its row holds no gap
    assert len(InThisProcess.ran) == len(arms) + 1


def test_differences_are_paired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "ProcessPoolExecutor", InThisProcess)
    arms = [replace(SMALL, held_out=400, seed=seed, objective=o) for seed in range(3) for o in ("perpo", "grpo")]
    run_all("all", arms, tmp_path, 1)
    results = Results(tmp_path, read_rows(tmp_path), {})
    ours, theirs = arms[0], arms[1]
    better = {seed: np.load(tmp_path / SCORES / f"{replace(ours, seed=seed).key}-1.npy") for seed in range(3)}
    for seed, scores in better.items():  # another objective with 0.01 less on every picture
        np.save(tmp_path / SCORES / f"{replace(theirs, seed=seed).key}-1.npy", scores - 0.01)
    found = results.difference(ours, theirs, "mean_iou")
    assert found.value == pytest.approx(0.01, abs=1e-6)
    assert found.high - found.low < 1e-6
    alone = results.interval(ours, "mean_iou")
    assert alone.low < alone.value < alone.high
    # The width of a mean over 3 seeds of 400 uniform numbers: 2 · 1.96 · σ / √1200, σ = √(1/12), seeds drawn as well.
    assert 0.5 < (alone.high - alone.low) / (2 * 1.96 * 12**-0.5 / 1200**0.5) < 2


def test_the_report_says_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rows_module, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(results_module, "DRAWS", 50)
    asked = questions([0, 1])
    run_all("rates", [arm for arm in sweep(["grounding"]) if arm.learning_rate == 1e-4], tmp_path, 1)
    best = learning_rates(read_rows(tmp_path))
    run_all("race", [tuned_arm(arm, best) for arm in [*asked["race"], *asked["margins"]]], tmp_path, 1)
    capsys.readouterr()  # progress
    report(tmp_path, read_rows(tmp_path), best)
    out = capsys.readouterr().out
    assert "| PerPO | 8 |" in out
    assert "PerPO − GRPO, 4 rounds" in out
    assert "Reading" not in out
    assert "Grounding, 2 seeds" in out
    assert (tmp_path / "tables.md").read_text().strip() == out.strip()
    shutil.rmtree(tmp_path / SCORES)
    report(tmp_path, read_rows(tmp_path), best)  # of what was packed
    assert capsys.readouterr().out == out
    assert {path.name for path in tmp_path.glob("*.png")} == {"race.png", "margins.png"}


KILLED = """
import multiprocessing, os, signal, time
from concurrent.futures import ProcessPoolExecutor

from perpo.demo.workers import start_worker

if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=start_worker) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_the_program(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(KILLED)
    done = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    worker, until = int(done.stdout), time.monotonic() + 30
    while Path(f"/proc/{worker}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()
