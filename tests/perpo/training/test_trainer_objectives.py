"""Every objective trains: the loss is that of its formula on full logits, and the metrics are of its scores."""

import copy
import dataclasses
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import kendalltau
from torch import Tensor

from perpo.data.record import ListRecord
from perpo.encoding.batch import ListBatch
from perpo.encoding.collator import ListCollator
from perpo.encoding.corruption import image_pairs
from perpo.training.lists import thin_out
from perpo.training.reference import with_reference
from perpo_kernels import objectives
from tests.kernels.family import DEFINITIONS, OneList

from .. import tiny_runs
from .test_trainer import full_log_probs


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def records() -> list[ListRecord]:
    """With probabilities of a wrong preference, which one objective takes and the others must not."""
    flips = (0.05, 0.3, 0.2)
    return [dataclasses.replace(record, flip_probs=flips[: record.k]) for record in tiny_runs.records(3, k=3)]


def settings(name: str) -> dict[str, Any]:
    """Other numbers than the defaults."""
    numbers = dict(DEFINITIONS[name][1])
    own = {key: numbers.pop(key) for key in ("beta", "gamma") if key in numbers}
    if name == "gspo":  # of the adapters that training begins with all ratios would be 1
        own["reference"] = "precomputed"
    return {"objective": name, **own, "objective_options": numbers}


def lists_of(name: str, batch: ListBatch, log_probs: Tensor) -> list[OneList]:
    """As the formulas take them; pairs and probabilities from the records' rewards, not from the batch."""
    target = objectives.PRESETS[name]()
    ref = batch.ref_log_probs.double() if target.reference else torch.zeros_like(log_probs)
    lengths, made = batch.cu_seqlens.diff().double(), []
    for (start, end), record in zip(pairwise(batch.cu_lists.tolist()), records(), strict=True):
        k, rewards = end - start, torch.tensor(record.rewards).double()
        given = torch.zeros(k, k).double()
        if name == "mdpo":
            best, worst = int(rewards.argmax()), int(rewards.argmin())
            if best != worst:
                given[best, worst] = given[best, k - 1] = 1
            rewards = torch.cat([rewards, rewards.min()[None]])
        flips = torch.tensor([*record.flip_probs, 0.0][:k]).double()
        made.append(OneList(log_probs[start:end], ref[start:end], rewards, lengths[start:end], flips, given))
    return made


@pytest.mark.parametrize("name", objectives.PRESETS)
def test_the_loss_is_that_of_the_formula_on_full_logits(name: str, tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 3, "learning_rate": 1e-2, **settings(name)}
    runner = tiny_runs.trainer("llava", tmp_path, data=records(), **options)
    before = tiny_runs.trained(runner.model)
    batch = ListCollator(runner.encoder)(runner.train_dataset)  # a row for every candidate
    assert (batch.ref_log_probs is not None) == (name != "simpo")
    plain = copy.deepcopy(runner.model).double().eval()
    double = dataclasses.replace(batch, inputs={**batch.inputs, "pixel_values": batch.inputs["pixel_values"].double()})
    with torch.no_grad():
        lists = lists_of(name, batch, full_log_probs(plain, double))
    fn, numbers = DEFINITIONS[name]
    losses = [fn(one, **numbers) if one.rewards.unique().numel() > 1 else 0.0 for one in lists]
    expected = float(sum(losses)) / len(losses)
    runner.train()
    log = runner.state.log_history[0]
    assert math.isfinite(log["loss"])
    assert log["loss"] == pytest.approx(expected, rel=2e-4, abs=2e-5)
    assert any(not torch.equal(p, before[key]) for key, p in tiny_runs.trained(runner.model).items())

    # metrics, of the record's own answers
    beta, active, taus = numbers["beta"], 0, 0.0
    chosen = rejected = right = won = 0.0
    for one, record in zip(lists, records(), strict=True):
        scores = one.ratio / one.lengths if name in ("ipo", "simpo", "gspo") else one.ratio
        scores, rewards = beta * scores[: record.k], one.rewards[: record.k]
        if len(set(record.rewards)) == 1:
            continue
        active += 1
        chosen, rejected = chosen + scores[rewards.argmax()].item(), rejected + scores[rewards.argmin()].item()
        won += bool(scores[rewards.argmax()] > scores[rewards.argmin()])
        pairs = [(i, j) for i in range(record.k) for j in range(record.k) if rewards[i] > rewards[j]]
        right += sum(bool(scores[i] > scores[j]) for i, j in pairs) / len(pairs)
        taus += kendalltau(scores.numpy(), rewards.numpy()).statistic
    shown = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
    for key, value in {
        **shown,
        "rewards/accuracies": won,
        "lists/pair_accuracy": right,
        "lists/kendall_tau": taus,
    }.items():
        assert log[key] == pytest.approx(value / active, rel=1e-3, abs=1e-4), key


