"""The trainer's loss and gradients are those of the definition; what is frozen stays; what is learned shows."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from perpo.data.record import ListRecord
from perpo.encoding.batch import ListBatch
from perpo.encoding.collator import ListCollator
from perpo.model.trainable import freeze
from perpo.training import lists
from perpo.training.trainer import PerPOTrainer
from perpo_kernels import perpo_loss

from .. import tiny_models, tiny_runs


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def full_log_probs(model: Any, batch: ListBatch) -> Tensor:  # [S] fp64
    """All logits, gathered log-probs, summed over each response."""
    logits = model(**batch.inputs).logits.flatten(0, 1)[batch.response_rows].double()
    tokens = torch.log_softmax(logits, -1).gather(1, batch.labels[:, None])[:, 0]
    return torch.stack([part.sum() for part in tokens.split(batch.cu_seqlens.diff().tolist())])


def full_logits_loss(model: Any, batch: ListBatch, ref: Tensor | None, beta: float, gamma: float) -> Tensor:
    """The definition in perpo_kernels, on all logits; mean over lists."""
    log_probs, rewards = full_log_probs(model, batch), batch.rewards.double()
    options = {"cu_lists": batch.cu_lists, "beta": beta, "gamma": gamma, "backend": "reference"}
    return perpo_loss(log_probs, rewards, ref, **options)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("where", ["lora", "full with head", "frozen head"])
def test_loss_and_gradients_equal_the_definition_on_full_logits(family: str, where: str, tmp_path: Path) -> None:
    options = {"reference": "none", "prefix_sharing": "off", "beta": 0.3, "gamma": 0.7}
    runner = tiny_runs.trainer(family, tmp_path, lora=where == "lora", **options)
    if where == "frozen head":
        freeze(runner.model)
    batch = runner.data_collator(runner.train_dataset)
    batch.inputs["pixel_values"] = batch.inputs["pixel_values"].double()
    runner.model.double().eval()
    plain = copy.deepcopy(runner.model)
    loss = runner.compute_loss(runner.model, batch)
    loss.backward()
    expected = full_logits_loss(plain, batch, None, 0.3, 0.7)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    compared = 0
    for (name, ours), theirs in zip(runner.model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None, name
            continue
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8, msg=name)
        compared += 1
    assert compared > 5


@pytest.mark.parametrize("mode", ["precomputed", "adapter_off", "model", "data"])
def test_every_reference_gives_the_same_loss(mode: str, tmp_path: Path) -> None:
    """They are one and the same model here: the tiny one before its adapters."""
    lists = tiny_runs.records()
    once = tiny_runs.trainer("llava", tmp_path / "once", data=lists)
    model, processor = tiny_models.build("llava")
    separate = ListCollator(once.encoder)(lists)
    options: dict[str, Any] = {"reference": mode}
    if mode == "data":
        lists = once.train_dataset
    if mode == "model":
        base, _ = tiny_models.build("llava")
        torch.manual_seed(1)
        lora = tiny_runs.language_lora(model, r=4, alpha=8)
        lora.init_lora_weights = False
        runner = PerPOTrainer(
            model, tiny_runs.config(tmp_path / mode, **options), lists, processor, peft_config=lora, ref_model=base
        )
    else:
        runner = tiny_runs.trainer("llava", tmp_path / mode, data=lists, **options)
    batch = runner.data_collator(runner.train_dataset)
    loss = runner.compute_loss(runner.model.eval(), batch)
    base, _ = tiny_models.build("llava")
    with torch.no_grad():
        ref = full_log_probs(base.eval(), separate)
    expected = full_logits_loss(runner.model.eval(), separate, ref, 0.1, 0.5)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for n, p in runner.model.named_parameters() if "lora_" in n)
    assert batch.n_lists == separate.n_lists == len(lists)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_trains_its_adapters_and_nothing_else(family: str, tmp_path: Path) -> None:
    runner = tiny_runs.trainer(family, tmp_path, max_steps=2)
    before = {name: p.detach().clone() for name, p in runner.model.named_parameters()}
    runner.train()
    logs = runner.state.log_history[0]
    assert 0 < logs["loss"] < 10
    changed = {name for name, p in runner.model.named_parameters() if not torch.equal(p, before[name])}
    adapters = {name for name in before if "lora_" in name}
    assert changed == adapters
    assert all("language_model" in name or "text_model" in name for name in adapters)
    assert not any("lm_head" in name for name in adapters)
    frozen = [p for name, p in runner.model.named_parameters() if name not in adapters]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_full_training_leaves_vision_tower_projector_and_head_alone(tmp_path: Path) -> None:
    runner = tiny_runs.trainer("llava", tmp_path, lora=False, max_steps=2)
    freeze(runner.model)
    before = {name: p.detach().clone() for name, p in runner.model.named_parameters()}
    runner.train()
    changed = {name for name, p in runner.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(name.startswith("model.language_model.") for name in changed)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_gradient_checkpointing_changes_nothing(family: str, reentrant: bool, tmp_path: Path) -> None:
    plain = tiny_runs.trainer(family, tmp_path / "plain")
    plain.train()
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    checkpointed = tiny_runs.trainer(family, tmp_path / "checkpointed", **options)
    checkpointed.train()
    expected = tiny_runs.trained(plain.model)
    for name, value in tiny_runs.trained(checkpointed.model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    """Also with a last step of fewer lists: 5 lists in steps of 2."""
    options = {"max_steps": -1, "num_train_epochs": 1, "optim": "sgd", "learning_rate": 1.0}
    large = tiny_runs.trainer(
        "llava", tmp_path / "a", data=tiny_runs.records(5), per_device_train_batch_size=2, **options
    )
    large.train()
    small = tiny_runs.trainer(
        "llava", tmp_path / "b", data=tiny_runs.records(5), gradient_accumulation_steps=2, **options
    )
    small.train()
    assert large.state.global_step == small.state.global_step == 3
    expected = tiny_runs.trained(large.model)
    for name, value in tiny_runs.trained(small.model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    for a, b in zip(large.state.log_history[:3], small.state.log_history[:3], strict=True):
        for name in ("loss", "rewards/margins", "lists/kendall_tau", "lists/active", "logps/chosen"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5)


def test_operations_are_counted_as_six_a_token_and_parameter(tmp_path: Path) -> None:
    """What a log's total_flos is, over a pass of batches of one list, in which nothing is padded."""
    runner = tiny_runs.trainer("llava", tmp_path, max_steps=-1, num_train_epochs=1, reference="none")
    tokens = sum(runner.data_collator([record]).inputs["input_ids"].numel() for record in runner.train_dataset)
    parameters = sum(p.numel() for p in runner.model.parameters())
    runner.train()
    assert runner.state.total_flos == 6 * tokens * parameters


