"""Figures are those one computes by hand or in the plainest way, intervals cover what they claim to."""

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU

import perpo.evaluation.metrics
from perpo.data.record import ListRecord
from perpo.evaluation.answer_store import Answers
from perpo.evaluation.bootstrap import ENOUGH, draw_counts, interval, resampled_sums
from perpo.evaluation.evaluate import _seen_differently
from perpo.evaluation.figures import ModelAnswers, expected_best, figures
from perpo.evaluation.metrics import Judged, judge, metrics_of
from perpo.evaluation.text_scores import bleu_from_sums, bleu_terms, check_tokenizer, why_no_meteor
from perpo.rewards.scoring import Tally, UnreadableAnswers

from ..evaluating import evaluate_made_up

WORDS = ("the", "cat", "sat", "on", "a", "mat", "dog")


def answers_to(task: str, pairs: list[tuple[Any, str]]) -> list[Judged]:
    """(truth, text) as judged answers."""
    tally = Tally()
    return [
        judge(ListRecord(f"r{i}", None, "?", truth, task), [text], task, (100, 50), tally)[0]
        for i, (truth, text) in enumerate(pairs)
    ]


def value_of(name: str, task: str, pairs: list[tuple[Any, str]]) -> float:
    metric = next(m for m in metrics_of(task)[0] if m.name == name)
    return float(metric.value(metric.terms(answers_to(task, pairs)).sum(0)))


def sentence(generator: random.Random, least: int = 0) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(least, 8)))


# ---------------------------------------------------------------------------------------------------------- metrics


def test_grounding_by_hand() -> None:
    truth = [0.0, 0.0, 1.0, 1.0]
    pairs = [(truth, "[0, 0, 1, 1]"), (truth, "[0, 0, 0.5, 1]"), (truth, "[0, 0, 0.75, 1]"), (truth, "nowhere")]
    assert value_of("mean_iou", "grounding", pairs) == pytest.approx((1 + 0.5 + 0.75 + 0) / 4)
    assert value_of("ap50", "grounding", pairs) == 2 / 4  # more than 0.5, so 0.5 itself is not enough
    assert value_of("unreadable", "grounding", pairs) == 1 / 4


def test_boxes_in_pixels_use_the_size_that_the_model_saw() -> None:
    pairs = [([0.1, 0.2, 0.5, 0.6], '{"bbox_2d": [10, 10, 50, 30]}')]  # of 100 × 50
    assert value_of("mean_iou", "grounding/qwen2.5-vl", pairs) == pytest.approx(1)


def test_giou_as_reward_leaves_the_metrics_of_iou() -> None:
    pairs = [([0.0, 0.0, 0.5, 1.0], "[0.5, 0, 1, 1]")]
    assert value_of("mean_iou", "grounding-giou", pairs) == 0
    assert value_of("reward", "grounding-giou", pairs) == pytest.approx(0.5)


def test_ocr_by_hand() -> None:
    pairs = [("kitten", "sitting"), ("a b c", "a b d d")]
    assert value_of("edit_distance", "ocr", pairs) == pytest.approx((3 / 7 + 3 / 7) / 2)
    assert value_of("precision", "ocr", pairs) == pytest.approx((0 + 2 / 4) / 2)
    assert value_of("recall", "ocr", pairs) == pytest.approx((0 + 2 / 3) / 2)
    assert value_of("f1", "ocr", pairs) == pytest.approx((0 + 4 / 7) / 2)


@pytest.mark.parametrize(
    ("task", "pairs", "exact"),
    [
        ("counting", [(3, "three"), (4, "5"), ("2", "I see 2."), (1, "?")], 2 / 4),
        ("numeric", [(0.5, "0.50"), (2, "3")], 1 / 2),
        ("exact", [("Paris", " paris. "), (["A", "B"], "b"), ("x", "y")], 2 / 3),
    ],
)
def test_exact_answers_by_hand(task: str, pairs: list[tuple[Any, str]], exact: float) -> None:
    assert value_of("exact", task, pairs) == pytest.approx(exact)


def test_closeness_by_hand() -> None:
    assert value_of("closeness", "counting", [(4, "5"), (2, "1")]) == pytest.approx((4 / 5 + 1 / 2) / 2)


