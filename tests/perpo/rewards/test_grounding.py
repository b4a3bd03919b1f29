"""IoU is what counting cells gives, several boxes are matched exactly, and the rewards refuse bad truths."""

import itertools
import json
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perpo.rewards import box_iou, box_reward, giou, iou_reward, matched_score, scaled_giou, write_boxes
from perpo.rewards.completions import RewardFunction
from perpo.rewards.formats import FORMATS, Box
from perpo.rewards.grounding import match

from .test_formats import SIZE, TRUTH, boxes

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


NONE = [
    "[]",
    "```json\n[]\n```",
    '{"bbox_2d": []}',
    "There are no dogs.",
    "None",
    "There isn't any.",
    "I cannot see one",
]
NONE += ["<ref>none</ref>", "没有"]


@pytest.mark.parametrize("name", FORMATS)
def test_where_nothing_is_to_be_found_an_answer_that_says_so_is_right(name: str) -> None:
    wrong = [
        write_boxes([TRUTH], name, SIZE),
        f"no dog, but {write_boxes([TRUTH], name, SIZE)}",
        "a dog",
        "",
        "no idea",
        "I'm sorry, but I cannot see any image.",
        "No problem! Here it is.",
        "no dog, but [3000, 0, 0, 0] (0,0),(3000,0) <loc0000><loc0000><loc0000><loc0000>",  # boxes, if unreadable
    ]
    texts = [*NONE, *wrong]
    for truth in ([], "[]", np.zeros((0, 4))):
        sizes = [SIZE] * len(texts)
        rewards = box_reward(name)(["?"] * len(texts), texts, answer=[truth] * len(texts), image_size=sizes)
        assert rewards == [1.0] * len(NONE) + [0.0] * len(wrong)
    assert box_reward(name)(["?"], ["[]"], answer=[[TRUTH]], image_size=[SIZE]) == [0.0]


@given(boxes(), boxes())
def test_giou_is_iou_less_the_emptiness_around(a: Box, b: Box) -> None:
    value = giou(a, b)
    assert -1 <= value <= box_iou(a, b) + 1e-12
    assert value == giou(b, a)
    assert (abs(value - 1) < 1e-9) == (a == b)
    assert 0 <= scaled_giou(a, b) <= 1


def test_giou_by_hand() -> None:
    # unit squares of a 4 × 1 strip, first and last: union 2 of an enclosing 4
    assert giou((0, 0, 0.25, 1), (0.75, 0, 1, 1)) == pytest.approx(-0.5)
    assert giou((0, 0, 0.1, 0.1), (0.3, 0, 0.4, 0.1)) == pytest.approx(-0.5)
    assert giou((0, 0, 0.5, 1), (0.25, 0, 0.75, 1)) == pytest.approx(1 / 3)
    assert giou((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5)) == 0  # two points


@settings(max_examples=60)
@given(st.integers(0, 5), st.integers(0, 5), st.randoms(use_true_random=False), st.booleans())
def test_the_matching_is_the_best_of_all_matchings(n: int, m: int, random, with_ties: bool) -> None:
    values = [[round(random.uniform(-1, 1), 1 if with_ties else 9) for _ in range(m)] for _ in range(n)]
    pairs = match(values)
    assert len(pairs) == len({i for i, _ in pairs}) == len({j for _, j in pairs}) == min(n, m)
    small, large = sorted((n, m))
    best = max(
        sum(values[i][j] if n <= m else values[j][i] for i, j in enumerate(chosen))
        for chosen in itertools.permutations(range(large), small)
    )
    assert sum(values[i][j] for i, j in pairs) == pytest.approx(best)


def test_a_hundred_boxes_are_matched_in_a_moment() -> None:
    values = np.random.default_rng(0).random((100, 400))
    start = time.perf_counter()
    pairs = match(values)
    assert time.perf_counter() - start < 3
    assert sum(values[i, j] for i, j in pairs) > 98


@given(st.lists(boxes(), min_size=1, max_size=5, unique=True), st.randoms(use_true_random=False))
def test_the_order_of_the_boxes_does_not_matter_and_missing_or_surplus_ones_cost(found: list[Box], random) -> None:
    shuffled = random.sample(found, len(found))
    assert matched_score(found, shuffled) == pytest.approx(1)
    assert matched_score(found, shuffled[1:]) <= 1 - 1 / len(found) + 1e-9
    assert matched_score(found[1:], shuffled) <= 1 - 1 / len(found) + 1e-9
    assert matched_score([], found) == 0


def test_the_greedy_matching_is_not_taken_for_the_best() -> None:
    assert match([[0.9, 0.8], [0.8, 0.0]]) == [(0, 1), (1, 0)]


