"""Numbers are found where answers state them, and wrong counts still differ in reward."""

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpo.rewards.counting import (
    closeness,
    counting_reward,
    exact_match_reward,
    numeric_reward,
)
from perpo.rewards.numerals import read_count, read_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3", 3),
        ("There are 3 dogs.", 3),
        ("2 on the left and 3 on the right, so 5.", 5),
        ("1,234 people", 1234),
        ("12,345,678.5", 12345678.5),
        ("about -2.5e3°", -2500),
        ("−4", -4),
        (".5", 0.5),
        ("$19.99", 19.99),
        ("2-3", 3),
        ("1 000", 1000),
        ("1\u202f234\u202f567.5 people", 1234567.5),
        ("1'000", 1000),
        ("12 3456", 3456),
        ("3 million", 3e6),
        ("2 dozen eggs", 24),
        ("three", 3),
        ("two hundred", 200),
        ("one hundred", 100),
        ("A hundred!", 100),
        ("two hundred and five", 205),
        ("one hundred twenty-three thousand four hundred and fifty-six", 123456),
        ("twelve hundred", 1200),
        ("a dozen", 12),
        ("one, two, three", 3),
        ("one two three", 3),
        ("between ten and twenty", 20),
        ("two and three", 3),
        ("<|begin_of_box|>3<|end_of_box|>", 3),
        ("数量为３", 3),
        ("温度是25℃", 25),
        ("气温-5℃", -5),
        ("有2只狗，3只猫", 3),
        ("有2只狗,3只猫", 3),
        ("1、2、3只", 3),
        ("３．５米", 3.5),
        ("１，２３４人", 1234),
        ("3万5千人", 35_000),
        ("1亿2000万", 120_000_000),
        ("1.5億円", 150_000_000),
        ("개가 3마리 있습니다", 3),
        ("มีสุนัข3ตัว", 3),
        ("图中有三只狗。", 3),
        ("两只猫", 2),
        ("二十三", 23),
        ("二百零五个", 205),
        ("三百五十个", 350),
        ("三百五", 350),
        ("一万亿", 1e12),
        ("十几只", None),
        ("两三只", None),
        ("第3只", None),
        ("这是一张图片", None),
        ("25km", 25),
        ("10²", None),
        ("five million two hundred thousand", 5_200_000),
        ("two hundred three hundred", None),
        ("dozens of birds", None),
        ("half a dozen", None),
        ("two and a half", None),
        ("Twenty-one birds", 21),
        ("sixteen", 16),
        ("seventy seven", 77),
        ("one of them, then eleven", 11),
        ("3 dogs, one of which is black", 3),  # digits before words
        ("٣", 3),
        ("", None),
        ("many", None),
        ("someone", None),
        ("B2", None),
        ("1.2.3", None),
        ("3,5", None),
        ("1,2345", None),
        ("1e999", None),
        ("9" * 400, None),
        ("²", None),
    ],
)
def test_the_number_that_a_text_states(text: str, number: float | None) -> None:
    assert read_number(text) == number


COUNTS = {"5.0": 5, "no dogs": 0, "None.": 0, "No, there are 3": 3}
COUNTS |= {"No one": 0, "No one is there.": 0, "no-one but two dogs": 2}
COUNTS |= {"图中有3只狗。": 3, "没有": 0, "图中没有狗。": 0, "There aren't any dogs.": 0}


@pytest.mark.parametrize(("text", "count"), COUNTS.items())
def test_counts(text: str, count: int) -> None:
    assert read_count(text) == count


@pytest.mark.parametrize(
    "text", ["-2", "2.5", "nobody knows 1e999", "no, hundreds", "many", "", "no idea", "No problem!"]
)
def test_a_count_is_whole_and_not_negative(text: str) -> None:
    assert read_count(text) is None


@given(st.floats(-1e200, 1e200), st.sampled_from(["", "it is ", "roughly, "]), st.sampled_from(["", ".", " cm", "!"]))
def test_every_number_is_read_back(number: float, before: str, after: str) -> None:
    assert read_number(f"{before}{number!r}{after}") == number


@given(st.integers(0, 10**15))
def test_thousands_may_be_separated(number: int) -> None:
    assert read_count(f"{number:,}") == number


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_closeness_is_symmetric_in_0_and_1_and_1_only_for_equals(a: float, b: float) -> None:
    value = closeness(a, b)
    assert value == closeness(b, a)
    assert 0 <= value <= 1
    assert value == 1 if a == b else value < 1 or math.isclose(a, b)


@given(st.integers(1, 50), st.integers(1, 50))
def test_a_count_nearer_the_truth_on_the_same_side_is_worth_more(truth: int, step: int) -> None:
    above = counting_reward(["?"] * 3, [str(truth), str(truth + step), str(truth + step + 1)], answer=[truth] * 3)
    assert above[0] == 1 > above[1] > above[2] > 0


def test_counting_and_numeric_rewards_by_hand() -> None:
    answers = ["8", "two", "-8", "no idea", [{"role": "assistant", "content": "I count 4"}]]
    assert counting_reward(["?"] * 5, answers, answer=[4, "4", 4.0, 4, "four"]) == [0.5, 0.5, 0, 0, 1]
    assert numeric_reward(["?"] * 3, ["-8", "0.5 m", "none"], answer=[-4, "0.25", 0]) == [0.5, 0.5, 0]


def test_exact_match_ignores_case_space_and_outer_punctuation_and_takes_several_truths() -> None:
    completions = ["  The  Cat. ", "cat!", "a cat", "7", "?", "<|begin_of_box|>cat<|end_of_box|>"]
    rewards = exact_match_reward(["?"] * 6, completions, answer=["the cat", ["dog", "CAT"], "cat", 7, "?", "cat"])
    assert rewards == [1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("reward", "answer", "message"),
    [
        (counting_reward, "many", "finite number"),
        (counting_reward, 2.5, "whole number of at least 0"),
        (counting_reward, -1, "whole number of at least 0"),
        (counting_reward, None, "finite number"),
        (numeric_reward, math.nan, "finite number"),
        (numeric_reward, math.inf, "finite number"),
        (numeric_reward, [1], "finite number"),
        (exact_match_reward, "", "non-empty list"),
        (exact_match_reward, [], "non-empty list"),
        (exact_match_reward, {"a": 1}, "non-empty list"),
    ],
)
def test_a_broken_ground_truth_is_an_error_that_shows_it(reward, answer: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"answer must be .*{message}"):
        reward(["?"], ["3"], answer=[answer])


@given(st.text())
def test_no_text_whatever_raises(text: str) -> None:
    assert read_number(text) is None or math.isfinite(read_number(text))
    assert read_count(text) is None or read_count(text) >= 0


REPEATED = ["1", "1,", "111,", "1.", "-", "1e", "twenty ", "twenty-", "no ", " ", ",111", "one"]
REPEATED += ["one ", "hundred ", "a hundred and ", "1 ", "1 111", "1万", "一", "一万", "３，", "没有"]
REPEATED += ["is not ", "no image ", "cannot ", "image is ", "no way "]


@pytest.mark.parametrize("unit", REPEATED)
def test_reading_is_linear_in_the_answer(unit: str) -> None:
    start = time.perf_counter()
    read_count(unit * (300_000 // len(unit)) + "x")
    assert time.perf_counter() - start < 2
