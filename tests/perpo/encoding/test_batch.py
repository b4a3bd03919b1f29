"""Lists of one or several prompts as a batch: which candidate is whose, and what travels to a device."""

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from perpo.encoding.batch import LAYOUT, ListBatch, candidate_tensors, collate_lists

RESPONSES = [[[1, 2], [3]], [[4, 5, 6]], [[7]], [[8], [9], [8, 9]]]  # of four prompts


def prompt(*ids: int) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}


def test_candidates_of_consecutive_prompts_are_one_list() -> None:
    known = candidate_tensors(
        RESPONSES,
        [[0.1, 0.2], [0.3], [0.4], [0.5, 0.6, 0.7]],
        prompts_per_list=[2, 1, 1],
        pair_weights=[[[0, 1, 2], [3, 4, 5], [6, 7, 8]], [[9]], [[0] * 3] * 3],
        flip_probs=[[0.0, 0.1], [0.2], [0.3], [0.4, 0.5, 0.6]],
    )
    assert known["cu_lists"].tolist() == [0, 3, 4, 7]
    assert known["cu_seqlens"].tolist() == [0, 2, 3, 6, 7, 8, 9, 11]
    assert known["labels"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 9]
    assert known["added"].tolist() == [False, False, True, False, False, False, False]
    torch.testing.assert_close(known["rewards"], torch.arange(1, 8) / 10)
    torch.testing.assert_close(known["flip_probs"], torch.arange(7) / 10)
    assert known["pair_weights"].tolist() == [
        [[0, 1, 2], [3, 4, 5], [6, 7, 8]],
        [[9, 0, 0], [0, 0, 0], [0, 0, 0]],
        [[0] * 3] * 3,
    ]


def test_a_list_is_a_prompt_unless_told_otherwise() -> None:
    known = candidate_tensors(RESPONSES)
    assert known["cu_lists"].tolist() == [0, 2, 3, 4, 7]
    assert known["rewards"].tolist() == [0.0] * 7
    assert all(known[name] is None for name in ("added", "ref_log_probs", "flip_probs", "pair_weights"))


def test_every_candidate_has_its_own_prompt_before_it() -> None:
    prompts = [prompt(10), prompt(20, 21), prompt(30, 31, 32), prompt(40)]
    batch = collate_lists(prompts, RESPONSES, 0, prompts_per_list=[2, 2])
    flat = [(p["input_ids"][0].tolist(), ids) for p, many in zip(prompts, RESPONSES, strict=True) for ids in many]
    fed = batch.inputs["attention_mask"].sum(1).tolist()
    for row, n, (before, ids) in zip(batch.inputs["input_ids"].tolist(), fed, flat, strict=True):
        assert row[:n] == before + ids[:-1]
        assert row[n:] == [0] * (len(row) - n)
    assert batch.n_tokens == sum(fed)
    ahead = batch.inputs["input_ids"].flatten()[batch.response_rows].tolist()  # the token that each label follows
    assert ahead == [t for before, ids in flat for t in (before[-1:] + ids)[: len(ids)]]


def tensors(x: Any) -> list[Tensor]:
    return [t for value in x.values() for t in tensors(value)] if isinstance(x, dict) else [x]


def test_all_but_the_layout_moves_to_a_device() -> None:
    """Whatever fields a batch has: each is filled here with a tensor, or with what its type asks for."""
    made = {f.name: 3 if f.type == "int" else torch.ones(2) for f in fields(ListBatch)}
    made["inputs"] = {"input_ids": torch.ones(2), "nested": {"x": torch.ones(2)}}
    moved = ListBatch(**made).to("meta")
    for f in fields(ListBatch):
        value = getattr(moved, f.name)
        if f.type == "int":
            assert value == 3
            continue
        expected = "cpu" if f.name in LAYOUT else "meta"
        assert {t.device.type for t in tensors(value)} == {expected}, f.name
    assert ListBatch({}, *[torch.ones(2)] * 5).to("meta").pair_weights is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts_per_list": [2, 1]}, "prompts_per_list: expected numbers ≥ 1 that add up to 4 prompts, got"),
        ({"prompts_per_list": [4, 0]}, "prompts_per_list: expected numbers ≥ 1"),
        ({"rewards": [[1.0, 2.0, 3.0], [4.0], [5.0, 6.0, 7.0]]}, r"rewards: .* \[2, 1, 1, 3\] of them by prompt"),
        ({"flip_probs": [[0.1] * 7]}, r"flip_probs: expected one number a response"),
        ({"pair_weights": [[[0.0]]]}, r"pair_weights: expected a matrix \[k, k\] a list, k \[2, 1, 1, 3\], got \[1\]"),
    ],
)
def test_lengths_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        candidate_tensors(RESPONSES, **options)


def test_a_reward_that_fp32_would_make_infinite_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rewards: 1e\+39 is beyond the largest fp32 number"):
        candidate_tensors([[[1], [2]]], [[1e39, 0.0]])
    assert candidate_tensors([[[1], [2]]], [[math.inf, 0.0]])["rewards"].isinf().tolist() == [True, False]
