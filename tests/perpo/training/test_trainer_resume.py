"""What a run goes on from: its own checkpoints, whole, and no other run's."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ProcessorMixin

from perpo.storage.checksums import CHECKSUMS
from perpo.storage.identity import IDENTITY, StaleError
from perpo.training.checkpoints import run_identity
from perpo.training.trainer import PerPOTrainer

from .. import tiny_models, tiny_runs

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "reference": "none"}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def trainer(folder: Path, family: str = "llava", **options: Any) -> PerPOTrainer:
    return tiny_runs.trainer(family, folder, **(SAVING | options))


def checkpoints(folder: Path) -> dict[str, int]:
    """Name -> when it was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("checkpoint-*")}


def test_a_new_run_refuses_a_folder_with_checkpoints_and_leaves_them_alone(tmp_path: Path) -> None:
    trainer(tmp_path, learning_rate=1e-2).train()
    before = checkpoints(tmp_path)
    with pytest.raises(ValueError, match="holds checkpoints; resume from them with resume_from_checkpoint=true"):
        trainer(tmp_path, learning_rate=1e-4, save_total_limit=1).train()
    assert before == checkpoints(tmp_path)
    assert set(before) == {"checkpoint-2", "checkpoint-4"}


def other_lists(options: dict[str, Any]) -> None:
    first, *rest = tiny_runs.records()
    options["data"] = [dataclasses.replace(first, rewards=tuple(reversed(first.rewards or ()))), *rest]


@pytest.mark.parametrize(
    ("settings", "different"),
    [
        ({"learning_rate": 1e-4}, r"learning_rate \(0.001 there, 0.0001 now\)"),
        ({"seed": 3}, r"seed \(0 there, 3 now\)"),
        ({"objective": "dpo"}, "objective "),
        ({"gradient_accumulation_steps": 2}, r"lists a step \(1 there, 2 now\)"),
        ({"max_response_length": 4}, "response format"),
        ({"max_candidates": 2}, "lists "),
        ({"bf16": True}, r"precision \(no there, bf16 now\)"),
        ({"lora": False}, "trained weights"),
        (other_lists, "lists "),
    ],
)
def test_a_run_goes_on_from_no_other_runs_checkpoint(settings: Any, different: str, tmp_path: Path) -> None:
    trainer(tmp_path / "a").train()
    options: dict[str, Any] = {}
    settings(options) if callable(settings) else options.update(settings)
    message = f"output_dir: .*a holds checkpoints that this run cannot take as its own; different: {different}"
    with pytest.raises(StaleError, match=message):
        trainer(tmp_path / "a", **options).train(resume_from_checkpoint=True)


def test_nor_does_it_by_path(tmp_path: Path) -> None:
    trainer(tmp_path / "a").train()
    other = trainer(tmp_path / "b", learning_rate=1e-4)
    with pytest.raises(StaleError, match=r"resume_from_checkpoint: .*a holds checkpoints .*; different: learning_rate"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert not (tmp_path / "b" / IDENTITY).exists()


def test_what_decides_nothing_may_change_when_a_run_goes_on(tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 2, "max_steps": 2}
    trainer(tmp_path / "a", **options).train()
    moved = tmp_path / "elsewhere"
    (tmp_path / "a").rename(moved)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}  # as on half the devices
    options |= {"save_steps": 1, "logging_steps": 2, "save_total_limit": 1, "gradient_checkpointing": True}
    run = trainer(moved, **options, prefix_sharing="off", max_chunk_bytes=1 << 20)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 4


