"""Boxes are read from answers as a person would read them, and IoU is what counting pixels gives."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perpo.rewards import box_iou, iou_reward, parse_box

GRID = 20  # boxes with corners on this grid can be counted exactly, cell by cell
corner = st.integers(0, GRID)


@st.composite
def grid_boxes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    x1, x2 = sorted(draw(st.lists(corner, min_size=2, max_size=2, unique=True)))
    y1, y2 = sorted(draw(st.lists(corner, min_size=2, max_size=2, unique=True)))
    return x1, y1, x2, y2


def raster(box: tuple[int, int, int, int]) -> torch.Tensor:
    cells = torch.zeros(GRID, GRID, dtype=torch.bool)
    cells[box[1] : box[3], box[0] : box[2]] = True
    return cells


def unit(box: tuple[int, int, int, int]) -> tuple[float, ...]:
    return tuple(side / GRID for side in box)


@given(grid_boxes(), grid_boxes())
def test_iou_is_the_share_of_cells_that_both_boxes_cover(a: tuple, b: tuple) -> None:
    both, either = (raster(a) & raster(b)).sum(), (raster(a) | raster(b)).sum()
    assert box_iou(unit(a), unit(b)) == pytest.approx((both / either).item(), abs=1e-6)


@given(grid_boxes(), grid_boxes())
def test_iou_is_symmetric_between_0_and_1_and_1_only_for_equal_boxes(a: tuple, b: tuple) -> None:
    value = box_iou(unit(a), unit(b))
    assert value == box_iou(unit(b), unit(a))
    assert 0 <= value <= 1 + 1e-12
    assert (abs(value - 1) < 1e-9) == (a == b)


def test_boxes_that_only_touch_share_nothing() -> None:
    assert box_iou((0, 0, 0.5, 1), (0.5, 0, 1, 1)) == 0


@given(grid_boxes(), st.text("abc .,:-\n"), st.text("abc .,:-\n"))
def test_a_box_is_found_among_any_words(box: tuple, before: str, after: str) -> None:
    x1, y1, x2, y2 = unit(box)
    assert parse_box(f"{before}[{x1}, {y1},{x2} ,  {y2}]{after}") == pytest.approx((x1, y1, x2, y2))


@given(grid_boxes())
def test_swapped_corners_name_the_same_box(box: tuple) -> None:
    x1, y1, x2, y2 = unit(box)
    assert parse_box(f"[{x2}, {y1}, {x1}, {y2}]") == parse_box(f"[{x1}, {y2}, {x2}, {y1}]") == (x1, y1, x2, y2)


@given(*[st.floats(-1e6, 1e6)] * 4)
def test_whatever_is_parsed_is_a_box_inside_the_image(x1: float, y1: float, x2: float, y2: float) -> None:
    box = parse_box(f"[{x1}, {y1}, {x2}, {y2}]")
    if box is not None:
        assert 0 <= box[0] < box[2] <= 1
        assert 0 <= box[1] < box[3] <= 1


@given(st.text())
def test_no_text_whatever_raises(text: str) -> None:
    box = parse_box(text)
    assert box is None or all(math.isfinite(side) for side in box)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the 7 is at the left",
        "[0.1, 0.2, 0.3]",
        "[0.1, 0.2, 0.3, 0.4, 0.5]",
        "[0.1, 0.2, 0.3, nan]",
        "[0.1, 0.2, 0.3, inf]",
        "[0.1 0.2 0.3 0.4]",
        "[0.3, 0.2, 0.3, 0.4]",  # no width
        "[1.2, 0.2, 1.7, 0.4]",  # nothing of it inside the image
        "[0.1, 0.2, 0.3, 0.4",
    ],
)
def test_what_is_no_box_scores_zero(text: str) -> None:
    assert parse_box(text) is None
    assert iou_reward(prompts=["?"], completions=[text], answer=[[0.1, 0.2, 0.3, 0.4]]) == [0.0]


def test_a_box_that_reaches_over_the_edge_is_clipped() -> None:
    assert parse_box("[-0.5, 0.25, 1.5, 2]") == (0.0, 0.25, 1.0, 1.0)


def test_the_reward_reads_texts_and_message_lists_and_ignores_other_columns() -> None:
    truth = [0.0, 0.0, 0.5, 0.5]
    completions = ["It is at [0, 0, 0.5, 0.5].", [{"role": "assistant", "content": "[0, 0, 0.5, 1]"}]]
    rewards = iou_reward(
        prompts=["?", "?"], completions=completions, answer=[truth, "[0, 0, 0.5, 0.5]"], image_id=[1, 2]
    )
    assert rewards == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize("answer", ["no box", [0.1, 0.2, 0.3], [0.1, 0.2, 0.3, math.nan]])
def test_a_broken_ground_truth_is_an_error_that_shows_it(answer: object) -> None:
    with pytest.raises(ValueError, match="answer must be a box"):
        iou_reward(prompts=["?"], completions=["[0, 0, 1, 1]"], answer=[answer])


def test_answers_must_match_completions_one_to_one() -> None:
    with pytest.raises(ValueError, match="one length, got 2 and 1"):
        iou_reward(prompts=["?"], completions=["[0, 0, 1, 1]", "[0, 0, 1, 1]"], answer=[[0, 0, 1, 1]])
