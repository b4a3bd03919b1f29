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

from perpo.rewards.completions import score_each, without_marks

_UNITS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TEENS = ["ten", "eleven", "twelve"] + [
    stem + "teen" for stem in ("thir", "four", "fif", "six", "seven", "eigh", "nine")
]
_TENS = {
    stem + "ty": 10 * i for i, stem in enumerate(("twen", "thir", "for", "fif", "six", "seven", "eigh", "nine"), 2)
}
_WORDS = {word: i for i, word in enumerate(["zero", *_UNITS, *_TEENS])} | _TENS
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_VAGUE = re.compile(rf"\b(?:(?:{'|'.join(_SCALES)})s|half an?|and a half)\b")
_NOTHING = {"no", "none", "nothing", "nobody"}

# Digits that are part of a word or of something longer ("B2", "1.2.3", "3,5") are no number; "2-3" ends in 3, not −3.
# Thousands may be set apart by commas, apostrophes or spaces; what looks so and is not ("12 3456") is read as before.
_DIGITS = re.compile(
    r"(?<![\w.,])[-−+]?+(?:\d{1,3}+(?:(?:,\d{3})++|(?:['’ \u00a0\u2009\u202f]\d{3}(?!\d))++)(?:\.\d++)?+"
    r"|\d++(?:\.\d++)?+|\.\d++)(?:[eE][-+]?+\d{1,3}+)?+(?!\w|[.,]\d)"
)
_SCALED = re.compile(rf"[\s-]({'|'.join(_SCALES)})\b")
_NUMBER_WORD = rf"(?:{'|'.join([*_WORDS, *_SCALES])})\b"
_NAMED = re.compile(rf"\b(?:an?\s+(?={'|'.join(_SCALES)}))?+{_NUMBER_WORD}(?:(?:\s+and\s+|[\s-]+){_NUMBER_WORD})*+")


def read_number(text: str) -> float | None:
    """The number that a text states: the last one in digits; without digits the last one in words.

    The last, because answers that reason end with their result. "1,234", "1 234", "3 million" and "two hundred and
    five" are one number each. None where there is none, where it overflows, or where words say it roughly ("dozens",
    "two and a half").
    """
    text = without_marks(text)
    digits = None
    for digits in _DIGITS.finditer(text):  # noqa: B007 - the last one
        pass
    if digits is not None:
        scale = _SCALED.match(text.lower(), digits.end())
        number = float(re.sub(r"[,'’\s]", "", digits[0]).replace("−", "-")) * (_SCALES[scale[1]] if scale else 1)
        return number if math.isfinite(number) else None
    words = re.sub(r"\bno[\s-]one\b", "nobody", text.lower())
    if _VAGUE.search(words):
        return None
    value: float | None = None
    for named in _NAMED.finditer(words):
        value = _spelt(re.findall(r"[a-z]++", named[0]))
    return value


def _spelt(words: Sequence[str]) -> float | None:
    """The last number of a run of number words: 205 of two hundred and five, 3 of one, two, three."""
    total, least = 0, math.inf  # of thousands and more, and the smallest of those scales
    part, room = 0, 0  # what is below thousands, and what may be added to it: less than that
    for word in words:
        scale = _SCALES.get(word, 0)
        if scale > 100:
            total, least, part, room = total + max(part, 1) * scale, min(least, scale), 0, 1000
            if scale > least:
                return None
        elif scale:
            if part >= 100:
                return None
            part, room = max(part, 1) * scale, scale
        elif word in _WORDS:
            value = _WORDS[word]
            if not 0 < value < room:  # a number of its own
                total, least, part = 0, math.inf, 0
            part += value
            room = 10 if value >= 20 else 0
    return float(total + part)


def read_count(text: str) -> int | None:
    """The whole number ≥ 0 that a text states, as `read_number`; "no …" and "none" without any number are 0."""
    value = read_number(text)
    if value is not None:
        return int(value) if value >= 0 and value == int(value) else None
    says_none = _NOTHING.intersection(re.findall(r"[a-z]++", without_marks(text).lower()))
    return 0 if says_none and not (_VAGUE.search(text.lower()) or _DIGITS.search(text)) else None


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
    words = " ".join(unicodedata.normalize("NFKC", without_marks(text)).casefold().split())
    return words.strip(" .,;:!?\"'`*()[]") or words


def _true_number(answer: Any) -> float:
    if isinstance(answer, str):
        number = read_number(answer)
    else:
        number = float(answer) if isinstance(answer, Real) and math.isfinite(answer) else None
    if number is None:
        raise ValueError(f"answer must be a finite number or a text that states one, got {answer!r:.200}")
    return number
