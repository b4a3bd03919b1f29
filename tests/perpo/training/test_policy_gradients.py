"""What policy gradients, BCO and weights of lists need of the trainer: log-probs of the policy that sampled, a reward
shift from step to step, and what each list counts."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from perpo.data.record import ListRecord
from perpo.encoding.batch import candidate_tensors
from perpo.training.metrics import ListMetrics
from perpo.training.reward_shift import FILE, RewardShift
from perpo.training.trainer import PerPOTrainer

from .. import tiny_runs


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# ---------------------------------------------------------------------------------------------- the policy that sampled


def test_ratios_are_to_the_model_as_training_begins_with_its_adapters(tmp_path: Path) -> None:
    """The adapters of the first model are trained ones: without them it is another policy."""
    runner = tiny_runs.trainer("llava", tmp_path, objective="gspo", per_device_train_batch_size=4)
    assert runner.args.reference == "start"
    batch = runner.data_collator(runner.train_dataset)
    with torch.no_grad():
        loss, output = runner.compute_loss(runner.model.eval(), batch, return_outputs=True)
    assert output.scores.abs().max() < 1e-5
    assert abs(loss.item()) < 1e-6  # the mean advantage
    without = tiny_runs.trainer("llava", tmp_path / "off", objective="gspo", reference="precomputed")
    assert not torch.allclose(
        torch.tensor(without.train_dataset[0].ref_log_probs), torch.tensor(runner.train_dataset[0].ref_log_probs)
    )


def test_a_cache_of_other_adapters_is_not_taken(tmp_path: Path) -> None:
    tiny_runs.trainer("llava", tmp_path, objective="gspo")
    with pytest.raises(ValueError, match="adapters"):
        tiny_runs.trainer("llava", tmp_path, objective="gspo", reference="precomputed")


def test_ratios_to_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"objective='gspo' takes ratios to the policy that sampled; use 'start'"):
        tiny_runs.config(tmp_path, objective="gspo", reference="none")


# ----------------------------------------------------------------------------------------------------- the reward shift


def bco(folder: Path, **options: Any) -> PerPOTrainer:
    """Steps of two batches of one list each."""
    defaults: dict[str, Any] = {
        "objective": "bco", "beta": 0.5, "learning_rate": 3e-2, "max_steps": 4, "gradient_accumulation_steps": 2,
        "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    return tiny_runs.trainer("llava", folder, **(defaults | options))


def logged(runner: PerPOTrainer) -> list[dict[str, float]]:
    return [log for log in runner.state.log_history if "rewards/shift" in log]


def test_the_shift_is_the_mean_of_what_came_before(tmp_path: Path) -> None:
    runner = bco(tmp_path)
    runner.train()
    logs = logged(runner)
    assert len(logs) == 4
    assert logs[0]["rewards/shift"] == 0.0
    sums = n = 0.0
    for log in logs:
        assert log["rewards/shift"] == pytest.approx(sums / max(n, 1), rel=1e-4, abs=1e-6)
        n_active = 2 * log["lists/active"]  # of two lists a step
        sums += n_active * (log["rewards/chosen"] + log["rewards/rejected"])
        n += 2 * n_active
    assert abs(logs[-1]["rewards/shift"]) > 1e-4


def test_a_resumed_run_has_the_shift_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    whole = bco(tmp_path / "whole")
    whole.train()
    half = bco(tmp_path / "half", max_steps=2)
    half.train()
    rest = bco(tmp_path / "half")
    rest.train(resume_from_checkpoint=True)
    assert [log["rewards/shift"] for log in logged(rest)] == [log["rewards/shift"] for log in logged(whole)]
    assert logged(rest)[-1]["loss"] == logged(whole)[-1]["loss"]
    (tmp_path / "half" / "checkpoint-4" / FILE).unlink()
    (tmp_path / "half" / "checkpoint-4" / "checksums.json").unlink()  # one that does not notice
    with pytest.raises(ValueError, match=f"{FILE}, the reward shift of this objective, cannot be read"):
        bco(tmp_path / "half", max_steps=5).train(resume_from_checkpoint=True)


def test_ranks_have_one_shift_between_them() -> None:
    """As of one process that has seen the answers of both."""
    ranks, one = [RewardShift(torch.device("cpu")) for _ in range(2)], RewardShift(torch.device("cpu"))
    batches = ((3.0, 4.0), (-1.0, 2.0)), ((0.5, 2.0), (2.5, 4.0))  # of each step: sum and weight on each rank
    for step in batches:
        for rank, sums in zip(ranks, step, strict=True):
            rank.add(*torch.tensor(sums))
            one.add(*torch.tensor(sums))
        total = sum(rank.pending for rank in ranks)
        for rank in ranks:
            rank.update(SimpleNamespace(reduce=lambda pending, how, total=total: total))
        one.update(SimpleNamespace(reduce=lambda pending, how: pending))
        assert ranks[0].value == ranks[1].value == one.value
    assert one.value.item() == pytest.approx(5 / 12)


def test_evaluation_neither_waits_for_a_shift_nor_moves_it(tmp_path: Path) -> None:
    runner = bco(tmp_path)
    runner.evaluate(runner.train_dataset)
    assert runner._shift is not None
    assert runner._shift.pending.tolist() == [0.0, 0.0]


# ----------------------------------------------------------------------------------------------------- weights of lists


WEIGHTS = (0.5, 3.0, None, 0.0)  # None counts 1; the second list has no preference


def weighted() -> list[ListRecord]:
    return [dataclasses.replace(r, weight=w) for r, w in zip(tiny_runs.records(4), WEIGHTS, strict=True)]


def test_lists_count_in_loss_and_metrics_what_their_records_say(tmp_path: Path) -> None:
    runner = tiny_runs.trainer("llava", tmp_path, data=weighted(), per_device_train_batch_size=4)
    model, collate = runner.model.eval(), runner.data_collator
    assert runner.train_dataset is not None
    alone = []  # of each list: loss, chosen reward, accuracy
    with torch.no_grad():
        for sample in runner.train_dataset:
            metrics = runner.metrics["eval"] = ListMetrics()
            loss = runner.compute_loss(model, collate([dataclasses.replace(sample, weight=None)]))
            report = metrics.report(runner.accelerator)
            alone.append((loss.item(), report["rewards/chosen"], report["lists/pair_accuracy"]))
        metrics = runner.metrics["eval"] = ListMetrics()
        loss = runner.compute_loss(model, collate(runner.train_dataset)).item()
        report = metrics.report(runner.accelerator)
    assert loss == pytest.approx((0.5 * alone[0][0] + alone[2][0]) / 4, rel=1e-5)
    assert report["loss"] == pytest.approx(loss, rel=1e-6)
    for place, name in ((1, "rewards/chosen"), (2, "lists/pair_accuracy")):
        assert report[name] == pytest.approx((0.5 * alone[0][place] + alone[2][place]) / 1.5, rel=1e-4)
    assert report["lists/active"] == 0.75


def test_batches_may_be_cut_anywhere(tmp_path: Path) -> None:
    """Weights are not divided by their sum, so two accumulated batches of two are one of four."""
    steps = []
    for size, accumulated in ((4, 1), (2, 2)):
        runner = tiny_runs.trainer(
            "llava", tmp_path / str(size), data=weighted(), per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated, optim="sgd", learning_rate=1.0,
        )  # fmt: skip
        runner.train()
        steps.append(tiny_runs.trained(runner.model))
    for name, value in steps[0].items():
        torch.testing.assert_close(value, steps[1][name], rtol=1e-3, atol=1e-6)


def test_one_weight_a_list() -> None:
    with pytest.raises(ValueError, match="list_weights: expected one number for each of 2 lists, got 1"):
        candidate_tensors([[[1], [2]], [[3]]], list_weights=[1.0])
