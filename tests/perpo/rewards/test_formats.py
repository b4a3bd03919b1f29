"""Every family's boxes are read as a person would read them, in linear time."""

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpo.data.record import ListRecord
from perpo.rewards.formats import FORMATS, MAX_BOXES, Box, parse_box, parse_boxes, read_boxes, write_boxes
from perpo.rewards.grounding import iou_reward
from perpo.rewards.scoring import Tally, score_record

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


def test_a_box_over_the_edge_by_rounding_is_clipped_in_every_scale() -> None:
    assert parse_boxes("[-0.01, 0.25, 1.01, 1.0]") == [(0.0, 0.25, 1.0, 1.0)]
    assert parse_boxes("[-1, 250, 1001, 1000]", "internvl") == [(0.0, 0.25, 1.0, 1.0)]
    assert parse_boxes("[-1, 180, 1281, 721]", "qwen2.5-vl", SIZE) == [(0.0, 0.25, 1.0, 1.0)]


@pytest.mark.parametrize(
    ("name", "text", "looks_like"),
    [
        ("llava", "[0, 0, 560, 780]", "thousandths or pixels"),
        ("llava", "[0, 0, 1, 2]", "thousandths or pixels"),
        ("llava", "[77, 163, 1358, 374]", "pixels"),
        ("llava", "[0.2, 0.2, 0.5, 1.2]", "thousandths or pixels"),
        ("llava", "[-0.5, 0.25, 0.5, 1]", "coordinates outside the image"),
        ("llava-pad", "[0, 0, 560, 780]", "thousandths or pixels"),
        ("internvl", "[0.12, 0.34, 0.56, 0.78]", "fractions of the image"),
        ("internvl", "[-50, 250, 800, 900]", "coordinates outside the image"),
        ("internvl", "[50, 250, 1500, 900]", "pixels"),
        ("internvl", "[50, 250, 1e999, 900]", "pixels"),
        ("qwen3-vl", '{"bbox_2d": [77, 163, 1358, 374]}', "pixels"),
        ("qwen2-vl", "(77,163),(1358,374)", "pixels"),
        ("qwen2.5-vl", '{"bbox_2d": [120, 340, 560, 780]}', "thousandths"),
        ("qwen2.5-vl", '{"bbox_2d": [120, 340, 1560, 780]}', "pixels of a larger image"),
        ("qwen2.5-vl", "[0.12, 0.34, 0.56, 0.78]", "fractions of the image"),
        ("paligemma", "<loc0100><loc0100><loc1500><loc0300>", "pixels"),
    ],
)
def test_a_box_in_another_scale_is_unreadable_and_the_tally_says_which(name: str, text: str, looks_like: str) -> None:
    assert parse_boxes(text, name, SIZE) == []
    tally = Tally()
    record = ListRecord("a", None, "Where?", TRUTH, responses=(text,))
    assert score_record(record, f"grounding/{name}", tally, {"image_size": SIZE}).rewards == (0.0,)
    assert tally.summary() == f"1 of 1 answers could not be read (100.0%): 1 {looks_like}, by their coordinates"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen3-vl", '{"bbox_2d": [120，340，560，780]}'),
        ("qwen3-vl", "［120，340，560，780］"),
        ("qwen3-vl", "｛＂ｂｂｏｘ＿２ｄ＂：［１２０，３４０，５６０，７８０］｝"),
        ("qwen3-vl", "{“bbox_2d”: 【120、340、560、780】}"),
        ("qwen3-vl", "[[120, 340], [560, 780]]"),
        ("qwen2.5-vl", "[[153.6, 244.8], [716.8, 561.6]]"),
        ("qwen2-vl", "（120，340），（560，780）"),
        ("internvl", "<box>[[120, 340], [560, 780]]</box>"),
        ("llava", "［0.12，0.34，0.56，0.78］"),
        ("llava", "[[0.12, 0.34], [0.56, 0.78]]"),
        ("paligemma", "＜loc0348＞＜loc0123＞＜loc0799＞＜loc0573＞"),
    ],
)
def test_full_width_marks_and_bare_nested_corners_are_read(name: str, text: str) -> None:
    (box,) = parse_boxes(text, name, SIZE)
    assert box == pytest.approx(TRUTH, abs=1 / 1024)


def test_the_corners_of_a_polygon_are_no_box() -> None:
    assert parse_boxes("[[120, 340], [560, 340], [560, 780], [120, 780]]", "qwen3-vl") == []


def test_what_is_written_is_counted_whether_or_not_it_can_be_read() -> None:
    reading = read_boxes("[0.1, 0.2, 0.3, 0.4] [0.3, 0.2, 0.3, 0.4] [12, 34, 56, 78]")
    assert reading.boxes == [(0.1, 0.2, 0.3, 0.4)]
    assert (reading.n_written, reading.other_scale) == (3, "thousandths or pixels")


@given(boxes(), st.text("abc .,:-\n"), st.text("abc .,:-\n"))
def test_a_box_is_found_among_any_words(box: Box, before: str, after: str) -> None:
    x1, y1, x2, y2 = box
    assert parse_box(f"{before}[{x1}, {y1},{x2} ,  {y2}]{after}") == pytest.approx((x1, y1, x2, y2))


@given(boxes())
def test_swapped_corners_name_the_same_box(box: Box) -> None:
    x1, y1, x2, y2 = box
    assert parse_box(f"[{x2}, {y1}, {x1}, {y2}]") == parse_box(f"[{x1}, {y2}, {x2}, {y1}]") == (x1, y1, x2, y2)


@given(*[st.one_of(st.floats(-1e6, 1e6), st.floats(-0.02, 1.02))] * 4)
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
    lambda n: "[[1,1]," * (n // 7),
    lambda n: "[[1,1]" + " " * n,
    lambda n: "，" * n,
    lambda n: "\u0301\u0327" * (n // 2),
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_reading_is_linear_in_the_answer(hostile) -> None:
    def seconds(length: int) -> float:
        text = hostile(length)
        start = time.process_time()
        for name in FORMATS:
            parse_boxes(text, name, SIZE)
        return time.process_time() - start

    seconds(1000)
    assert seconds(200_000) < 12 * seconds(50_000) + 0.2  # linear: 4 times; quadratic: 16 times, and minutes


def test_a_model_that_repeats_itself_is_read_only_so_far() -> None:
    assert len(parse_boxes("[0.1, 0.2, 0.3, 0.4]" * (2 * MAX_BOXES))) == MAX_BOXES
