"""Counts, values and exact answers.

    closeness(a, b) = max(0, 1 − |a − b| / max(|a|, |b|)),   1 where a = b       symmetric, in [0, 1]

For two counts it is the smaller over the larger: it falls with every step away from the truth and reaches 0 only for
"none", so that lists of wrong answers still hold preferences.
"""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from perpo.rewards.completions import composed, score_each, without_marks
from perpo.rewards.numerals import read_count, read_number


def closeness(a: float, b: float) -> float:
    """max(0, 1 − |a − b| / max(|a|, |b|)); 1 where both are 0."""
    return 1.0 if a == b else max(0.0, 1 - abs(a - b) / max(abs(a), abs(b)))


def counting_reward(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    """Closeness of the count in every completion to its answer (a number or a text stating one); 0 where it has none.

    Raises:
        ValueError: the lengths differ, or an answer is not a whole number ≥ 0.
    """

    def score(text: str, truth: Any) -> float:
        true_count = _true_number(truth)
        if true_count < 0 or true_count != int(true_count):
            raise ValueError(f"answer must be a count, a whole number of at least 0, got {truth!r:.200}")
        count = read_count(text)
        return 0.0 if count is None else closeness(count, true_count)

    return score_each(completions, score, answer=answer)


def numeric_reward(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    """Closeness of the number in every completion to its answer (a number or a text stating one); 0 where it has none.

    Raises:
        ValueError: the lengths differ, or an answer is not a finite number.
    """

    def score(text: str, truth: Any) -> float:
        true_number = _true_number(truth)
        number = read_number(text)
        return 0.0 if number is None else closeness(number, true_number)

    return score_each(completions, score, answer=answer)


def exact_match_reward(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **columns: Any
) -> list[float | None]:
    """1 where a completion is its answer, else 0: letter case, white space and punctuation at the ends do not count.

    An answer may be a list of accepted answers.

    Raises:
        ValueError: the lengths differ, or an answer is empty.
    """

    def score(text: str, truth: Any) -> float:
        accepted = truth if isinstance(truth, list | tuple) else [truth]
        if not accepted or any(not isinstance(one, str | int | float) or not _bare(str(one)) for one in accepted):
            raise ValueError(f"answer must be a text, a number or a non-empty list of them, got {truth!r:.200}")
        return float(_bare(text) in {_bare(str(one)) for one in accepted})

    return score_each(completions, score, answer=answer)


def _bare(text: str) -> str:
    words = " ".join(composed(without_marks(text), "NFKC").casefold().split())
    return words.strip(" .,;:!?\"'`*()[]") or words


def finite(value: Any) -> float | None:
    """A number as a finite float; None for anything else, also for an integer that no float can hold."""
    try:
        number = float(value) if isinstance(value, Real) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _true_number(answer: Any) -> float:
    number = read_number(answer) if isinstance(answer, str) else finite(answer)
    if number is None:
        raise ValueError(f"answer must be a finite number or a text that states one, got {answer!r:.200}")
    return number