def test_bleu_of_summed_terms_is_sacrebleus_corpus_bleu() -> None:
    generator = random.Random(0)
    for n in (1, 2, 5, 20) * 10:
        texts, truths = [sentence(generator) for _ in range(n)], [sentence(generator, 1) for _ in range(n)]
        ours = float(bleu_from_sums(bleu_terms(texts, truths).sum(0)))
        assert ours == pytest.approx(BLEU().corpus_score(texts, [truths]).score, abs=1e-9), (texts, truths)
    same = ["the cat sat on a mat"]
    assert float(bleu_from_sums(bleu_terms(same, same).sum(0))) == pytest.approx(100)


def test_an_unknown_bleu_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="bleu_tokenize: sacrebleu has no tokenizer 'none such'"):
        check_tokenizer("none such")


def test_meteor_is_measured_or_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, left_out = metrics_of("ocr")
    assert ("meteor" in {m.name for m in metrics}) == (why_no_meteor() is None)
    assert left_out == ({} if why_no_meteor() is None else {"METEOR": why_no_meteor()})
    monkeypatch.setattr(perpo.evaluation.metrics, "why_no_meteor", lambda: None)
    monkeypatch.setattr(perpo.evaluation.metrics, "meteor", lambda text, truth: 0.25 * (text == truth))
    assert value_of("meteor", "ocr", [("a", "a"), ("a", "b")]) == 0.125


# -------------------------------------------------------------------------------------------------------- bootstrap


def test_every_draw_is_of_as_many_records_and_repeats_with_its_seed() -> None:
    counts = np.concatenate(list(draw_counts(7, 300, seed=3)))
    assert counts.shape == (300, 7)
    assert (counts.sum(1) == 7).all()
    assert (counts == np.concatenate(list(draw_counts(7, 300, seed=3)))).all()
    assert not (counts == np.concatenate(list(draw_counts(7, 300, seed=4)))).all()
    assert counts.mean(0) == pytest.approx(np.ones(7), abs=0.25)


def test_blocks_do_not_change_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    terms = np.random.default_rng(0).normal(size=(11, 3))
    whole = resampled_sums(terms, 50, seed=1)
    monkeypatch.setattr("perpo.evaluation.bootstrap._BLOCK", 22)
    assert resampled_sums(terms, 50, seed=1) == pytest.approx(whole)


def test_resampled_bleu_is_bleu_of_the_resampled_texts() -> None:
    generator = random.Random(1)
    texts, truths = [sentence(generator) for _ in range(6)], [sentence(generator, 1) for _ in range(6)]
    ours = bleu_from_sums(resampled_sums(bleu_terms(texts, truths), 40, seed=0))
    for value, counts in zip(ours, np.concatenate(list(draw_counts(6, 40, seed=0))), strict=True):
        drawn = [i for i, count in enumerate(counts) for _ in range(int(count))]
        expected = BLEU().corpus_score([texts[i] for i in drawn], [[truths[i] for i in drawn]]).score
        assert value == pytest.approx(expected, abs=1e-9)


def test_intervals_cover_the_true_mean_as_often_as_they_claim() -> None:
    samples = np.random.default_rng(0).exponential(1.0, size=(120, 400))  # 400 experiments, the true mean is 1
    means = resampled_sums(samples, 600, seed=0) / 120
    for confidence in (0.8, 0.95):
        found = [interval(0.0, column, confidence) for column in means.T]
        covered = np.mean([one.low <= 1.0 <= one.high for one in found])
        assert abs(covered - confidence) < 3 * math.sqrt(confidence * (1 - confidence) / 400) + 0.015, covered


def test_too_few_records_have_no_interval() -> None:
    for n, n_seen in ((ENOUGH, ENOUGH), (ENOUGH - 1, ENOUGH - 1), (ENOUGH, ENOUGH - 1)):
        greedy = answers_to("exact", [("a", "a" if i % 3 else "b") for i in range(n)])
        blank = [None] * (n - n_seen) + greedy[n - n_seen :]
        given = ModelAnswers(greedy, blank, [[answer] for answer in greedy])
        metrics = [m for m in metrics_of("exact")[0] if m.name == "exact"]
        found = figures({"a": given, "b": given}, metrics, draws=100, confidence=0.95, seed=0)
        of_b = found.by_model["b"]["exact"]
        mean = sum(i % 3 > 0 for i in range(n)) / n
        for one in (of_b.greedy, of_b.best_of_n, found.best_of_k["b"][0]):
            assert one is not None
            assert one.value == pytest.approx(mean)
            assert math.isnan(one.low) == math.isnan(one.high) == (n < ENOUGH)
        for one in (of_b.with_image, of_b.blank, of_b.gap):
            assert one is not None
            assert math.isnan(one.low) == (n_seen < ENOUGH)
        over = of_b.over_first
        assert over is not None
        assert not over.excludes_zero
        assert over.words(2, "+") == ("(too few records)" if n < ENOUGH else "[+0.00, +0.00]")


