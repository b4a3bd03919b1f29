"""`ListLossMixin` and `PaddedListCollator` in the real `transformers.Trainer`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import perpo
from perpo.integrations.trainer import ListLossMixin, PaddedListCollator
from perpo.training.trainer import PerPOTrainer

from .. import tiny_models, tiny_runs
from .padded_batches import gradients, plain_log_probs


class ListTrainer(ListLossMixin, Trainer):
    pass


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "optim": "sgd",
        "learning_rate": 0.5,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **defaults | options)


def rows() -> list[dict[str, Any]]:
    return [
        {"prompt": r.prompt, "image": r.image, "responses": r.responses, "rewards": r.rewards}
        for r in tiny_runs.records(5)
    ]


def trained(folder: Path, **options: Any) -> Trainer:
    model, processor = tiny_models.build("llava")
    model.eval()
    collator = PaddedListCollator(processor, model)
    trainer = ListTrainer(model, arguments(folder, **options), train_dataset=rows(), data_collator=collator)
    trainer.train()
    return trainer


def test_a_batch_is_what_perpo_train_feeds_with_every_answer_s_last_token() -> None:
    model, processor = tiny_models.build("llava")
    collator = PaddedListCollator(processor, model)
    batch = collator(rows()[:3])
    assert batch["cu_lists"] == [0, 3, 5, 8]
    tok = processor.tokenizer
    for ids, labels, response in zip(
        batch["input_ids"], batch["labels"], [a for row in rows()[:3] for a in row["responses"]], strict=True
    ):
        answer = labels[labels != -100]
        assert torch.equal(ids[labels != -100], answer)
        assert tok.decode(answer).strip() == response + "<|im_end|>"
    assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == tok.pad_token_id)
    batch["ref_log_probs"] = None
    known = {name: batch.pop(name) for name in ("labels", "rewards", "cu_lists", "ref_log_probs")}
    out = perpo.list_loss(model, batch, **known)
    trainer_batch = perpo.integrations.trainer.ListCollator(collator._lists.encoder)(tiny_runs.records(5)[:3])
    own = perpo.model.language_head.sequence_log_probs(model, trainer_batch)
    torch.testing.assert_close(out.log_probs, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [*tiny_models.FAMILIES, *tiny_models.MORE_FAMILIES])
def test_a_batch_of_any_family_has_the_log_probs_of_its_logits(family: str) -> None:
    model, processor = tiny_models.build(family)
    if family in tiny_models.EXPERT_FAMILIES:
        model.set_experts_implementation("eager")  # the only one that takes float64
    batch = PaddedListCollator(processor, model.double().eval())(rows()[:2])
    known = {name: batch.pop(name) for name in ("labels", "rewards", "cu_lists")}
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
    out = perpo.list_loss(model, inputs, **known)
    torch.testing.assert_close(out.log_probs, plain_log_probs(model, inputs, known["labels"]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_optimizer_step_is_the_mean_over_its_lists_however_they_are_accumulated(
    accumulate: int, tmp_path: Path
) -> None:
    """Five lists: batches of 2, 2 and 1 accumulated are one step whose gradient is that of all five at once."""
    options = {"gradient_accumulation_steps": 3} if accumulate == 3 else {"per_device_train_batch_size": 5}
    before, processor = tiny_models.build("llava")
    run = trained(tmp_path, **options)
    assert run.state.global_step == 1
    whole = PaddedListCollator(processor, before)(rows())
    known = {name: whole.pop(name) for name in ("labels", "rewards", "cu_lists")}
    out = perpo.list_loss(before, whole, **known)
    out.loss.backward()
    log = run.state.log_history[0]
    assert log["loss"] == pytest.approx(out.loss.item(), rel=1e-4)
    if accumulate == 1:
        assert log["rewards/margins"] == pytest.approx(out.metrics["rewards/margins"].item(), abs=1e-4)
    now = dict(run.model.named_parameters())
    started = dict(before.named_parameters())
    for name, gradient in gradients(before).items():
        torch.testing.assert_close(now[name], started[name] - 0.5 * gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_it_trains_as_perpo_s_own_trainer(tmp_path: Path) -> None:
    """With references from `perpo.sequence_log_probs`, and evaluation by the same loss."""
    model, processor = tiny_models.build("llava")
    collator = PaddedListCollator(processor, model)
    data = rows()
    for row in data:
        batch = collator([row])
        labels = batch.pop("labels")
        inputs = {name: x for name, x in batch.items() if name not in ("rewards", "cu_lists")}
        with torch.no_grad():
            row["ref_log_probs"] = perpo.sequence_log_probs(model.eval(), inputs, labels).tolist()
    settings: dict[str, Any] = {"num_train_epochs": 3, "per_device_train_batch_size": 5, "eval_strategy": "epoch"}
    args = arguments(tmp_path / "a", **settings)
    ours = ListTrainer(copy.deepcopy(model), args, train_dataset=data, eval_dataset=data, data_collator=collator)
    ours.train()
    records, _ = perpo.read_records(data)
    config = tiny_runs.config(
        tmp_path / "b", **settings, optim="sgd", learning_rate=0.5, max_grad_norm=0.0, lr_scheduler_type="constant",
        reference="data", prefix_sharing="off", max_steps=-1, per_device_eval_batch_size=8,
    )  # fmt: skip
    own = PerPOTrainer(copy.deepcopy(model), config, records, processor, eval_dataset=records)
    own.train()
    weights = dict(own.model.named_parameters())
    for name, p in ours.model.named_parameters():
        torch.testing.assert_close(p, weights[name], rtol=1e-4, atol=1e-5, msg=name)
    logged = ("loss", "rewards/margins", "eval_loss")
    logs = [[line[name] for line in run.state.log_history for name in logged if name in line] for run in (ours, own)]
    assert len(logs[0]) == 9
    assert logs[0] == pytest.approx(logs[1], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: the loss is that of lists"),
    ],
)
def test_settings_that_would_train_on_something_else_are_refused(
    options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model, processor = tiny_models.build("qwen2")
    with pytest.raises(ValueError, match=said):
        ListTrainer(model, arguments(tmp_path, **options), data_collator=PaddedListCollator(processor, model))


def test_a_row_without_rewards_is_refused_by_name() -> None:
    _, processor = tiny_models.build("qwen2")
    with pytest.raises(ValueError, match=r"a row has no rewards, but prompt, responses; .*remove_unused"):
        PaddedListCollator(processor)([{"prompt": "?", "responses": ["a", "b"]}])
