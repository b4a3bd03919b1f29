"""Scenes are reproducible, their splits share no digit, and their boxes are exact."""

import pytest
import torch

from perpo.demo import scenes as scenes_module
from perpo.demo.scenes import (
    CANVAS,
    DIGITS_PER_SCENE,
    INK_THRESHOLD,
    coarse_boxes,
    digit_bank,
    make_scenes,
    tight_boxes,
)
from perpo.rewards import box_iou

SPLITS = ("train", "validation", "test")


def test_scenes_are_the_same_for_the_same_seed_and_no_other() -> None:
    first, again, other = make_scenes(50, "train", 3), make_scenes(50, "train", 3), make_scenes(50, "train", 4)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.all_boxes, again.all_boxes)
    assert not torch.equal(first.images, other.images)


def test_no_digit_is_in_two_splits_and_none_is_left_out() -> None:
    from sklearn.datasets import load_digits

    banks = [{image.numpy().tobytes() for image in digit_bank(split)[0]} for split in SPLITS]
    assert not banks[0] & banks[1]
    assert not banks[0] & banks[2]
    assert not banks[1] & banks[2]
    assert sum(len(digit_bank(split)[0]) for split in SPLITS) == len(load_digits().target)
    assert all(set(digit_bank(split)[1].tolist()) == set(range(10)) for split in SPLITS)


def test_the_question_has_one_answer() -> None:
    digits = make_scenes(300, "test", 0).digits
    assert digits.shape == (300, DIGITS_PER_SCENE)
    assert all(len(set(row)) == DIGITS_PER_SCENE for row in digits.tolist())


def test_the_box_holds_all_of_the_digits_ink_and_touches_it_on_each_side(monkeypatch: pytest.MonkeyPatch) -> None:
    # One digit a scene and no noise: all the ink in the image is the asked digit's.
    monkeypatch.setattr(scenes_module, "DIGITS_PER_SCENE", 1)
    monkeypatch.setattr(scenes_module, "NOISE", 0.0)
    scenes = make_scenes(200, "train", 0)
    for image, box in zip(scenes.images[:, 0], scenes.boxes, strict=True):
        ink = image > INK_THRESHOLD * image.max()
        x1, y1, x2, y2 = (box * CANVAS).round().int().tolist()
        assert ink[y1:y2, x1:x2].sum() == ink.sum()
        assert ink[y1, :].any()
        assert ink[y2 - 1, :].any()
        assert ink[:, x1].any()
        assert ink[:, x2 - 1].any()


def test_a_single_pixel_has_a_box_of_one_pixel() -> None:
    layer = torch.zeros(1, CANVAS, CANVAS)
    layer[0, 5, 7] = 1
    assert (tight_boxes(layer) * CANVAS).tolist() == [[7, 5, 8, 6]]


def test_coarse_boxes_are_loose_and_reproducible() -> None:
    exact = make_scenes(500, "train", 0).boxes
    coarse = coarse_boxes(exact, seed=1)
    assert torch.equal(coarse, coarse_boxes(exact, seed=1))
    area = (coarse[:, 2:] - coarse[:, :2]).prod(1) / (exact[:, 2:] - exact[:, :2]).prod(1)
    assert area.median() > 1.3
    iou = torch.tensor([box_iou(a, b) for a, b in zip(coarse.tolist(), exact.tolist(), strict=True)])
    assert 0.4 < iou.mean() < 0.7


def test_indexing_takes_scenes_with_their_questions_and_boxes() -> None:
    scenes = make_scenes(10, "train", 0)
    part = scenes[torch.tensor([7, 2])]
    assert len(part) == 2
    assert torch.equal(part.images[1], scenes.images[2])
    assert torch.equal(part.boxes[0], scenes.all_boxes[7, 0])
