"""Training on packed rows: the same as on a row for every candidate, only with fewer tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from perpo.encoding.collator import ListCollator
from perpo.model.sharing import SharingNotExact
from perpo.training.trainer import PerPOTrainer
from tests.perpo import tiny_models, tiny_runs


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("objective", ["perpo", "mdpo"])
def test_a_run_on_packed_rows_is_the_run_on_separate_rows(family: str, objective: str, tmp_path: Path) -> None:
    runs: dict[str, Any] = {}
    for sharing in ("on", "off"):
        settings = {"max_steps": 3, "per_device_train_batch_size": 2, "objective": objective, "logging_steps": 1}
        runs[sharing] = tiny_runs.trainer(family, tmp_path / sharing, prefix_sharing=sharing, **settings)
        runs[sharing].train()
    logs = {sharing: [line for line in run.state.log_history if "loss" in line] for sharing, run in runs.items()}
    for shared, separate in zip(logs["on"], logs["off"], strict=True):
        for name in ("loss", "rewards/margins", "logps/chosen", "lists/kendall_tau"):
            assert shared[name] == pytest.approx(separate[name], rel=2e-3, abs=2e-4), name
        assert separate["prefix/token_ratio"] == 1
        assert shared["prefix/token_ratio"] > 1.3  # two or three short answers
    weights = [dict(runs[sharing].model.named_parameters()) for sharing in ("on", "off")]
    for name, ours in weights[0].items():
        torch.testing.assert_close(ours, weights[1][name], rtol=1e-2, atol=2e-5, msg=name)


def test_the_logged_ratio_is_that_of_the_tokens(tmp_path: Path) -> None:
    run = tiny_runs.trainer("llava", tmp_path, max_steps=1, per_device_train_batch_size=1)
    batches = [run.data_collator([record]) for record in run.train_dataset]
    separate = ListCollator(run.encoder)
    ratios = {
        batch.n_tokens: separate([record]).n_tokens / batch.n_tokens
        for record, batch in zip(run.train_dataset, batches, strict=True)
    }
    run.train()
    assert any(run.state.log_history[0]["prefix/token_ratio"] == pytest.approx(x, rel=1e-5) for x in ratios.values())


def test_before_the_first_step_a_model_that_is_not_exact_stops_the_run(tmp_path: Path, monkeypatch: Any) -> None:
    run = tiny_runs.trainer("llava", tmp_path, reference="none", max_steps=1)
    positions = type(run.data_collator.positions)
    monkeypatch.setattr(
        positions, "positions", lambda self, prompt, n: (torch.arange(prompt["input_ids"].shape[1]), torch.arange(n))
    )
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    with pytest.raises(SharingNotExact, match="LlavaForConditionalGeneration gives other log-probs"):
        run.train()
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())


@pytest.mark.parametrize("sharing", ["auto", "off"])
def test_a_reference_of_another_architecture_is_refused(sharing: str, tmp_path: Path) -> None:
    model, processor = tiny_models.build("llava")
    other, _ = tiny_models.build("qwen2_5_vl")
    config = tiny_runs.config(tmp_path, reference="model", prefix_sharing=sharing)
    with pytest.raises(ValueError, match="ref_model: Qwen2_5_VLForConditionalGeneration does not take the inputs of"):
        PerPOTrainer(model, config, tiny_runs.records(), processor, ref_model=other)


def test_lists_with_and_without_an_image_are_each_checked_and_trained_alone(tmp_path: Path) -> None:
    records = tiny_runs.records()
    mixed = [records[0], *(dataclasses.replace(record, image=None) for record in records[1:])]
    run = tiny_runs.trainer("qwen2_5_vl", tmp_path, data=mixed, max_steps=2, per_device_train_batch_size=1)
    run.train()
    assert run.state.global_step == 2


def test_another_flash_attention_is_refused_where_it_would_do_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"flash_attention_impl='FA4': .*this is a 'cpu' device"):
        tiny_runs.trainer("llava", tmp_path, prefix_sharing="on", flash_attention_impl="FA4")
    with pytest.raises(ValueError, match=r"flash_attention_impl='FA4': .*prompts are not shared here"):
        tiny_runs.trainer("llava", tmp_path, prefix_sharing="off", flash_attention_impl="FA4")
