"""`full_determinism` reaches flash attention's backward pass on a GPU, and nothing in a step refuses it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from .. import tiny_runs


@pytest.fixture
def restored() -> Iterator[None]:
    environment = dict(os.environ)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("lora", [True, False], ids=["frozen head", "trained head"])
def test_the_switch_is_on_while_a_step_runs(lora: bool, tmp_path: Path) -> None:
    seen = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **options: Any) -> None:  # behind the backward pass
            seen.append(torch.are_deterministic_algorithms_enabled())

    runner = tiny_runs.trainer("llava", tmp_path, lora=lora, full_determinism=True, gradient_checkpointing=True)
    runner.add_callback(Watch())
    runner.train()
    assert seen == [True]