def test_the_interval_of_a_mean_is_near_the_normal_one() -> None:
    sample = np.random.default_rng(1).normal(2.0, 3.0, size=(400, 1))
    found = interval(float(sample.mean()), resampled_sums(sample, 4000, 0)[:, 0] / 400)
    half = 1.96 * float(sample.std()) / math.sqrt(400)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.06)


def test_draws_without_a_value_are_left_out() -> None:
    draws = np.array([np.nan, 1.0, 2.0, 3.0])
    assert interval(2.0, draws, 0.5) == pytest.approx((2.0, 1.5, 2.5))
    assert math.isnan(interval(math.nan, draws).low)
    assert math.isnan(interval(1.0, np.array([np.nan])).high)


def test_no_record_or_no_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one record"):
        resampled_sums(np.zeros((0, 2)), 10, 0)
    with pytest.raises(ValueError, match="draws must be ≥ 1"):
        resampled_sums(np.zeros((3, 2)), 0, 0)


# ---------------------------------------------------------------------------------------------------------- figures


def test_expected_best_is_the_mean_over_all_subsets() -> None:
    rewards = np.random.default_rng(0).random((3, 5)).round(1)
    found = expected_best(rewards)
    for row, values in zip(rewards, found, strict=True):
        for k in range(1, 6):
            best = [max(subset) for subset in itertools.combinations(row, k)]
            assert values[k - 1] == pytest.approx(np.mean(best))


def test_paired_differences_see_the_same_records() -> None:
    truth = "[0, 0, 1, 1]"
    widths = np.random.default_rng(0).uniform(0.1, 0.9, 40)
    worse = answers_to("grounding", [(truth, f"[0, 0, {w}, 1]") for w in widths])
    better = answers_to("grounding", [(truth, f"[0, 0, {w + 0.05}, 1]") for w in widths])
    metrics = metrics_of("grounding")[0]
    answers = {"a": ModelAnswers(worse), "b": ModelAnswers(better), "twin": ModelAnswers(worse)}
    found = figures(answers, metrics, draws=200, confidence=0.95, seed=0).by_model
    assert found["a"]["mean_iou"].over_first is None
    assert found["twin"]["mean_iou"].over_first == (0, 0, 0)
    gain = found["b"]["mean_iou"].over_first
    assert gain is not None
    assert gain == pytest.approx((0.05, 0.05, 0.05))  # always the same gain: no spread at all, although
    assert found["b"]["mean_iou"].greedy.low < found["a"]["mean_iou"].greedy.high  # the two intervals overlap
    assert gain.excludes_zero


def test_the_gap_is_over_the_records_that_have_an_image() -> None:
    right, wrong = ("x", "x"), ("x", "y")
    greedy = answers_to("exact", [right, right, wrong, wrong])
    blank = answers_to("exact", [right, wrong, wrong])
    answers = {"a": ModelAnswers(greedy, [*blank, None])}
    found = figures(answers, metrics_of("exact")[0], draws=100, confidence=0.95, seed=0).by_model["a"]["exact"]
    assert (found.with_image and found.with_image.value) == pytest.approx(2 / 3)
    assert (found.blank and found.blank.value) == pytest.approx(1 / 3)
    assert (found.gap and found.gap.value) == pytest.approx(1 / 3)
    assert found.greedy.value == 1 / 2