def test_a_run_goes_on_in_another_folder_by_path(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "a")
    whole.train()
    run = trainer(tmp_path / "b")
    run.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert set(checkpoints(tmp_path / "b")) == {"checkpoint-4"}
    expected = tiny_runs.trained(whole.model)
    for name, value in tiny_runs.trained(run.model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    again = trainer(tmp_path / "b")
    again.train(resume_from_checkpoint=True)  # the folder has taken the run's identity


@pytest.mark.parametrize("max_steps", [2, 4, 6])
def test_a_run_that_is_over_takes_no_step_more(max_steps: int, tmp_path: Path) -> None:
    """Whether its last step is the last of a pass over the four lists or in the middle of one."""
    whole = trainer(tmp_path, max_steps=max_steps)
    whole.train()
    run = trainer(tmp_path, max_steps=max_steps)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == max_steps
    expected = tiny_runs.trained(whole.model)
    for name, value in tiny_runs.trained(run.model).items():
        assert torch.equal(value, expected[name]), name


def test_without_checkpoints_a_folder_is_free(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="no").train()
    run = trainer(tmp_path, learning_rate=1e-4)
    run.train(resume_from_checkpoint=True)  # there is nothing to go on from
    assert json.loads((tmp_path / IDENTITY).read_text())["learning_rate"] == "0.0001"


@pytest.mark.parametrize("resume", [False, True])
def test_torn_checkpoints_are_no_obstacle(resume: bool, tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2).train()
    (tmp_path / "checkpoint-2" / CHECKSUMS).unlink()  # it is written last
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{")
    run = trainer(tmp_path, learning_rate=1e-4)
    run.train(resume_from_checkpoint=resume)
    assert run.state.global_step == 4


def test_checkpoints_that_do_not_say_whose_they_are_are_gone_on_from(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2).train()
    (tmp_path / IDENTITY).unlink()
    trainer(tmp_path).train(resume_from_checkpoint=True)
    assert (tmp_path / IDENTITY).exists()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm", "internvl"])
def test_a_whole_model_goes_on_as_if_it_had_not_been_stopped(family: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(ProcessorMixin, "save_pretrained", lambda self, folder: None)  # tiny ones have parts missing
    whole = trainer(tmp_path / "whole", family, lora=False, save_strategy="no")
    whole.train()
    trainer(tmp_path / "broken", family, lora=False, max_steps=2).train()
    resumed = trainer(tmp_path / "broken", family, lora=False)
    resumed.train(resume_from_checkpoint=True)
    expected = tiny_runs.trained(whole.model)
    for name, value in tiny_runs.trained(resumed.model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_best_checkpoint_of_a_whole_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    """Its rate makes it worse from the first step on, so that the first checkpoint is the best."""
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1.0}
    settings = tiny_runs.config(tmp_path, **(SAVING | options | {"save_steps": 1, "max_steps": 3}))
    model, processor = tiny_models.build("llava")
    run = PerPOTrainer(model, settings, tiny_runs.records(), processor, eval_dataset=tiny_runs.records())
    run.train()
    losses = [line["eval_loss"] for line in run.state.log_history if "eval_loss" in line]
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
    assert min(losses) != losses[-1]


def test_a_checkpoint_under_other_names_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, lora=False, max_steps=2).train()
    model, _ = tiny_models.build("llava")
    model.save_pretrained(tmp_path / "checkpoint-2")  # the names of older versions of transformers
    (tmp_path / "checkpoint-2" / CHECKSUMS).unlink()
    with pytest.raises(ValueError, match=r"checkpoint lacks \d+ weights of LlavaForConditionalGeneration"):
        trainer(tmp_path, lora=False).train(resume_from_checkpoint=True)


def test_two_runs_from_other_trained_adapters_are_two_runs(tmp_path: Path) -> None:
    """New adapters change nothing yet, whatever their random factor is; trained ones decide what a run computes."""

    def identity(value: float, seed: int = 0) -> str:
        torch.manual_seed(seed)
        runner = trainer(tmp_path / "a", seed=0)
        for name, parameter in runner.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, value)
        return run_identity(runner.model, runner.args, runner.encoder, "lists")["weights of adapters"]

    assert identity(0.0) == identity(0.0, seed=1) == "new"
    assert identity(0.5) == identity(0.5) != identity(0.25)
    assert identity(0.5) != "new"