def test_a_handful_of_lists_is_learned(tmp_path: Path) -> None:
    runner = tiny_runs.trainer("llava", tmp_path, max_steps=40, learning_rate=2e-2, per_device_train_batch_size=4)
    runner.train()
    first, last = runner.state.log_history[0], runner.state.log_history[-2]
    assert last["rewards/accuracies"] == 1.0
    assert last["lists/kendall_tau"] == pytest.approx(1.0)
    assert last["rewards/margins"] > max(first["rewards/margins"], 0.5)
    assert last["loss"] < first["loss"]
    assert last["lists/active"] == 0.75
    assert last["tokens_per_second"] > 0
    assert last["peak_memory_gib"] > 0


def test_scores_are_zero_before_training_under_fresh_adapters(tmp_path: Path) -> None:
    model, processor = tiny_models.build("internvl")
    lora = tiny_runs.language_lora(model, r=4)
    settings = tiny_runs.config(tmp_path, per_device_train_batch_size=4)
    runner = PerPOTrainer(model, settings, tiny_runs.records(), processor, peft_config=lora)
    runner.train()
    logs = runner.state.log_history[0]
    assert logs["loss"] == pytest.approx(0.6931 * 0.75, abs=1e-3)  # three lists of four have a preference
    assert logs["rewards/chosen"] == logs["rewards/rejected"] == 0


