"""What a packed row holds, token by token."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from perpo.encoding.batch import ListBatch, candidate_tensors, separate_rows
from perpo.encoding.encoder import Encoder
from perpo.encoding.packed import packed_row
from perpo.encoding.positions import PromptPositions
from perpo.model import sharing
from perpo.model.language_head import token_log_probs
from tests.perpo import tiny_models

RESPONSES = [[[11, 12, 13], [14], [15, 16]], [[17, 18, 19, 20]]]


def prompts(family: str) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    model, processor = tiny_models.build(family)
    encoder = Encoder.for_model(processor, model)
    pictures = [tiny_models.picture((40, 28)), tiny_models.picture((28, 60), seed=1)]
    return model, [encoder.prompt("Where?", picture) for picture in pictures]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_row_is_all_prompts_then_all_answers_without_their_last_tokens(family: str) -> None:
    model, encoded = prompts(family)
    inputs, rows, layout = packed_row(encoded, RESPONSES, PromptPositions(model))
    ids = inputs["input_ids"][0]
    first, second = (prompt["input_ids"][0] for prompt in encoded)
    assert ids.tolist() == [*first.tolist(), *second.tolist(), 11, 12, 15, 17, 18, 19]
    # The state before each token of a response: the prompt's last, or the one of the token before it.
    ends = (len(first) - 1, len(first) + len(second) - 1)
    start = len(first) + len(second)
    assert rows.tolist() == [
        ends[0],
        start,
        start + 1,
        ends[0],
        ends[0],
        start + 2,
        ends[1],
        *range(start + 3, start + 6),
    ]
    assert "attention_mask" not in inputs
    assert layout.n_tokens == len(ids)


def test_answers_go_on_where_their_prompt_ends() -> None:
    model, encoded = prompts("llava")
    inputs, _, layout = packed_row(encoded, RESPONSES, PromptPositions(model))
    n, m = layout.prompt_lengths
    assert inputs["position_ids"].tolist() == [[*range(n), *range(m), n, n + 1, n, m, m + 1, m + 2]]


def test_three_axes_are_the_models_own_and_go_on_after_their_largest() -> None:
    model, encoded = prompts("qwen2_5_vl")
    inputs, _, layout = packed_row(encoded, RESPONSES, PromptPositions(model))
    places, n = inputs["position_ids"], layout.prompt_lengths[0]
    own, _ = model.model.get_rope_index(**{k: v for k, v in encoded[0].items() if k not in ("pixel_values",)})
    assert torch.equal(places[:, 0, :n], own[:, 0])
    following = int(own.max()) + 1
    assert following < n  # an image takes fewer positions than tokens
    start = sum(layout.prompt_lengths)
    assert places[:, 0, start : start + 2].tolist() == [[following, following + 1]] * 3


def test_each_image_is_fed_once() -> None:
    model, encoded = prompts("qwen2_5_vl")
    inputs, _, _ = packed_row(encoded, RESPONSES, PromptPositions(model))
    assert torch.equal(inputs["pixel_values"], torch.cat([prompt["pixel_values"] for prompt in encoded]))
    assert len(inputs["image_grid_thw"]) == 2


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_what_workers_are_sent_holds_no_weights_and_gives_the_same(family: str) -> None:
    model, encoded = prompts(family)
    positions = PromptPositions(model)
    sent = pickle.dumps(positions)
    assert len(sent) < 20_000
    there = packed_row(encoded, RESPONSES, pickle.loads(sent))
    here = packed_row(encoded, RESPONSES, positions)
    assert torch.equal(there[0]["position_ids"], here[0]["position_ids"])
    assert there[2].blocks == here[2].blocks


def test_images_whose_tokens_see_each_other_are_blocks_of_the_layout() -> None:
    model, encoded = prompts("gemma3")
    _, _, layout = packed_row(encoded, RESPONSES, PromptPositions(model))
    for prompt, blocks in zip(encoded, layout.blocks, strict=True):
        ((start, end),) = blocks
        assert (prompt["input_ids"][0, start:end] == model.config.image_token_id).all()
        assert end - start == model.config.mm_tokens_per_image


def test_prompts_of_different_kinds_cannot_share_a_row() -> None:
    model, encoded = prompts("llava")
    del encoded[1]["pixel_values"]
    with pytest.raises(ValueError, match="lists with and without an image cannot share a batch"):
        packed_row(encoded, RESPONSES, PromptPositions(model))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_prompt_of_two_images_is_packed_as_separate_rows_have_it(family: str) -> None:
    """`Encoder` takes one image a prompt; what is packed may hold more."""
    model, processor = tiny_models.build(family, dtype=torch.float64)
    place = "<|vision_start|><image><|vision_end|>" if family == "qwen2_5_vl" else "<image>"
    pictures = [tiny_models.picture((40, 28)), tiny_models.picture((28, 56), seed=1)]
    texts = (f"{place} and {place}: where?", f"Is {place} like {place} here?")
    encoded = [dict(processor(text=[text], images=pictures, return_tensors="pt")) for text in texts]
    for prompt in encoded:
        prompt["pixel_values"] = prompt["pixel_values"].double()
    known = candidate_tensors(RESPONSES)
    inputs, rows, layout = packed_row(encoded, RESPONSES, PromptPositions(model))
    packed = ListBatch(inputs, rows, **known, layout=layout)
    separate = ListBatch(*separate_rows(encoded, RESPONSES, 0)[:2], **known)
    sharing.prepare(model, "on")
    gradients = []
    for batch in (packed, separate):
        model.zero_grad()
        log_probs = token_log_probs(model, batch)
        log_probs.square().sum().backward()
        gradients.append([log_probs.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for ours, theirs in zip(*gradients, strict=True):
        error = (ours - theirs).norm() / (theirs.norm() + 1e-3)
        assert error <= 1e-6  # rotary embeddings are in fp32 whatever the weights' type


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_sizes_of_images_stay_on_the_cpu_with_what_comes_of_them(family: str) -> None:
    """test_sharing.py compares the numbers; here, that nothing of it goes to the device."""
    model, encoded = prompts(family)
    positions = pickle.loads(pickle.dumps(PromptPositions(model)))
    inputs, rows, layout = packed_row(encoded, RESPONSES, positions)
    without, host = positions.without_waits(inputs)
    assert "image_grid_thw" in inputs
    assert "image_grid_thw" not in without
    batch = ListBatch(without, rows, **candidate_tensors(RESPONSES), layout=layout, host=host).to("meta")
    there = batch.keywords["host_inputs"].keywords
    assert {"image_grid_thw", "image_cu_seqlens"} <= set(there)
    assert all(x.device.type == "cpu" for x in there.values())
    assert batch.inputs["image_position_ids"].device.type == "meta"


def test_a_tower_that_takes_no_such_keywords_gets_none() -> None:
    for family in ("llava", "glm4v"):
        model, encoded = prompts(family)
        positions = PromptPositions(model)
        inputs, _, _ = packed_row(encoded, RESPONSES, positions)
        assert positions.without_waits(inputs) == (inputs, None)