def test_an_objective_of_ones_own_trains(tmp_path: Path) -> None:
    own = objectives.Objective(0.3, pairs="best_vs_rest", link="hinge", weight="uniform")
    runner = tiny_runs.trainer("llava", tmp_path, data=records(), objective=own, save_strategy="steps", save_steps=1)
    runner.train()
    assert runner.state.log_history[0]["loss"] > 0
    saved = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert saved.list_objective == own


@pytest.mark.parametrize("reference", ["precomputed", "adapter_off", "model", "none"])
def test_mdpo_has_a_reference_for_answers_under_the_corrupted_image(reference: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"reference": reference, "objective": "mdpo"}
    if reference == "model":
        model, processor = tiny_runs.tiny_models.build("llava")
        model.save_pretrained(tmp_path / "model")
        processor.save_pretrained(tmp_path / "model")
        options["ref_model_name_or_path"] = str(tmp_path / "model")
    runner = tiny_runs.trainer("llava", tmp_path, data=records(), **options)
    batch = with_reference(runner.data_collator(runner.train_dataset), reference, runner.model, runner.ref_model)
    separate = ListCollator(runner.encoder)(runner.train_dataset)
    assert batch.added.tolist() == [False] * 3 + [True] + [False] * 2 + [True] + [False] * 3 + [True]
    if reference == "none":
        assert batch.ref_log_probs is None
        return
    base, _ = tiny_runs.tiny_models.build("llava")
    with torch.no_grad():
        expected = full_log_probs(base.eval(), separate)
    torch.testing.assert_close(batch.ref_log_probs.double(), expected, rtol=1e-4, atol=1e-4)


def test_only_the_corrupted_images_are_new_to_a_cache_of_another_objective(tmp_path: Path) -> None:
    tiny_runs.trainer("llava", tmp_path, data=records(), objective="dpo")
    part = tmp_path / "reference" / "part-00000.jsonl"
    counts = [len(part.read_text().splitlines())]
    for corruption in ("crop", "crop", "noise"):
        tiny_runs.trainer("llava", tmp_path, data=records(), objective="mdpo", image_corruption=corruption)
        counts.append(len(part.read_text().splitlines()))
    assert counts == [3, 6, 6, 9]


def test_mdpo_evaluates_on_corrupted_images_too(tmp_path: Path) -> None:
    runner = tiny_runs.trainer("llava", tmp_path, data=records(), objective="mdpo", per_device_train_batch_size=3)
    shown = runner.evaluate(runner.train_dataset)
    with torch.no_grad():
        loss = runner.compute_loss(runner.model.eval(), runner.data_collator(runner.train_dataset))
    assert shown["eval_loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_lists_without_an_image_are_refused_under_mdpo(tmp_path: Path) -> None:
    lists = [dataclasses.replace(record, image=None) for record in records()]
    with pytest.raises(ValueError, match=r"train_dataset: record 'r0' has no image, .* or use objective='dpo'"):
        tiny_runs.trainer("qwen2_5_vl", tmp_path, data=lists, objective="mdpo")


def test_rosepo_without_flip_probs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_dataset record 'r0' has no flip_probs, which objective='rosepo' takes"):
        tiny_runs.trainer("llava", tmp_path, objective="rosepo")


def test_thinning_a_list_keeps_the_probabilities_of_who_stays() -> None:
    values = (0.1, 0.9, 0.5, 0.2, 0.7)
    record = ListRecord("a", None, "?", responses=tuple("abcde"), rewards=values, flip_probs=values)
    thinned = thin_out(record, 3)
    assert thinned.flip_probs == thinned.rewards == (0.1, 0.9, 0.5)


def test_lists_without_reference_log_probs_are_not_evaluated_against_nothing(tmp_path: Path) -> None:
    runner = tiny_runs.trainer("llava", tmp_path)
    with pytest.raises(ValueError, match="reference='precomputed': these lists have no reference log-probs"):
        runner.evaluate(tiny_runs.records())


def test_tied_candidates_share_the_pairs_of_mdpo() -> None:
    assert image_pairs((0.5, 0.9, 0.1, 0.9)) == [
        [0, 0, 0, 0, 0],
        [0, 0, 0.5, 0, 1],
        [0, 0, 0, 0, 0],
        [0, 0, 0.5, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    assert image_pairs((0.5, 0.5)) == [[0.0] * 3] * 3
