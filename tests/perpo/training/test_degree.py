"""Awareness of degree (SPO): the loss of its formula, a head that is saved and resumed, and nothing at weight 0."""

import copy
import dataclasses
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from perpo.encoding.collator import ListCollator
from perpo.storage.identity import StaleError
from perpo.training.degree import FILE, IGNORED, NAME, degrees

from .. import tiny_runs
from .test_trainer import full_logits_loss

SAVING: dict[str, Any] = {"reference": "none", "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("sharing", ["off", "auto"])
def test_loss_and_gradients_are_those_of_the_formula(family: str, sharing: str, tmp_path: Path) -> None:
    options = {"reference": "none", "prefix_sharing": sharing, "beta": 0.3}
    runner = tiny_runs.trainer(family, tmp_path, degree_weight=0.7, degree_levels=4, **options)
    batch = runner.data_collator(runner.train_dataset)
    separate = ListCollator(runner.encoder)(tiny_runs.records())
    for one in (batch, separate):
        one.inputs = {key: x.double() if x.is_floating_point() else x for key, x in one.inputs.items()}
    runner.model.double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in runner.degree.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    plain = copy.deepcopy(runner.model)
    loss = runner.compute_loss(runner.model, batch)
    loss.backward()

    states = plain(**separate.inputs, output_hidden_states=True).hidden_states[-1].flatten(0, 1)
    answers = states[separate.response_rows].split(separate.cu_seqlens.diff().tolist())
    head, of_lists = getattr(plain.get_base_model(), NAME), []
    for (start, end), record in zip(pairwise(separate.cu_lists.tolist()), tiny_runs.records(), strict=True):
        low, high = min(record.rewards), max(record.rewards)
        if low == high:
            of_lists.append(torch.zeros(()).double())
            continue
        each = []
        for answer, reward in zip(answers[start:end], record.rewards, strict=True):
            target = min(math.floor(4 * (reward - low) / (high - low)), 3)
            logits = answer.mean(0) @ head.weight.T + head.bias
            each.append(-logits.log_softmax(0)[target])
        of_lists.append(sum(each) / len(each))
    expected = full_logits_loss(plain, separate, None, 0.3, 0.5) + 0.7 * sum(of_lists) / len(of_lists)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    theirs = dict(plain.named_parameters())
    for name, parameter in runner.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-7, msg=name)
    assert getattr(runner.model.get_base_model(), NAME).weight.grad.abs().max() > 0


def test_degrees_are_levels_of_the_range_of_each_list() -> None:
    rewards = torch.tensor([0.0, 0.1, 0.34, 0.67, 1.0, 5.0, 5.0, -1.0, 3.0, torch.nan, torch.nan])
    cu_lists = torch.tensor([0, 5, 7, 9, 11])
    none = IGNORED
    assert degrees(rewards, cu_lists, 3).tolist() == [0, 0, 1, 2, 2, none, none, 0, 2, none, none]
    assert degrees(rewards, cu_lists, 2).tolist() == [0, 0, 0, 1, 1, none, none, 0, 1, none, none]


def test_an_answer_under_a_corrupted_image_has_no_degree(tmp_path: Path) -> None:
    found = []
    for objective in ("mdpo", "dpo"):
        runner = tiny_runs.trainer("llava", tmp_path / objective, objective=objective, degree_weight=1.0)
        torch.nn.init.normal_(runner.degree.weight, generator=torch.Generator().manual_seed(0))
        batch = runner.data_collator(runner.train_dataset)
        assert (batch.added is not None) == (objective == "mdpo")
        found.append(runner._forward(runner.model.eval(), batch)[1])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert found[0][2] == 3  # the second of the four lists has equal rewards


def test_a_list_counts_as_often_as_its_weight_says(tmp_path: Path) -> None:
    runner = tiny_runs.trainer("llava", tmp_path, reference="none", degree_weight=0.5)
    torch.nn.init.normal_(runner.degree.weight, generator=torch.Generator().manual_seed(0))
    runner.model.eval()
    alone = [runner._forward(runner.model, runner.data_collator([record])) for record in runner.train_dataset]
    weights = [2.0, 1.0, 0.0, 0.5]
    weighted = [dataclasses.replace(record, weight=w) for record, w in zip(runner.train_dataset, weights, strict=True)]
    output, sums = runner._forward(runner.model, runner.data_collator(weighted))
    expected = sum(w * one for w, (_, one) in zip(weights, alone, strict=True))
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-5)
    loss = sum(w * one.loss for w, (one, _) in zip(weights, alone, strict=True))
    torch.testing.assert_close(output.loss, loss, rtol=1e-4, atol=1e-5)


