"""Pictures are reproducible, their splits share no digit, and their boxes are exact."""

import pytest
import torch

from perpo.demo import digits as digits_module
from perpo.demo.digits import CANVAS, INK_THRESHOLD, Pictures, digit_bank, tight_boxes
from perpo.demo.pages import hasty_transcripts, make_pages, transcripts
from perpo.demo.scenes import box_text, coarse_boxes, make_scenes
from perpo.demo.tasks import SEEDS, TASKS
from perpo.demo.train_sft import EYE_SEED, EYE_STEPS, SEED, STEPS_OF_ANSWERS
from perpo.rewards import box_iou, parse_box
from perpo.rewards.ocr import edit_similarity

SPLITS = ("train", "validation", "test")


@pytest.mark.parametrize("make", [make_scenes, make_pages])
def test_pictures_are_the_same_for_the_same_seed_and_no_other(make) -> None:
    first, again, other = make(50, "train", 3), make(50, "train", 3), make(50, "train", 4)
    for name in ("pixels", "digits", "boxes", "ink"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.pixels, other.pixels)


def test_no_digit_is_in_two_splits_and_none_is_left_out() -> None:
    from sklearn.datasets import load_digits

    banks = [{image.numpy().tobytes() for image in digit_bank(split)[0]} for split in SPLITS]
    assert not banks[0] & banks[1]
    assert not banks[0] & banks[2]
    assert not banks[1] & banks[2]
    assert sum(len(digit_bank(split)[0]) for split in SPLITS) == len(load_digits().target)
    assert all(set(digit_bank(split)[1].tolist()) == set(range(10)) for split in SPLITS)


@pytest.mark.parametrize("make", [make_scenes, make_pages])
def test_a_split_is_drawn_from_its_own_digits_alone(make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    bank = digits_module.digit_bank
    monkeypatch.setattr(digits_module, "digit_bank", lambda split: (asked.append(split), bank(split))[1])
    make(5, "test", 0)
    assert set(asked) == {"test"}


def test_no_picture_of_the_comparison_has_a_seed_of_supervised_training() -> None:
    taught = {*range(EYE_SEED, EYE_SEED + EYE_STEPS), *range(SEED, SEED + STEPS_OF_ANSWERS)}
    assert not taught & {SEEDS["train"] + seed for seed in range(10_000)}


def test_the_question_has_one_answer() -> None:
    digits = make_scenes(300, "test", 0).digits
    assert all(len(set(row)) == len(row) for row in digits.tolist())


@pytest.mark.parametrize("make", [make_scenes, make_pages])
def test_a_box_holds_all_of_its_digits_ink_and_touches_it_on_each_side(make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits_module, "NOISE", 0.0)
    drawn = make(100, "train", 0)
    for picture, digits, boxes in zip(drawn.pixels, drawn.digits, drawn.boxes, strict=True):
        ink = 255 - picture.int()
        outside = torch.ones(CANVAS, CANVAS, dtype=torch.bool)
        for x1, y1, x2, y2 in (boxes[digits >= 0] * CANVAS).round().int().tolist():
            outside[y1:y2, x1:x2] = False
            for edge in (ink[y1, x1:x2], ink[y2 - 1, x1:x2], ink[y1:y2, x1], ink[y1:y2, x2 - 1]):
                assert edge.max() > 0
        assert ink[outside].max() <= INK_THRESHOLD * 255 + 1


def test_a_single_pixel_has_a_box_of_one_pixel() -> None:
    layer = torch.zeros(1, CANVAS, CANVAS)
    layer[0, 5, 7] = 1
    assert (tight_boxes(layer) * CANVAS).tolist() == [[7, 5, 8, 6]]


def test_coarse_boxes_are_loose_and_reproducible() -> None:
    exact = make_scenes(500, "train", 0).boxes[:, 0]
    coarse = coarse_boxes(exact, seed=1)
    assert torch.equal(coarse, coarse_boxes(exact, seed=1))
    area = (coarse[:, 2:] - coarse[:, :2]).prod(1) / (exact[:, 2:] - exact[:, :2]).prod(1)
    assert area.median() > 1.3
    iou = torch.tensor([box_iou(a, b) for a, b in zip(coarse.tolist(), exact.tolist(), strict=True)])
    assert 0.4 < iou.mean() < 0.7


def test_a_box_reads_back_from_its_text_to_a_hundredth() -> None:
    boxes = make_scenes(200, "train", 0).boxes[:, 0]
    read = torch.tensor([parse_box(box_text(box)) for box in boxes.tolist()])
    assert torch.allclose(read, boxes, atol=0.00501)


def test_a_transcript_names_the_digits_line_after_line_from_left_to_right() -> None:
    pages = make_pages(100, "train", 0)
    assert {len(text) for text in transcripts(pages)} == {5, 6, 7, 8}
    for text, digits, boxes in zip(transcripts(pages), pages.digits.tolist(), pages.boxes, strict=True):
        n = len(text)
        assert digits[:n] == [int(digit) for digit in text]
        assert digits[n:] == [-1] * (len(digits) - n)
        lower = (boxes[:n, 1] + boxes[:n, 3]) / 2 > 0.5
        assert lower.int().diff().ge(0).all()  # the upper line first
        for line in (boxes[:n][~lower], boxes[:n][lower]):
            assert ((line[:, 0] + line[:, 2]).diff() > 0).all()


def test_who_is_in_a_hurry_passes_over_faint_digits_and_seldom_dark_ones() -> None:
    pages = make_pages(1000, "train", 0)
    hasty = hasty_transcripts(pages, 1)
    assert hasty == hasty_transcripts(pages, 1)
    similarity = torch.tensor([edit_similarity(a, b) for a, b in zip(hasty, transcripts(pages), strict=True)])
    assert 0.4 < similarity.mean() < 0.8
    for low, high, least, most in ((0.3, 0.45, 0.6, 0.8), (0.85, 1.0, 0.0, 0.1)):
        ink = torch.where((pages.ink > low) & (pages.ink < high), pages.ink, 0)
        only = Pictures(pages.pixels, pages.digits.masked_fill(ink == 0, -1), pages.boxes, ink)
        kept = sum(map(len, hasty_transcripts(only, 1))) / sum(map(len, transcripts(only)))
        assert least <= 1 - kept <= most


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_every_turn_of_a_task_is_about_its_picture(task) -> None:
    pictures = task.pictures(20, "train", 0)
    for (question, answer), digits in zip(task.turns(pictures), pictures.digits.tolist(), strict=True):
        words = question if task.name == "grounding" else answer
        assert str(digits[0]) in words