def test_a_whole_evaluation_of_made_up_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [ListRecord(f"r{i}", None, "Where?", [0.0, 0.0, 0.5, 1.0], "grounding") for i in range(4)]
    good, half, bad = "[0, 0, 0.5, 1]", "[0, 0, 1, 1]", "here"
    answers = {
        "base": {
            "greedy": [[half], [half], [bad], [bad]],
            "blank": [[half], [half], [half], [half]],
            "sampled": [[bad, good], [half, bad], [bad, bad], [half, good]],
        },
        "aligned": {"greedy": [[good], [good], [half], [half]], "blank": [[bad]] * 4},
    }
    evaluation = evaluate_made_up(tmp_path, records, answers, monkeypatch)
    figure = json.loads((tmp_path / "out" / "evaluation.json").read_text())["tasks"][0]["models"]
    base, aligned = figure["base"]["metrics"]["mean_iou"], figure["aligned"]["metrics"]["mean_iou"]
    assert base["greedy"]["value"] == pytest.approx(0.25)
    assert base["best_of_n"]["value"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert base["head_room"]["value"] == pytest.approx(0.375)
    assert base["gap"]["value"] == pytest.approx(0.25 - 0.5)  # better without looking
    assert aligned["over_first"]["value"] == pytest.approx(0.5)
    assert aligned["gap"]["value"] == pytest.approx(0.75)
    assert aligned["gap_over_first"]["value"] == pytest.approx(1.0)
    assert aligned["best_of_n"] is None
    assert figure["base"]["metrics"]["unreadable"]["greedy"]["value"] == 0.5
    curve = [one["value"] for one in figure["base"]["mean_best_reward_of_k"]]
    assert curve == pytest.approx([(0.5 + 0.25 + 0 + 0.75) / 4, 0.625])
    assert evaluation.notices == []


def test_a_model_whose_answers_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [ListRecord(f"r{i}", None, "Where?", "[0, 0, 1, 1]", "grounding") for i in range(3)]
    pixels = [['{"bbox_2d": [0, 0, 40, 28]}']] * 3
    with pytest.warns(UnreadableAnswers, match="other, grounding"):
        wrong = evaluate_made_up(tmp_path, records, {"other": {"greedy": [["?"]] * 3}}, monkeypatch)
    assert "3 of 3 answers could not be read" in wrong.notices[0]
    formats = {"box_formats": ["llava", "other=qwen2.5-vl"]}
    right = evaluate_made_up(
        tmp_path,
        records,
        {"base": {"greedy": [["[0, 0, 1, 1]"]] * 3}, "other": {"greedy": pixels}},
        monkeypatch,
        **formats,
    )
    assert right.notices == []
    assert right.tasks[0].figures.by_model["other"]["ap50"].greedy.value == 1
    assert right.tasks[0].figures.by_model["base"]["ap50"].greedy.value == 1


def test_blank_pages_and_images_without_any_object_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [ListRecord("page", None, "Read.", "", "ocr"), ListRecord("none", None, "Where?", [], "grounding")]
    for texts, right in ((["", "[]"], 1.0), (["words", "[0.1, 0.1, 0.5, 0.5]"], 0.0)):
        answers = {"base": {"greedy": [[text] for text in texts], "sampled": [[text] * 3 for text in texts]}}
        ocr, grounding = evaluate_made_up(tmp_path, records, answers, monkeypatch).tasks
        of_page, of_boxes = (task.figures.by_model["base"] for task in (ocr, grounding))
        assert of_page["edit_distance"].greedy.value == 1 - right
        assert of_page["f1"].greedy.value == right
        assert of_boxes["ap50"].greedy.value == of_boxes["mean_iou"].greedy.value == right
        assert of_page["unreadable"].greedy.value == of_boxes["unreadable"].greedy.value == 0


def test_models_that_saw_the_pictures_in_other_sizes_are_named() -> None:
    records = [ListRecord(name, None, "Where?", [[0, 0, 1, 1]], "grounding/qwen2.5-vl") for name in ("a", "b", "c")]

    def answers(*sizes: tuple[int, int] | None) -> dict[str, dict[str, Answers]]:
        return {"greedy": {r.id: Answers(("x",), size, 0) for r, size in zip(records, sizes, strict=True)}}

    base = answers((28, 14), (56, 28), None)
    assert _seen_differently(records, {"base": base, "adapter": answers((28, 14), (56, 28), None)}) == []
    (notice,) = _seen_differently(records, {"base": base, "adapter": answers((28, 14), (42, 28), None)})
    for words in ("base and adapter", "1 of 3", "'b'", "base: 56×28 and adapter: 42×28", "max_pixels"):
        assert words in notice
