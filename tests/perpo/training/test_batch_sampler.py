"""Lists that share a row: within the budget, each exactly once, and training as if each had a row of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perpo.encoding.collator import ListCollator
from perpo.training.batch_sampler import ListBatchSampler, fill_batches
from tests.perpo import tiny_runs
from tests.perpo.run_training import train
from tests.perpo.training.test_trainer_processes import assert_same, trained, two_ranks

LISTS = st.lists(st.tuples(st.booleans(), st.integers(1, 50)), min_size=1, max_size=60)


@given(lists=LISTS, budget=st.integers(1, 120), most=st.integers(1, 5) | st.just(float("inf")), seed=st.integers(0, 9))
def test_no_row_is_over_the_budget_and_each_list_is_in_one(lists: Any, budget: int, most: float, seed: int) -> None:
    kinds, tokens = zip(*lists, strict=True)
    rows = fill_batches(kinds, tokens, budget, most, seed)
    assert sorted(i for row in rows for i in row) == list(range(len(lists)))
    for row in rows:
        assert len({kinds[i] for i in row}) == 1
        assert len(row) <= most
        assert len(row) == 1 or sum(tokens[i] for i in row) <= budget
    assert rows == fill_batches(kinds, tokens, budget, most, seed)


def test_rows_are_well_filled() -> None:
    tokens = torch.randint(100, 900, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = fill_batches([True] * len(tokens), tokens, 2000, float("inf"), seed=0)
    assert sum(tokens) / (2000 * len(rows)) > 0.9


@given(n_rows=st.integers(1, 12), n_ranks=st.integers(1, 4), seed=st.integers(0, 9))
def test_all_ranks_take_equally_many_rows_and_each_row_once(n_rows: int, n_ranks: int, seed: int) -> None:
    rows = [[i] for i in range(n_rows)]
    samplers = [ListBatchSampler(rows, n_ranks, rank, seed) for rank in range(n_ranks)]
    orders = []
    for epoch in (0, 1, 0):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        taken = [[i for (i,) in sampler] for sampler in samplers]
        assert {len(of_rank) for of_rank in taken} == {len(sampler) for sampler in samplers}
        kept = [
            i
            for of_rank, s in zip(taken, samplers, strict=True)
            for i in of_rank[: -1 if s.ends_with_filling else None]
        ]
        assert sorted(kept) == list(range(n_rows))
        orders.append(taken)
    assert orders[0] == orders[2]
    assert n_rows < 6 or orders[0] != orders[1]


def runner(folder: Path, records: Any, **options: Any) -> Any:
    settings = {"optim": "sgd", "learning_rate": 0.5, "max_steps": -1, "num_train_epochs": 1, "reference": "none"}
    return tiny_runs.trainer("llava", folder, data=records, **(settings | {"objective": "simpo"} | options))


def seen_batches(run: Any, monkeypatch: Any) -> list[Any]:
    """What the trainer collates, in order."""
    fed: list[Any] = []
    plain = ListCollator.__call__
    monkeypatch.setattr(ListCollator, "__call__", lambda self, samples: fed.append(plain(self, samples)) or fed[-1])
    run._sharing_unchecked = False  # the check collates lists too
    run.train()
    return fed


@pytest.mark.parametrize("sharing", ["on", "off"])
def test_a_step_over_packed_lists_is_that_over_lists_one_by_one(sharing: str, tmp_path: Path, monkeypatch: Any) -> None:
    records = tiny_runs.records(6)
    records[2] = dataclasses.replace(records[2], image=None)
    options: dict[str, Any] = {"gradient_accumulation_steps": 6, "prefix_sharing": sharing}
    alone = runner(tmp_path / "alone", records, **options)
    lengths = [alone.data_collator([record]).n_tokens for record in records]
    alone.train()
    budget = max(lengths) * 2
    packed = runner(tmp_path / "packed", records, max_tokens_per_row=budget, **options)
    fed = seen_batches(packed, monkeypatch)[len(records) :]  # after the counting
    rows = [batch for batch in fed if batch.n_lists > 1]
    assert rows, "some lists share a row"
    assert all(batch.n_tokens <= budget for batch in rows)
    assert packed.state.global_step == alone.state.global_step == 1
    losses = [run.state.log_history[0]["loss"] for run in (packed, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    theirs = tiny_runs.trained(alone.model)
    for name, ours in tiny_runs.trained(packed.model).items():
        torch.testing.assert_close(ours, theirs[name], rtol=1e-3, atol=1e-5, msg=name)


def test_lists_with_and_without_an_image_can_be_in_one_run_of_larger_batches(tmp_path: Path) -> None:
    records = [dataclasses.replace(r, image=None) if i % 2 else r for i, r in enumerate(tiny_runs.records(6))]
    run = runner(tmp_path, records, per_device_train_batch_size=2)
    run.train()
    assert run.state.global_step == 4  # two and one of each kind


def test_lists_with_and_without_an_image_are_evaluated_in_larger_batches(tmp_path: Path) -> None:
    records = [dataclasses.replace(r, image=None) if i % 2 else r for i, r in enumerate(tiny_runs.records(5))]
    found = [
        runner(tmp_path / str(n), tiny_runs.records(2), per_device_eval_batch_size=n).evaluate(records) for n in (1, 3)
    ]
    for name in ("eval_loss", "eval_logps/chosen", "eval_lists/active", "eval_lists/reward_mean"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5), name


def test_a_resumed_run_goes_on_with_the_rows_that_are_left(tmp_path: Path) -> None:
    records = tiny_runs.records(6)
    options: dict[str, Any] = {"max_tokens_per_row": 1, "num_train_epochs": 2, "save_strategy": "steps"}
    options |= {"save_steps": 8, "learning_rate": 0.01}
    whole = runner(tmp_path, records, **options)
    whole.train()
    again = runner(tmp_path, records, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))  # in the second pass over the data
    assert again.state.global_step == whole.state.global_step == 12
    theirs = tiny_runs.trained(whole.model)
    for name, ours in tiny_runs.trained(again.model).items():
        torch.testing.assert_close(ours, theirs[name], msg=name)


def test_two_processes_take_each_row_once_and_equally_many(tmp_path: Path) -> None:
    """Three rows: the second process ends with one that was there already, which counts in no loss."""
    options: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.5, "max_steps": -1, "num_train_epochs": 1}
    options |= {"reference": "none", "objective": "simpo", "n_lists": 3, "max_tokens_per_row": 1}
    two_ranks(tmp_path / "two", gradient_accumulation_steps=2, **options)
    train(tmp_path / "one", gradient_accumulation_steps=3, **options)
    (ours, our_log), (theirs, their_log) = trained(tmp_path / "two"), trained(tmp_path / "one")
    assert_same(ours, theirs)
    assert our_log[0]["loss"] == pytest.approx(their_log[0]["loss"], rel=1e-4)
