"""Every family's boxes are read as a person would read them, in linear time, and several boxes are matched exactly."""

import itertools
import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perpo.rewards.boxes import (
    FORMATS,
    MAX_BOXES,
    box_reward,
    giou,
    match,
    matched_score,
    parse_boxes,
    scaled_giou,
    write_boxes,
)
from perpo.rewards.grounding import Box, box_iou, parse_box

SIZE = (1280, 720)
TRUTH = (0.12, 0.34, 0.56, 0.78)


@st.composite
def boxes(draw: st.DrawFn, least: int = 1) -> Box:
    """Corners on a grid of fiftieths, sides of at least `least` of them."""
    x1, y1 = draw(st.integers(0, 50 - least)), draw(st.integers(0, 50 - least))
    x2, y2 = draw(st.integers(x1 + least, 50)), draw(st.integers(y1 + least, 50))
    return x1 / 50, y1 / 50, x2 / 50, y2 / 50


@pytest.mark.parametrize("name", FORMATS)
@given(st.lists(boxes(least=5), min_size=1, max_size=4), st.tuples(st.integers(400, 1600), st.integers(400, 1600)))
def test_what_is_written_is_read_back_to_half_a_unit(name: str, written: list[Box], size: tuple[int, int]) -> None:
    read = parse_boxes(write_boxes(written, name, size, label='a "box" [1, 2, 3, 4]'), name, size)
    # of 1024 bins the last is missing, so that the lower and right edges are a whole bin off
    unit = {1000: 1000, 1024: 512, None: min(size), 1: 100}[FORMATS[name].scale]
    if FORMATS[name].padded:
        unit *= min(size) / max(size)
    assert len(read) == len(written)
    assert np.abs(np.array(read) - np.array(written)).max() <= 0.5 / unit + 1e-9


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llava", "[0.12, 0.34, 0.56, 0.78]"),
        ("llava", "```json\n[0.12,0.34,\n0.56,0.78]\n```"),
        ("llava", "[0.56, 0.78, 0.12, 0.34]"),  # corners the other way round
        ("qwen2-vl", "<|object_ref_start|>the dog<|object_ref_end|><|box_start|>(120,340),(560,780)<|box_end|>"),
        ("qwen2-vl", "(560, 780) , (120, 340)"),
        ("qwen2-vl", "it is at [120, 340, 560, 780]"),
        ("qwen2.5-vl", '```json\n[\n\t{"bbox_2d": [153.6, 244.8, 716.8, 561.6], "label": "dog"}\n]\n```'),
        ("qwen2.5-vl", "{'bbox_2d': [153.6, 244.8, 716.8, 561.6]"),  # single quotes, broken off
        ("qwen2.5-vl", 'Padding is [0, 0, 10, 10]. {"bbox_2d": [153.6, 244.8, 716.8, 561.6]}'),
        ("qwen3-vl", 'Sure! ```json\n[{"bbox_2d": [120, 340, 560, 780], "label": "dog"}]\n``` Anything else?'),
        ("glm-v", '{"bbox_2d": [[120, 340, 560, 780]]}'),
        ("glm-v", "<|begin_of_box|>[[120, 340, 560, 780]]<|end_of_box|>"),
        ("qwen2-vl", "dog(120,340),(560,780)"),  # the same without the marks
        ("qwen3-vl", '{"bbox_2d": ["120", "340", "560", "780"]}'),
        ("qwen3-vl", '{"bbox_2d": "120, 340, 560, 780", "label": "dog"}'),
        ("qwen3-vl", '{"bbox_2d": "[120, 340, 560, 780]"}'),
        ("qwen3-vl", '{"bbox_2d": (120,340),(560,780)}'),
        ("qwen3-vl", '{"bbox_2d": "<|box_start|>(120,340),(560,780)<|box_end|>"}'),
        ("qwen3-vl", '{"bbox_2d": [[120, 340], [560, 780]]}'),
        ("qwen3-vl", "the dog at (120,340),(560,780)"),
        ("internvl", "dog[[120, 340, 560, 780]]"),
        ("internvl", "<ref>dog</ref><box>[[120, 340, 560, 780]]</box>"),
        ("paligemma", "<loc0348><loc0123><loc0799><loc0573> dog"),
    ],
)
def test_real_answers_of_each_family(name: str, text: str) -> None:
    (box,) = parse_boxes(text, name, SIZE)
    assert box == pytest.approx(TRUTH, abs=1 / 1024)


