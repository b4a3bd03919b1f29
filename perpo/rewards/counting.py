"""Counts, values and exact answers.

    closeness(a, b) = max(0, 1 − |a − b| / max(|a|, |b|)),   1 where a = b       symmetric, in [0, 1]

For two counts it is the smaller over the larger: it falls with every step away from the truth and reaches 0 only for
"none", so that lists of wrong answers still hold preferences.
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from numbers import Real
from typing import Any

from perpo.rewards.completions import score_each

_UNITS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TEENS = ["ten", "eleven", "twelve"] + [
    stem + "teen" for stem in ("thir", "four", "fif", "six", "seven", "eigh", "nine")
]
_TENS = {
    stem + "ty": 10 * i for i, stem in enumerate(("twen", "thir", "for", "fif", "six", "seven", "eigh", "nine"), 2)
}
_WORDS = {word: i for i, word in enumerate(["zero", *_UNITS, *_TEENS])}
_NOTHING = {"no", "none", "nothing", "nobody"}

# Digits that are part of a word or of something longer ("B2", "1.2.3", "3,5") are no number; "2-3" ends in 3, not −3.
_DIGITS = re.compile(
    r"(?<![\w.,])[-−+]?+(?:\d{1,3}+(?:,\d{3}+)++(?:\.\d++)?+|\d++(?:\.\d++)?+|\.\d++)(?:[eE][-+]?+\d{1,3}+)?+(?!\w|[.,]\d)"
)
_NAMED = re.compile(
    rf"\b(?:(?P<tens>{'|'.join(_TENS)})(?:[\s-](?P<unit>{'|'.join(_UNITS)})\b)?|(?P<word>{'|'.join(_WORDS)}))\b"
)


def read_number(text: str) -> float | None:
    """The number that a text states: the last one in digits; without digits the last number word (to ninety-nine).

    The last, because answers that reason end with their result. "1,234" is one number. None where there is none, or
    where it overflows.
    """
    digits = _DIGITS.findall(text)
    if digits:
        number = float(digits[-1].replace(",", "").replace("−", "-"))
        return number if math.isfinite(number) else None
    value: float | None = None
    for named in _NAMED.finditer(text.lower()):
        tens, unit, word = named.group("tens", "unit", "word")
        value = float(_WORDS[word] if word else _TENS[tens] + _WORDS.get(unit, 0))
    return value


def read_count(text: str) -> int | None:
    """The whole number ≥ 0 that a text states, as `read_number`; "no …" and "none" without any number are 0."""
    value = read_number(text)
    if value is not None:
        return int(value) if value >= 0 and value == int(value) else None
    says_none = _NOTHING.intersection(re.findall(r"[a-z]++", text.lower()))
    return 0 if says_none and not _DIGITS.search(text) else None


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
    words = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return words.strip(" .,;:!?\"'`*()[]") or words


def _true_number(answer: Any) -> float:
    if isinstance(answer, str):
        number = read_number(answer)
    else:
        number = float(answer) if isinstance(answer, Real) and math.isfinite(answer) else None
    if number is None:
        raise ValueError(f"answer must be a finite number or a text that states one, got {answer!r:.200}")
    return number
