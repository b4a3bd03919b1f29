"""BLEU (sacrebleu) of a corpus from sums over its sentences, and METEOR (nltk) where its data is at hand.

Corpus BLEU is not a mean of sentence scores. With c_n matching and t_n written n-grams, h written and r true words, all
summed over the corpus,

    BLEU = 100 · exp(min(0, 1 − r/h)) · (Π_{n ≤ 4} p_n)^¼,    p_n = c_n / t_n

and the z-th zero c_n counts as 2^−z (sacrebleu's default smoothing, "exp"). sacrebleu tokenizes and counts; the formula
is written here once more only because the bootstrap takes it of thousands of resampled sums at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from perpo.evaluation.bootstrap import Array

ORDER = 4  # longest n-gram


def bleu_terms(texts: Sequence[str], truths: Sequence[str], tokenize: str = "13a") -> Array:  # [N, 2 · ORDER + 2]
    """Of every sentence: matching n-grams (n = 1..4), written n-grams (n = 1..4), written words, true words."""
    bleu = _bleu(tokenize)
    rows = []
    for text, truth in zip(texts, truths, strict=True):
        score = bleu.sentence_score(text, [truth])
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    return np.array(rows, dtype=np.float64).reshape(-1, 2 * ORDER + 2)


def bleu_from_sums(sums: Array) -> Array:  # [..., 2 · ORDER + 2] -> [...]
    """Corpus BLEU in [0, 100]; 0 where nothing matches or no 4-gram was written; NaN without any true word."""
    matching, written = sums[..., :ORDER], sums[..., ORDER : 2 * ORDER]
    h, r = sums[..., -2], sums[..., -1]
    zero_so_far = np.cumsum(matching == 0, axis=-1)
    smoothed = np.where(matching == 0, 2.0**-zero_so_far, matching)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_precisions = np.log(smoothed / written).sum(-1) / ORDER
        brevity = np.minimum(0.0, 1 - r / h)
        scores = 100 * np.exp(brevity + log_precisions)
    defined = matching.any(-1) & (written > 0).all(-1)
    return np.where(r > 0, np.where(defined, scores, 0.0), np.nan)


def check_tokenizer(tokenize: str) -> None:
    """
    Raises:
        ValueError: sacrebleu has no such tokenizer, or cannot load it.
    """
    try:
        _bleu(tokenize)
    except ImportError:
        raise
    except Exception as error:  # sacrebleu raises bare exceptions, and RuntimeError for missing extras
        raise ValueError(f"bleu_tokenize: sacrebleu has no tokenizer {tokenize!r} at hand: {error}") from error


@functools.cache
def why_no_meteor() -> str | None:
    """What is missing for METEOR; None where nothing is. Nothing is downloaded."""
    try:
        from nltk.corpus import wordnet
    except ImportError:
        return "nltk is not installed: pip install nltk"
    try:
        wordnet.ensure_loaded()
    except LookupError:
        return "nltk has no WordNet on this machine: python -m nltk.downloader wordnet"
    return None


def meteor(text: str, truth: str) -> float:
    """METEOR in [0, 1] over words split at white space, as nltk computes it.

    nltk looks for synonyms of what stemming has left, so it misses a synonym whose stem is not a word (automobil).
    """
    from nltk.translate.meteor_score import single_meteor_score

    return float(single_meteor_score(truth.split(), text.split()))


@functools.cache
def _bleu(tokenize: str):  # type: ignore[no-untyped-def]  # sacrebleu.BLEU; imported where it is needed
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise ImportError("BLEU needs sacrebleu: pip install 'perpo[eval]'") from error
    return BLEU(tokenize=tokenize, effective_order=True)