def test_evaluation_reports_the_same_metrics(tmp_path: Path) -> None:
    runner = tiny_runs.trainer("llava", tmp_path)
    metrics = runner.evaluate(runner.train_dataset)
    batch = runner.data_collator(runner.train_dataset)
    assert metrics["eval_loss"] == pytest.approx(runner.compute_loss(runner.model.eval(), batch).item(), rel=1e-4)
    assert metrics["eval_lists/active"] == 0.75


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_bf16_trains(family: str, tmp_path: Path) -> None:
    exact = tiny_runs.trainer(family, tmp_path / "fp32")
    exact.train()
    runner = tiny_runs.trainer(family, tmp_path / "bf16", bf16=True)
    runner.train()
    expected = exact.state.log_history[0]["loss"]
    assert runner.state.log_history[0]["loss"] == pytest.approx(expected, rel=0.05)


def test_text_only_lists_train(tmp_path: Path) -> None:
    lists = [dataclasses.replace(record, image=None) for record in tiny_runs.records()]
    runner = tiny_runs.trainer("qwen2_5_vl", tmp_path, data=lists, per_device_train_batch_size=2)
    runner.train()
    assert 0 < runner.state.log_history[0]["loss"] < 10


def test_the_head_sees_response_rows_only_and_logits_never_leave_it(tmp_path: Path) -> None:
    runner = tiny_runs.trainer("llava", tmp_path, reference="none")
    batch = runner.data_collator(runner.train_dataset)
    seen: list[Any] = []
    head = runner.model.get_base_model().lm_head
    head.register_forward_hook(lambda module, args, out: seen.append((args[0].shape, out)))
    runner.compute_loss(runner.model, batch).backward()
    shape, output = seen[-1]  # before it, once, the heads of the check of sharing
    assert shape == (batch.labels.numel(), tiny_models.HIDDEN)
    assert all(x.numel() <= 4 * len(batch.rewards) for x in output if isinstance(x, Tensor))


def test_a_projector_is_trained_beside_adapters(tmp_path: Path) -> None:
    model, processor = tiny_models.build("llava")
    lora = tiny_runs.language_lora(model, r=4, train_projector=True)
    settings = tiny_runs.config(tmp_path, learning_rate=1e-2, reference="adapter_off")
    runner = PerPOTrainer(model, settings, tiny_runs.records(3)[2:], processor, peft_config=lora)
    before = {name: p.detach().clone() for name, p in runner.model.named_parameters()}
    runner.train()
    changed = {name for name, p in runner.model.named_parameters() if not torch.equal(p, before[name])}
    assert any("multi_modal_projector.modules_to_save" in name for name in changed)
    assert all("lora_" in name or "multi_modal_projector.modules_to_save" in name for name in changed)


def test_candidates_are_thinned_to_best_worst_and_between(tmp_path: Path) -> None:
    record = ListRecord("a", None, "?", responses=tuple("abcde"), rewards=(0.1, 0.9, 0.5, 0.2, 0.7))
    runner = tiny_runs.trainer("llava", tmp_path, data=[record], max_candidates=3, reference="none")
    assert runner.train_dataset[0].responses == ("a", "b", "c")
    assert runner.train_dataset[0].rewards == (0.1, 0.9, 0.5)


def test_a_response_that_was_cut_is_trained_without_an_end_of_turn(tmp_path: Path) -> None:
    answers = {"responses": ("abc", "abcd", "ab"), "rewards": (0.1, 0.5, 0.2), "complete": (True, False, True)}
    record = ListRecord("a", None, "?", **answers)
    runner = tiny_runs.trainer("llava", tmp_path, data=[record], max_candidates=2, reference="none")
    batch, end = runner.data_collator(runner.train_dataset), runner.encoder.turn.end_id
    first, second = batch.labels.split(batch.cu_seqlens.diff().tolist())
    assert first[-1] == end
    assert end not in second
    assert len(second) == len(first)  # one letter more