@pytest.mark.parametrize(
    "text",
    [
        '{"bbox_2d": [[100, 100, 200, 200], [300, 100, 400, 200]]}',
        '```json\n{"bbox_2d": [\n  [100, 100, 200, 200],\n  [300, 100, 400, 200]\n], "label": "2 dogs"}\n```',
        '[{"bbox_2d": [100, 100, 200, 200]}, {"bbox_2d": [[300, 100, 400, 200]]}]',
        '{"bbox_2d": ["100,100,200,200", "300,100,400,200"]}',
        '{"bbox_2d": [(100,100),(200,200), (300,100),(400,200)]}',
        '{"bbox_2d": [[100, 100, 200, 200], [300, 100, 400, 200], [500, 1',
    ],
)
def test_several_boxes_may_share_one_key(text: str) -> None:
    two = [(0.1, 0.1, 0.2, 0.2), (0.3, 0.1, 0.4, 0.2)]
    assert parse_boxes(text, "qwen3-vl") == two
    assert parse_boxes(text, "qwen2.5-vl", (1000, 1000)) == two


@pytest.mark.parametrize("numbers", ["1, 2, 3", "1, 2, 3, 4, 5", "1, 2, 3, 4, 5, 6, 7, 8"])
def test_what_is_no_box_of_four_numbers_is_none(numbers: str) -> None:
    for value in (f"[{numbers}]", f"[[{numbers}]]", f'"{numbers}"'):
        assert parse_boxes(f'{{"bbox_2d": {value}}}', "qwen3-vl") == []


NONE = [
    "[]",
    "```json\n[]\n```",
    '{"bbox_2d": []}',
    "There are no dogs.",
    "None",
    "There isn't any.",
    "I cannot see one",
]
NONE += ["<ref>none</ref>"]


@pytest.mark.parametrize("name", FORMATS)
def test_where_nothing_is_to_be_found_an_answer_that_says_so_is_right(name: str) -> None:
    wrong = [
        write_boxes([TRUTH], name, SIZE),
        f"no dog, but {write_boxes([TRUTH], name, SIZE)}",
        "a dog",
        "",
        "no idea",
    ]
    texts = [*NONE, *wrong]
    for truth in ([], "[]", np.zeros((0, 4))):
        sizes = [SIZE] * len(texts)
        rewards = box_reward(name)(["?"] * len(texts), texts, answer=[truth] * len(texts), image_size=sizes)
        assert rewards == [1.0] * len(NONE) + [0.0] * len(wrong)
    assert box_reward(name)(["?"], ["[]"], answer=[[TRUTH]], image_size=[SIZE]) == [0.0]


def test_llava_1_5_coordinates_count_the_padding() -> None:
    # 200 × 100 pasted in the middle of 200 × 200: the image is the rows from a quarter to three quarters
    assert parse_boxes("[0.5, 0.25, 1, 0.5]", "llava-pad", (200, 100)) == [(0.5, 0.0, 1.0, 0.5)]
    assert parse_boxes("[0.0, 0.0, 1, 0.2]", "llava-pad", (200, 100)) == []  # in the padding
    assert write_boxes([(0.5, 0, 1, 0.5)], "llava-pad", (100, 200)) == "[0.50, 0.00, 0.75, 0.50]"


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "paligemma"])
def test_degenerate_outside_and_wrongly_scaled_boxes_are_none(name: str) -> None:
    big = {1: 1.0, None: 100.0}.get(FORMATS[name].scale, 1000.0)
    for x1, y1, x2, y2 in [(0.3, 0.2, 0.3, 0.4), (30, 0.2, 40, 0.4), (-3, 0.2, -1, 0.4)]:
        assert parse_boxes(f"[{x1 * big}, {y1 * big}, {x2 * big}, {y2 * big}]", name, (100, 100)) == []
    fractions = parse_boxes("[0.1, 0.2, 0.3, 1.0]", name, (100, 100))
    assert bool(fractions) == (FORMATS[name].scale == 1)


