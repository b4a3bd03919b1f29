"""Text rewards agree with their definitions, and count what a reader would count."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpo.rewards.ocr import edit_similarity, ocr_reward, word_f1_reward, word_scores

words = st.lists(st.sampled_from(["the", "cat", "sat", "on", "mat"]), max_size=7).map(" ".join)


def distance(a: str, b: str) -> int:
    """Levenshtein's recurrence as it is defined."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        above, row = row, [i]
        for j, right in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (left != right)))
    return row[-1]


@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_similarity_is_one_less_the_edit_distance_over_the_longer_length(a: str, b: str) -> None:
    expected = 1 - distance(a, b) / max(len(a), len(b), 1)
    assert edit_similarity(a, b) == pytest.approx(expected)


@given(st.text(), st.text())
def test_similarity_is_symmetric_in_0_and_1_and_1_for_itself(a: str, b: str) -> None:
    assert edit_similarity(a, b) == edit_similarity(b, a)
    assert 0 <= edit_similarity(a, b) <= 1
    assert edit_similarity(a, a) == 1


@given(words, words)
def test_precision_and_recall_trade_places_with_the_texts_and_f1_is_their_harmonic_mean(a: str, b: str) -> None:
    here, there = word_scores(a, b), word_scores(b, a)
    assert (here.precision, here.recall, here.f1) == (there.recall, there.precision, there.f1)
    if here.precision + here.recall:
        assert here.f1 == pytest.approx(2 * here.precision * here.recall / (here.precision + here.recall))


def test_word_scores_by_hand() -> None:
    assert word_scores("the cat the cat", "the cat sat") == (0.5, pytest.approx(2 / 3), pytest.approx(4 / 7))
    assert word_scores("", "") == (1, 1, 1)
    assert word_scores("", "cat") == word_scores("cat", "") == (0, 0, 0)
    assert word_scores("高い山 ok", "高い山") == (0.75, 1, pytest.approx(6 / 7))  # every character a word


def test_repeating_the_answer_is_punished() -> None:
    assert word_scores("cat " * 50, "cat").f1 < 0.1
    assert edit_similarity("cat " * 50, "cat") < 0.1


def test_white_space_and_unicode_composition_do_not_count_but_case_does() -> None:
    assert edit_similarity(" two\n\nlines\t", "two lines") == 1
    assert edit_similarity("cafe\u0301", "caf\u00e9") == 1
    assert edit_similarity("CAT", "cat") == 0


def test_rewards_read_texts_and_message_lists() -> None:
    completions = ["7 3 1", [{"role": "assistant", "content": "7 3"}]]
    assert ocr_reward(["?"] * 2, completions, answer=["7 3 1"] * 2, id=[1, 2]) == [1, pytest.approx(3 / 5)]
    assert word_f1_reward(["?"] * 2, completions, answer=["7 3 1"] * 2) == [1, pytest.approx(4 / 5)]


@pytest.mark.parametrize("reward", [ocr_reward, word_f1_reward])
def test_a_truth_that_is_no_text_is_an_error(reward) -> None:
    with pytest.raises(ValueError, match="answer must be the true text, got 731"):
        reward(["?"], ["731"], answer=[731])


def test_a_huge_answer_takes_a_moment() -> None:
    start = time.perf_counter()
    ocr_reward(["?"] * 3, ["a" * 1_000_000, "ab" * 500_000, "a " * 500_000], answer=["a line of text " * 20] * 3)
    word_f1_reward(["?"] * 3, ["a" * 1_000_000, "字" * 1_000_000, "a " * 500_000], answer=["a line of text"] * 3)
    assert time.perf_counter() - start < 5