def test_lists_of_which_none_has_an_image_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the commands do; the trainer may be given anything."""
    said: list[str] = []
    monkeypatch.setattr(lists.logger, "warning", said.append)
    blind = [dataclasses.replace(one, image=None) for one in tiny_runs.records()]
    rows = [{"prompt": one.prompt, "responses": one.responses, "rewards": one.rewards, "imgae": "a"} for one in blind]
    for data in (blind, rows, [*blind, *tiny_runs.records(5)[4:]]):
        tiny_runs.trainer("llava", tmp_path, data=data, reference="none")
    assert said == [
        "train_dataset: none of 4 records has an image, and the model takes images: its field is 'image'",
        "list: none of 4 records has an image, and the model takes images: the column 'imgae' looks like one: name it "
        "'image'",
    ]


def test_an_image_that_is_not_there_is_named_before_training(tmp_path: Path) -> None:
    rows = [{"prompt": "?", "image": "gone.png", "responses": ["a", "b"], "rewards": [0.0, 1.0]}]
    with pytest.raises(ValueError, match=r"row 1: image: image .*gone.png' does not exist"):
        tiny_runs.trainer("llava", tmp_path, data=rows, reference="none", image_root=str(tmp_path))


def test_lists_of_which_none_has_a_preference_are_an_error(tmp_path: Path) -> None:
    lists = [dataclasses.replace(record, rewards=(0.5,) * record.k) for record in tiny_runs.records()]
    with pytest.raises(ValueError, match="train_dataset: in none of 4 lists has one response a higher reward"):
        tiny_runs.trainer("llava", tmp_path, data=lists)


def test_a_list_of_one_and_a_list_without_preference_give_zero_loss_with_a_graph(tmp_path: Path) -> None:
    alone = ListRecord("a", None, "?", responses=("x",), rewards=(1.0,))
    equal = ListRecord("b", None, "?", responses=("x", "y"), rewards=(1.0, 1.0))
    active = ListRecord("c", None, "?", responses=("x", "y"), rewards=(1.0, 0.0))
    runner = tiny_runs.trainer("llava", tmp_path, data=[alone, equal, active], min_candidates=1, reference="none")
    loss = runner.compute_loss(runner.model, runner.data_collator(runner.train_dataset[:2]))
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in runner.model.parameters() if p.requires_grad)


def test_a_model_of_which_nothing_is_trained_is_refused(tmp_path: Path) -> None:
    model, processor = tiny_models.build("llava")
    with pytest.raises(ValueError, match="none of its parameters requires a gradient"):
        PerPOTrainer(model.requires_grad_(False), tiny_runs.config(tmp_path), tiny_runs.records(), processor)


def test_adapters_that_transformers_has_put_on_a_model_are_refused(tmp_path: Path) -> None:
    """They are no PeftModel: a new adapter would be saved alone, and the old one lost."""
    model, processor = tiny_models.build("llava")
    try:
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    except ValueError as error:  # a transformers that wants a peft which is not out yet
        pytest.skip(str(error))
    with pytest.raises(ValueError, match=r"load it with perpo\.load_model"):
        PerPOTrainer(model, tiny_runs.config(tmp_path), tiny_runs.records(), processor)


def test_cut_responses_are_counted_and_equal_ones_form_no_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of them begin alike: cut, they are one response with one reward, their mean."""
    texts = ("there it is", "there it was", "there!", "no")
    record = ListRecord("r", tiny_models.picture(), "Where?", "", "", texts, (0.9, 0.1, 0.2, 0.5))
    heard: list[str] = []
    monkeypatch.setattr("perpo.training.trainer.logger.warning_once", heard.append)
    runner = tiny_runs.trainer("llava", tmp_path, data=[record], reference="none", max_response_length=5)
    batch = runner.data_collator(runner.train_dataset)
    assert batch.n_cut == 3
    assert batch.rewards.tolist() == pytest.approx([0.4, 0.4, 0.4, 0.5])
    assert batch.labels[:5].tolist() == batch.labels[5:10].tolist()
    runner.train()
    log = runner.state.log_history[0]
    assert (log["responses/cut"], log["lists/active"]) == (0.75, 1.0)
    assert heard[0].startswith("3 of 4 responses of a batch have more than max_response_length=5 tokens")
    alike = dataclasses.replace(record, responses=texts[:3], rewards=record.rewards[:3])
    runner = tiny_runs.trainer("llava", tmp_path / "b", data=[alike], reference="none", max_response_length=5)
    runner.train()
    assert (runner.state.log_history[0]["lists/active"], runner.state.log_history[0]["loss"]) == (0.0, 0.0)
    whole = tiny_runs.trainer("llava", tmp_path / "c", data=[alike], reference="none")
    assert whole.data_collator(whole.train_dataset).rewards.tolist() == pytest.approx([0.9, 0.1, 0.2])
