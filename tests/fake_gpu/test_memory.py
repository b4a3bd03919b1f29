"""What `perpo plan` says of a step of Qwen2.5-VL-7B, beside what the step holds, storage by storage."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from perpo.training.cost import Planner, Training
from tests.fake_gpu.memory import GIB, LISTS, Counted, count_step, qwen

CASES = [(shared, checkpointing) for checkpointing in (False, True) for shared in (True, False)]
PAGE = Path(__file__).parents[2] / "docs" / "shared_prefix.md"
HEADER = "| GiB | activations: plan | counted | in all: plan | counted | counted, no accumulation |"


def planned_and_counted(n_layers: int, shared: bool, checkpointing: bool) -> tuple[dict[str, float], Counted]:
    training = Training(gradient_checkpointing=checkpointing)
    lists = dataclasses.replace(LISTS, shared=shared)
    return Planner(qwen(n_layers), training).memory(lists), count_step(qwen(n_layers), training, lists)


def assert_agree(plan: dict[str, float], counted: Counted) -> None:
    assert plan["weights"] + plan["optimizer"] == pytest.approx(counted.fixed, rel=0.01)
    assert plan["activations"] == pytest.approx(counted.kept, rel=0.05)
    total = sum(plan.values())
    assert total == pytest.approx(counted.further, rel=0.05)
    assert total - plan["gradients"] <= counted.first * 1.05  # where there are none yet, at most those are missing
    assert counted.first <= counted.further
    assert counted.optimizer <= total


@pytest.mark.parametrize(("shared", "checkpointing"), CASES)
def test_two_layers(shared: bool, checkpointing: bool) -> None:
    assert_agree(*planned_and_counted(2, shared, checkpointing))


@pytest.mark.slow
def test_the_table_in_the_docs_is_of_all_28_layers(write_docs: Any) -> None:
    rows = ["|---|---|---|---|---|---|"]
    for shared, checkpointing in CASES:
        plan, counted = planned_and_counted(28, shared, checkpointing)
        assert_agree(plan, counted)
        values = (plan["activations"], counted.kept, sum(plan.values()), counted.further, counted.first)
        name = f"{'shared' if shared else 'separate'}{', checkpointing' * checkpointing}"
        rows.append(f"| {name} | {' | '.join(f'{value / GIB:.1f}' for value in values)} |")
    write_docs(PAGE, HEADER, rows)
