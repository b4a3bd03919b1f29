"""What a trainer compares before it trusts packed rows: answers long enough to show something, on every model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from perpo.data.record import ListRecord
from perpo.encoding.positions import PromptPositions
from perpo.model.sharing import SharingNotExact
from perpo.training.sharing_check import lists_to_compare
from perpo.training.trainer import PerPOTrainer
from tests.perpo import tiny_models, tiny_runs


def record(name: str, *responses: str, image: Any = "x.png") -> ListRecord:
    rewards = tuple(float(i) for i in range(len(responses)))
    return ListRecord(name, image, "Where?", "", "", responses, rewards)


def test_the_longest_answers_are_compared_in_lists_of_one_kind() -> None:
    samples = [
        record("short", "y", "n", "y"),
        record("text", "a long answer", "another one", image=None),
        record("long", "no", "somewhere on the left", "y", "on the right"),
        record("one long", "n", "a very long answer that stands alone"),
        record("middle", "left", "right", "n"),
    ]
    few = lists_to_compare(samples)
    assert [records[0].id for records in few] == ["long", "middle"]
    assert few[0][0].responses == ("somewhere on the left", "on the right")
    assert few[0][0].rewards == (1.0, 3.0)
    assert [records[0].id for records in lists_to_compare(samples[1:2])] == ["text"]


def wrong_positions(monkeypatch: Any) -> None:
    monkeypatch.setattr(
        PromptPositions,
        "positions",
        lambda self, prompt, n: (torch.arange(prompt["input_ids"].shape[1]), torch.arange(n)),
    )


def test_a_dataset_given_to_evaluate_alone_is_checked(tmp_path: Path, monkeypatch: Any) -> None:
    model, processor = tiny_models.build("llava")
    run = PerPOTrainer(model, tiny_runs.config(tmp_path, reference="none", objective="simpo"), None, processor)
    wrong_positions(monkeypatch)
    with pytest.raises(SharingNotExact):
        run.evaluate(tiny_runs.records())


def test_the_reference_model_is_checked_too(tmp_path: Path, monkeypatch: Any) -> None:
    model, processor = tiny_models.build("llava")
    other, _ = tiny_models.build("llava", seed=1)
    config = tiny_runs.config(tmp_path, reference="model")
    run = PerPOTrainer(model, config, tiny_runs.records(), processor, ref_model=other)
    layer = other.model.language_model.layers[0].self_attn
    plain = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *args, **kwargs: plain(*args, **{**kwargs, "prefix_layout": None}))
    with pytest.raises(SharingNotExact):
        run.train()