def test_a_box_over_the_edge_is_clipped_in_every_scale() -> None:
    assert parse_boxes("[-50, 250, 1500, 1e5]", "internvl") == [(0.0, 0.25, 1.0, 1.0)]
    assert parse_boxes("[-50, 180, 9999, 1e999]", "qwen2.5-vl", SIZE) == [(0.0, 0.25, 1.0, 1.0)]


written_number = st.one_of(st.floats(-2, 2).map("{:.3f}".format), st.sampled_from(["nan", "", "1e3", "."]))


@given(st.lists(written_number, max_size=6), st.text("ab[](), .\n", max_size=8))
def test_llava_boxes_are_those_of_the_grounding_reward(numbers: list[str], around: str) -> None:
    text = f"{around}[{', '.join(numbers)}]{around}"
    assert parse_boxes(text)[:1] == [box for box in [parse_box(text)] if box]


@given(st.text(st.sampled_from("[](){}<>loc0123456789.,-+eE \n\"'bbox_2d:|")), st.sampled_from(sorted(FORMATS)))
def test_whatever_the_text_what_is_read_is_a_box_in_the_image(text: str, name: str) -> None:
    for x1, y1, x2, y2 in parse_boxes(text, name, SIZE):
        assert 0 <= x1 < x2 <= 1
        assert 0 <= y1 < y2 <= 1


HOSTILE = [
    lambda n: "[" + ",".join(["1" * (n // 4)] * 4),
    lambda n: "[" + ",".join(["1." + "1" * (n // 4)] * 4),
    lambda n: "[" * n,
    lambda n: "[ " + " " * n + "1",
    lambda n: "[1" + " " * n + "x",
    lambda n: "[1," * (n // 3),
    lambda n: "(1,1)" + " " * n,
    lambda n: "(1,1),(" * (n // 7),
    lambda n: "(" + "1" * n,
    lambda n: '"bbox_2d":' * (n // 10),
    lambda n: '"bbox_2d"' + " " * n,
    lambda n: '"bbox_2d": [' + " " * n,
    lambda n: '"bbox_2d": [' + "[1,2,3,4]," * (n // 10),
    lambda n: '"bbox_2d": [' + "(1,2)," * (n // 6),
    lambda n: "<loc0001>" * (n // 9),
    lambda n: "[0.1, 0.2, 0.3, 0.4]" * (n // 20),
    lambda n: "1e" * (n // 2),
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_reading_is_linear_in_the_answer(hostile) -> None:
    text = hostile(200_000)
    start = time.perf_counter()
    for name in FORMATS:
        parse_boxes(text, name, SIZE)
    assert time.perf_counter() - start < 2  # a quadratic pattern takes minutes, a linear one milliseconds


def test_a_model_that_repeats_itself_is_read_only_so_far() -> None:
    assert len(parse_boxes("[0.1, 0.2, 0.3, 0.4]" * (2 * MAX_BOXES))) == MAX_BOXES


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


@pytest.mark.parametrize("answer", ["no box", "", 7, None, [[0, 0, 1]], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3, math.nan]])
def test_a_broken_ground_truth_is_an_error_that_shows_it(answer: object) -> None:
    with pytest.raises(ValueError, match="answer must be a box"):
        box_reward()(["?"], ["[0, 0, 1, 1]"], answer=[answer])


@pytest.mark.parametrize("answer", [[0.1, 0.2, 30, 40], [0.5, 0.2, 0.1, 0.4], [-0.1, 0.2, 0.3, 0.4], [0, 0, 0, 1]])
def test_a_ground_truth_in_pixels_or_with_swapped_corners_is_an_error_and_not_clipped(answer: object) -> None:
    with pytest.raises(ValueError, match="answer must be a box"):
        box_reward()(["?"], ["[0, 0, 1, 1]"], answer=[answer])


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