def test_in_bf16_the_head_stays_in_fp32(tmp_path: Path) -> None:
    options = {"degree_weight": 1.0, "bf16": True, "gradient_checkpointing": True, "learning_rate": 1e-2}
    runner = tiny_runs.trainer("llava", tmp_path, max_steps=3, reference="none", **options)
    runner.train()
    assert runner.degree.weight.dtype == torch.float32
    assert runner.degree.weight.abs().max() > 0
    assert all(math.isfinite(log["degree/loss"]) for log in runner.state.log_history if "degree/loss" in log)


def test_at_weight_0_the_run_is_that_without_the_setting(tmp_path: Path) -> None:
    trained = []
    for name, options in (("plain", {}), ("zero", {"degree_weight": 0.0})):
        runner = tiny_runs.trainer("llava", tmp_path / name, max_steps=3, dropout=0.2, reference="none", **options)
        runner.train()
        assert not any(NAME in name for name, _ in runner.model.named_parameters())
        assert not any(name.startswith("degree/") for log in runner.state.log_history for name in log)
        trained.append(tiny_runs.trained(runner.model))
    assert all(torch.equal(p, trained[1][name]) for name, p in trained[0].items())


@pytest.mark.parametrize("lora", [True, False])
def test_the_head_is_saved_and_resumed_and_no_part_of_the_model(lora: bool, tmp_path: Path) -> None:
    options = SAVING | {"lora": lora, "degree_weight": 0.5, "learning_rate": 1e-3}
    whole = tiny_runs.trainer("llava", tmp_path / "whole", max_steps=4, **options)
    whole.train()
    whole.save_model()
    tiny_runs.trainer("llava", tmp_path / "cut", max_steps=2, **options).train()
    resumed = tiny_runs.trainer("llava", tmp_path / "cut", max_steps=4, **options)
    resumed.train(resume_from_checkpoint=True)
    expected = tiny_runs.trained(whole.model)
    assert any(name.endswith(f"{NAME}.weight") and p.abs().max() > 0 for name, p in expected.items())
    assert all(torch.equal(p, expected[name]) for name, p in tiny_runs.trained(resumed.model).items())
    for folder in (tmp_path / "whole", tmp_path / "whole" / "checkpoint-4"):
        saved = torch.load(folder / FILE, weights_only=True)
        assert torch.equal(saved["weight"], whole.degree.weight)
        weights = load_file(folder / ("adapter_model.safetensors" if lora else "model.safetensors"))
        assert weights
        assert not any(NAME in name for name in weights)
    other = tiny_runs.trainer("llava", tmp_path / "cut", max_steps=6, **options | {"degree_weight": 0.6})
    with pytest.raises(StaleError, match=r"different: degrees \(3 levels, weight 0.5 there, 3 levels, weight 0.6 now"):
        other.train(resume_from_checkpoint=True)


def test_its_accuracy_is_logged_and_rises(tmp_path: Path) -> None:
    options = {"degree_weight": 1.0, "learning_rate": 1e-2, "reference": "none", "per_device_train_batch_size": 4}
    runner = tiny_runs.trainer("llava", tmp_path, max_steps=20, **options)
    runner.train()
    logs = [log for log in runner.state.log_history if "degree/loss" in log]
    assert logs[0]["degree/loss"] == pytest.approx(math.log(3), rel=1e-5)  # the head begins at 0
    assert logs[-1]["degree/accuracy"] > 0.9 > logs[0]["degree/accuracy"]
    assert logs[-1]["degree/loss"] < 0.5
    shown = runner.evaluate(runner.train_dataset)
    assert shown["eval_degree/accuracy"] > 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"degree_weight": -1.0}, "degree_weight must be a finite number ≥ 0, got -1.0"),
        ({"degree_weight": math.nan}, "degree_weight must be a finite number ≥ 0, got nan"),
        ({"degree_weight": 0.1, "degree_levels": 1}, "degree_levels must be ≥ 2, got 1"),
        ({"degree_levels": 3}, "degree_levels is given, but degree_weight=0 does not use it"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_runs.config(tmp_path, **settings)
