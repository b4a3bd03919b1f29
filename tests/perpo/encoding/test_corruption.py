"""The corrupted image of mDPO: hardly anything of the true one, always the same, and shown to one answer only."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from perpo.data.fingerprints import record_fingerprint
from perpo.data.record import ListRecord
from perpo.encoding.collator import ListCollator
from perpo.encoding.corruption import CORRUPTIONS, CROP_AREA, blank, crop, noise, with_corrupted_image
from perpo.encoding.encoder import Encoder
from perpo.training.reference_cache import SOURCE

from .. import tiny_models, tiny_runs


def coordinates(width: int, height: int) -> Image.Image:
    """Red grows from left to right, green from top to bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


@given(st.integers(0, 2**64 - 1), st.sampled_from([(256, 256), (600, 120), (90, 700)]))
def test_a_crop_shows_between_a_hundredth_and_a_fifth(seed: int, size: tuple[int, int]) -> None:
    cropped = crop(coordinates(*size), random.Random(seed))
    assert cropped.size == size
    low, high = np.asarray(cropped).min((0, 1)) / 255, np.asarray(cropped).max((0, 1)) / 255
    area = float(np.prod((high - low)[:2]))  # what is left of both gradients, to a pixel on each side
    assert 0.7 * CROP_AREA[0] < area < 1.1 * CROP_AREA[1]


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 9), (2, 30), (3, 12)])
def test_a_crop_of_a_few_pixels_holds_one_and_lies_inside(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding to whole pixels asks for a part wider than a picture of 2 × 9, and for one of no width of 1 × 1."""
    boxes: list[tuple[int, int, int, int]] = []
    monkeypatch.setattr(Image.Image, "resize", lambda image, to, resample, box: boxes.append(box))
    for seed in range(300):
        crop(Image.new("RGB", size), random.Random(seed))
    assert len(boxes) == 300
    assert all(0 <= left < right <= size[0] and 0 <= top < bottom <= size[1] for left, top, right, bottom in boxes)


def test_crops_lie_anywhere() -> None:
    middles = [np.asarray(crop(coordinates(128, 128), random.Random(i))).mean((0, 1))[:2] for i in range(200)]
    low, high = np.quantile(middles, 0.05, axis=0), np.quantile(middles, 0.95, axis=0)
    assert (low < 64).all()
    assert (high > 191).all()


def test_nothing_is_left_in_a_blank_and_in_noise() -> None:
    one, other = coordinates(64, 48), Image.new("RGB", (64, 48), "red")
    for fn in (blank, noise):
        assert fn(one, random.Random(1)).tobytes() == fn(other, random.Random(1)).tobytes()
    assert blank(one, random.Random(1)).getextrema() == ((127, 127),) * 3
    assert np.asarray(noise(one, random.Random(1))).std() == pytest.approx(255 / 12**0.5, rel=0.05)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_the_image_depends_on_record_seed_and_kind_alone(corruption: str) -> None:
    record, other = tiny_runs.records(2)
    picture = coordinates(64, 48)

    def shown(record: ListRecord, seed: int = 0) -> bytes:
        return with_corrupted_image(record, corruption, seed)[1].corrupt(picture.convert("RGBA")).tobytes()

    assert shown(record) == shown(tiny_runs.records(2)[0])
    assert shown(record) != picture.tobytes()
    if corruption != "blank":
        assert len({shown(record), shown(other), shown(record, 1)}) == 3


def test_a_corrupted_image_has_reference_log_probs_of_its_own() -> None:
    record, other = tiny_runs.records(2)
    other = ListRecord("another", record.image, record.prompt, responses=record.responses, rewards=record.rewards)
    made = [with_corrupted_image(record, kind, seed)[1] for kind in CORRUPTIONS for seed in (0, 1)]
    made.append(with_corrupted_image(other, "crop", 0)[1])
    clean = ListRecord("clean", record.image, record.prompt, responses=made[0].responses, rewards=(1.0,))
    assert len({record_fingerprint(each, SOURCE) for each in [*made, clean]}) == len(made) + 1


def test_only_the_best_answer_sees_the_corrupted_image() -> None:
    _, processor = tiny_models.build("llava")
    encoder = Encoder(processor)
    sample = with_corrupted_image(tiny_runs.records(1)[0], "noise", 0)
    record, corrupted = sample
    batch = ListCollator(encoder)([sample])
    clean = encoder.prompt(record.prompt, record.image)["pixel_values"]
    other = encoder.prompt(record.prompt, corrupted.corrupt(record.image))["pixel_values"]
    assert not torch.equal(clean, other)
    torch.testing.assert_close(batch.inputs["pixel_values"], torch.cat([clean] * record.k + [other]), rtol=0, atol=0)
    best = max(range(record.k), key=lambda i: record.rewards[i])
    spans = batch.labels.split(batch.cu_seqlens.diff().tolist())
    assert torch.equal(spans[-1], spans[best])
    assert batch.rewards.tolist() == pytest.approx([*record.rewards, min(record.rewards)])
    assert batch.pair_weights[0, best].tolist().count(1.0) == 2
    assert batch.pair_weights.sum() == 2


def test_what_is_known_of_each_answer_stays_with_the_best_one() -> None:
    record = replace(tiny_runs.records()[0], complete=None)
    assert record.rewards is not None
    best = record.rewards.index(max(record.rewards))
    ends = tuple(i != best for i in range(record.k))
    probs = tuple(i / 10 for i in range(record.k))
    _, corrupted = with_corrupted_image(replace(record, complete=ends, flip_probs=probs), "noise", 0)
    assert (corrupted.complete, corrupted.flip_probs) == ((False,), (best / 10,))


def test_a_text_has_no_image_to_corrupt() -> None:
    with pytest.raises(ValueError, match="record 'a' has no image, but the objective"):
        with_corrupted_image(ListRecord("a", None, "?", responses=("x", "y"), rewards=(1.0, 0.0)), "crop", 0)