def test_a_single_truth_is_compared_with_the_first_box_and_several_with_all() -> None:
    reward = box_reward()
    other = (0.6, 0.8, 0.9, 0.9)
    two = write_boxes([other, TRUTH])
    assert reward(["?"] * 3, [two] * 3, answer=[list(TRUTH), [TRUTH, other], write_boxes([TRUTH, other])]) == [0, 1, 1]
    assert reward(["?"], [write_boxes([TRUTH])], answer=[[TRUTH, other]]) == [0.5]
    with_surplus = f"{write_boxes([TRUTH])} [0.3, 0.2, 0.3, 0.4] [12, 34, 56, 78]"  # neither can be read
    assert reward(["?"], [with_surplus], answer=[[TRUTH]]) == [pytest.approx(1 / 3)]


@pytest.mark.parametrize("measure", [box_iou, scaled_giou])
@pytest.mark.parametrize("text", ["", "no idea", "[1, 2]", "[0.3, 0.2, 0.3, 0.4]"])
def test_an_unreadable_answer_is_never_better_than_a_readable_one(text: str, measure) -> None:
    far = "[0.99, 0.99, 1, 1]"
    rewards = box_reward(measure=measure)(["?"] * 2, [text, far], answer=[[0, 0, 0.01, 0.01]] * 2)
    assert rewards[0] == 0 <= rewards[1]


def test_the_reward_takes_what_grpo_gives() -> None:
    reward = box_reward("qwen2.5-vl")
    text = json.dumps({"bbox_2d": [0, 0, 50, 100]})
    completions = [text, [{"role": "assistant", "content": text}], [{"role": "assistant", "content": [{"text": text}]}]]
    rewards = reward(
        prompts=["?"] * 3,
        completions=completions,
        answer=[np.array([0, 0, 1, 1]), [0, 0, 0.5, 1], "[0, 0, 0.5, 0.5]"],
        image_size=[(100, 100)] * 3,
        completion_ids=[[1]] * 3,
    )
    assert rewards == [0.5, 1, 0.5]
    assert reward.__name__ == "box_iou_reward_qwen2.5-vl"


BROKEN = ["no box", "", 7, None, [[0, 0, 1]], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3, math.nan]]
MISPLACED = [[0.1, 0.2, 30, 40], [0.5, 0.2, 0.1, 0.4], [-0.1, 0.2, 0.3, 0.4], [0, 0, 0, 1]]
MISPLACED_TEXTS = [*map(str, MISPLACED), "[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 30, 40]"]


@pytest.mark.parametrize("reward", [iou_reward, box_reward("llava"), box_reward("qwen3-vl", scaled_giou)])
@pytest.mark.parametrize("answer", [*BROKEN, *MISPLACED, *MISPLACED_TEXTS])
@pytest.mark.parametrize("completion", ["[0, 0, 1, 1]", "", "<think>", "[]"])
def test_a_truth_that_is_no_box_or_in_pixels_or_has_swapped_corners_is_an_error(
    reward: RewardFunction, answer: object, completion: str
) -> None:
    with pytest.raises(ValueError, match="answer must be a box"):
        reward(prompts=["?"], completions=[completion], answer=[answer])


def test_mistakes_of_the_caller_are_errors_that_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="'qwen' is not known; known are llava, "):
        box_reward("qwen")
    with pytest.raises(ValueError, match=r"'qwen2.5-vl' needs the image's size .* got None"):
        box_reward("qwen2.5-vl")(["?"], ["[0, 0, 9, 9]"], answer=[TRUTH])
    with pytest.raises(ValueError, match=r"got \(0, 5\)"):
        write_boxes([TRUTH], "llava-pad", (0, 5))
    with pytest.raises(ValueError, match="one length, got 1 completions and 2 of answer"):
        box_reward()(["?"], ["[0, 0, 9, 9]"], answer=[TRUTH, TRUTH])
    with pytest.raises(TypeError, match="a completion must be a text or a non-empty list"):
        box_reward()(["?"], [None], answer=[TRUTH])


def test_the_reward_reads_texts_and_message_lists_and_ignores_other_columns() -> None:
    truth = [0.0, 0.0, 0.5, 0.5]
    completions = ["It is at [0, 0, 0.5, 0.5].", [{"role": "assistant", "content": "[0, 0, 0.5, 1]"}]]
    rewards = iou_reward(
        prompts=["?", "?"], completions=completions, answer=[truth, "[0, 0, 0.5, 0.5]"], image_id=[1, 2]
    )
    assert rewards == pytest.approx([1.0, 0.5])


def test_answers_must_match_completions_one_to_one() -> None:
    with pytest.raises(ValueError, match="one length, got 2 completions and 1 of answer"):
        iou_reward(prompts=["?"], completions=["[0, 0, 1, 1]", "[0, 0, 1, 1]"], answer=[[0, 0, 1, 1]])
