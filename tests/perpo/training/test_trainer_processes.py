"""Training in processes of its own: several at once, and killed ones."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from perpo.training.checkpoints import finished_checkpoints, problems

from ...processes import ranks, start
from .. import tiny_models
from ..run_training import train

RUN = ["-m", "tests.perpo.run_training"]


def two_ranks(folder: Path, **options: Any) -> str:
    """What both print on stderr; they end well."""
    folder.mkdir()
    both = ranks(2, *RUN, str(folder), json.dumps(options | {"ddp_backend": "gloo"}))
    shown = "".join(one.communicate()[1] for one in both)
    assert [one.returncode for one in both] == [0, 0], shown[-3000:]
    return shown


def trained(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    return torch.load(folder / "trained.pt", weights_only=True)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {"reference": "precomputed"},
        pytest.param({"reference": "adapter_off", "gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param({"lora": False, "ddp_find_unused_parameters": True}, marks=pytest.mark.slow),
        pytest.param({"degree_weight": 2.0, "degree_levels": 2}, marks=pytest.mark.slow),
        pytest.param({"reference": "model", "ref_model_weights": [0.2, 0.8]}, marks=pytest.mark.slow),
    ],
    ids=["lora", "adapter_off", "full", "degrees", "references"],
)
def test_two_processes_equal_one_that_accumulates(options: dict[str, Any], tmp_path: Path) -> None:
    options = {"optim": "sgd", "learning_rate": 0.5, "max_steps": -1, "num_train_epochs": 1, "n_lists": 7} | options
    if "ref_model_weights" in options:
        options["ref_model_name_or_path"] = [str(tmp_path / "a"), str(tmp_path / "b")]
        for seed, name in enumerate(options["ref_model_name_or_path"]):
            tiny_models.build("llava", seed=seed)[0].save_pretrained(name)
    two_ranks(tmp_path / "two", **options)
    train(tmp_path / "one", gradient_accumulation_steps=2, **options)
    (ours, our_log), (theirs, their_log) = trained(tmp_path / "two"), trained(tmp_path / "one")
    assert_same(ours, theirs)
    assert any("degree_head" in name for name in ours) == ("degree_weight" in options)
    assert len(our_log) == 5  # the last step has one list
    for a, b in zip(our_log[:4], their_log[:4], strict=True):
        for name in ("loss", "rewards/accuracies", "lists/active", "lists/reward_mean", "logps/rejected"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


def test_a_list_that_fills_up_the_last_batch_counts_in_no_loss_after_a_resume(tmp_path: Path) -> None:
    """3 lists on 2 ranks, resumed in the middle of the second pass, whose last step has one list and a repeated one."""
    options = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "n_lists": 3, "reference": "none"}
    options |= {"objective": "simpo", "save_strategy": "steps", "save_steps": 3}
    two_ranks(tmp_path / "two", max_steps=3, **options)
    both = ranks(2, *RUN, str(tmp_path / "two"), json.dumps(options | {"max_steps": 4, "resume": True}))
    shown = "".join(one.communicate()[1] for one in both)
    assert [one.returncode for one in both] == [0, 0], shown[-3000:]
    train(tmp_path / "one", gradient_accumulation_steps=2, max_steps=4, **options)
    (ours, our_log), (theirs, their_log) = trained(tmp_path / "two"), trained(tmp_path / "one")
    assert our_log[3]["loss"] == pytest.approx(their_log[3]["loss"], rel=1e-4)
    assert our_log[3]["loss"] > 0
    assert_same(ours, theirs)


@pytest.mark.slow
def test_lists_that_fill_up_the_last_batch_count_once(tmp_path: Path) -> None:
    """5 lists in batches of 2 on 2 ranks: in the last step one has a list and a repeated one, the other only such."""
    options = {"optim": "sgd", "learning_rate": 0.5, "max_steps": -1, "num_train_epochs": 1, "n_lists": 5}
    two_ranks(tmp_path / "two", per_device_train_batch_size=2, **options)
    train(tmp_path / "one", gradient_accumulation_steps=4, **options)
    (ours, our_log), (theirs, their_log) = trained(tmp_path / "two"), trained(tmp_path / "one")
    assert_same(ours, theirs)
    for a, b in zip(our_log[:2], their_log[:2], strict=True):
        for name in ("loss", "rewards/accuracies", "lists/active", "lists/reward_mean", "logps/rejected"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize(
    "mixed",
    [{"n_lists": 3}, {"n_lists": 5, "without_image": [1, 2], "per_device_eval_batch_size": 2}],
    ids=["images", "mixed"],
)
def test_evaluation_on_two_processes_equals_one_also_if_they_do_not_divide_the_lists(
    mixed: dict[str, Any], tmp_path: Path
) -> None:
    options = {"reference": "none", "evaluate": True, **mixed}
    two_ranks(tmp_path / "two", **options)
    train(tmp_path / "one", **(options | {"per_device_eval_batch_size": 1}))
    (_, (ours,)), (_, (theirs,)) = trained(tmp_path / "two"), trained(tmp_path / "one")
    of_lists = [name for name in theirs if name == "eval_loss" or name.startswith(("eval_rewards", "eval_l"))]
    assert len(of_lists) == 12
    for name in of_lists:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """SIGKILL after step 5 while a checkpoint is being written; the last whole one is of step 4, with dropout on."""
    options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 2, "dropout": 0.2}
    train(tmp_path / "whole", **options)
    (tmp_path / "killed").mkdir()
    killed = start(*RUN, str(tmp_path / "killed"), json.dumps(options), "5")
    assert killed.wait(300) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "trained.pt").exists()
    reference = (tmp_path / "killed" / "reference" / "part-00000.jsonl").read_text()
    train(tmp_path / "killed", resume=True, **options)
    (ours, our_log), (theirs, their_log) = trained(tmp_path / "killed"), trained(tmp_path / "whole")
    assert_same(ours, theirs)
    assert [entry["step"] for entry in our_log] == [entry["step"] for entry in their_log]
    assert [e.get("loss") for e in our_log[:-1]] == pytest.approx([e.get("loss") for e in their_log[:-1]])
    assert (tmp_path / "killed" / "reference" / "part-00000.jsonl").read_text() == reference  # nothing computed again


@pytest.mark.parametrize(
    "options",
    [
        {"reference": "none"},
        {"reference": "precomputed"},
        {"reference": "none", "max_tokens_per_row": 999},
        pytest.param({"reference": "none", "evaluate": True}, marks=pytest.mark.slow),
        pytest.param({"reference": "precomputed", "fsdp": "full_shard"}, marks=pytest.mark.slow),
    ],
    ids=["step", "reference", "tokens", "evaluation", "sharded reference"],
)
def test_a_list_that_one_process_cannot_encode_ends_both_and_both_name_it(
    options: dict[str, Any], tmp_path: Path
) -> None:
    options = {"max_steps": 4, "n_lists": 8, "broken": 5, "save_strategy": "steps", "save_steps": 1} | options
    (tmp_path / "two").mkdir()
    both = ranks(2, *RUN, str(tmp_path / "two"), json.dumps(options | {"ddp_backend": "gloo"}))
    shown = [one.communicate(timeout=200)[1] for one in both]
    assert [one.returncode for one in both] == [1, 1]
    assert sum("FailedElsewhere: process " in text for text in shown) == 1
    for text in shown:
        assert "record 'r5': prompt: 2 places for a picture" in text
        assert "Connection" not in text
    assert not (tmp_path / "two" / "trained.pt").exists()
    assert all(not problems(one) for one in finished_checkpoints(tmp_path / "two"))
