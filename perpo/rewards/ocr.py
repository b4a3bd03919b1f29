"""Reading text: how near an answer comes to what is written in the image.

    similarity = 1 − Levenshtein(answer, truth) / max(|answer|, |truth|)       in [0, 1], 1 for equal texts
    precision = |A ∩ T| / |A|,  recall = |A ∩ T| / |T|,  F1 = 2 |A ∩ T| / (|A| + |T|)     A, T multisets of words

Multisets rather than sets of words: an answer that repeats itself must not score like one that does not. Both sides
are compared in Unicode's composed form with every run of white space as one space; letter case and punctuation count.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from rapidfuzz.distance import Levenshtein

from perpo.rewards.completions import composed, score_each, without_marks

# Chinese characters and kana are words by themselves: their scripts put no spaces between words.
_CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}]++")


class WordScores(NamedTuple):
    precision: float
    recall: float
    f1: float


def normalise(text: str) -> str:
    """Composed Unicode (NFC), white space as single spaces, none at the ends, without a model's own marks."""
    return " ".join(composed(without_marks(text), "NFC").split())


def edit_similarity(text: str, truth: str) -> float:
    """1 − edit distance / length of the longer text, over characters, in [0, 1]; two empty texts are equal."""
    return float(Levenshtein.normalized_similarity(normalise(text), normalise(truth)))


def word_scores(text: str, truth: str) -> WordScores:
    """Precision, recall and F1 over the two multisets of words; all 1 where both are empty, all 0 where one is."""
    words, true_words = (Counter(_WORD.findall(normalise(side))) for side in (text, truth))
    n, n_true = words.total(), true_words.total()
    if n == n_true == 0:
        return WordScores(1.0, 1.0, 1.0)
    shared = (words & true_words).total()
    return WordScores(shared / max(n, 1), shared / max(n_true, 1), 2 * shared / (n + n_true))


def ocr_reward(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **columns: Any
) -> list[float | None]:
    """Edit similarity of every completion with its answer (the true text), as a reward function of TRL's GRPO.

    Raises:
        ValueError: the lengths differ, or an answer is not a text.
    """
    return score_each(completions, lambda text, truth: edit_similarity(text, _truth(truth)), answer=answer)


def word_f1_reward(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **columns: Any
) -> list[float | None]:
    """F1 over words of every completion with its answer; otherwise as `ocr_reward`."""
    return score_each(completions, lambda text, truth: word_scores(text, _truth(truth)).f1, answer=answer)


def _truth(answer: Any) -> str:
    if not isinstance(answer, str):
        raise ValueError(f"answer must be the true text, got {answer!r:.200}")
    return answer
