"""Records get the rewards of their responses; unreadable answers are counted, and a run full of them is warned."""

import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from perpo.data.record import FieldError, ListRecord
from perpo.rewards import scoring
from perpo.rewards.scoring import Tally, UnreadableAnswers, bad_truths, find_task, score_record, score_records


def record(*responses: str, id: str = "a", answer: object = "[0, 0, 1, 1]", task: str = "grounding") -> ListRecord:
    return ListRecord(id=id, image="a.jpg", prompt="where?", answer=answer, task=task, responses=responses)


def length_reward(prompts: list, completions: list, **columns: list) -> list[float | None]:
    """The longer the better."""
    return [float(len(text)) if text else None for text in completions]


def test_the_record_names_its_task_and_everything_else_of_it_stays() -> None:
    before = record("[0, 0, 1, 1]", "[0, 0, 0.5, 1]", "no idea")
    (after,) = score_records([before])
    assert after.rewards == (1, 0.5, 0)
    assert (after.id, after.responses, after.answer) == (before.id, before.responses, before.answer)


@pytest.mark.parametrize(
    ("name", "answer", "response"),
    [
        ("grounding", "[0, 0, 1, 1]", "[0, 0, 1, 1]"),
        ("grounding/internvl", [0, 0, 1, 1], "<box>[[0, 0, 1000, 1000]]</box>"),
        ("grounding-giou/qwen3-vl", [[0, 0, 1, 1]], '{"bbox_2d": [0, 0, 1000, 1000]}'),
        ("ocr", "hello", "hello"),
        ("ocr-words", "hello", "hello"),
        ("counting", 3, "three"),
        ("numeric", 3.5, "3.5"),
        ("exact", "cat", "Cat."),
    ],
)
def test_every_task_gives_1_for_the_truth_and_counts_an_empty_answer_as_unreadable(name, answer, response) -> None:
    tally = Tally()
    scored = score_record(record(response, " ", answer=answer), name, tally)
    assert scored.rewards == (1, 0)
    assert (tally.total, tally.unreadable, tally.examples) == (2, 1, [" "])
    assert tally.summary() == "1 of 2 answers could not be read (50.0%)"


def test_further_columns_reach_the_reward() -> None:
    tally = Tally()
    records = [record("[0, 0, 50, 100]", id="a"), record("[0, 0, 50, 100]", id="b")]
    sizes = {"a": (50, 100), "b": (100, 100)}
    scored = list(
        score_records(records, "grounding/qwen2.5-vl", columns=lambda r: {"image_size": sizes[r.id]}, tally=tally)
    )
    assert [r.rewards for r in scored] == [(1,), (0.5,)]
    assert tally.unreadable == 0


def test_a_reward_gets_the_records_further_columns_but_known_names_mean_what_they_mean() -> None:
    seen = {}

    def note(prompts: list, completions: list, **columns: list) -> list[float]:
        seen.update(columns)
        return [0.0] * len(completions)

    further = {"page": 3, "image_size": "mine", "answer": "mine", "prompts": "mine"}
    score_record(replace(record("a", "b"), columns=further), note, Tally(), {"image_size": (4, 2)})
    known = {"id": ["a"] * 2, "answer": ["[0, 0, 1, 1]"] * 2, "task": ["grounding"] * 2, "image_size": [(4, 2)] * 2}
    assert seen == {"page": [3, 3], **known}


def test_an_answer_that_says_nothing_is_there_can_be_read_where_nothing_is() -> None:
    for task, answer, responses, rewards, unreadable in (
        ("grounding", [], ("[]", "none", "a dog"), (1, 1, 0), 1),
        ("grounding", [0, 0, 1, 1], ("[]", "none"), (0, 0), 2),
        ("ocr", "", ("", "text"), (1, 0), 0),
        ("ocr", "text", ("", "<|begin_of_box|><|end_of_box|>"), (0, 0), 2),
    ):
        tally = Tally()
        assert score_record(record(*responses, answer=answer), task, tally).rewards == rewards
        assert tally.unreadable == unreadable


def test_marks_around_a_text_are_no_part_of_it() -> None:
    for task in ("ocr", "ocr-words", "exact"):
        assert score_record(record("<|begin_of_box|>a b<|end_of_box|>", answer="a b"), task, Tally()).rewards == (1,)


def test_bad_truths_are_found_without_any_response() -> None:
    records = [
        record(id="good"),
        record(id="pixels", answer=[3, 4, 50, 60]),
        record(id="none", answer=None),
    ]
    assert bad_truths(records).keys() == {"pixels", "none"}
    assert "answer must be a box" in bad_truths(records)["pixels"]
    assert bad_truths(records, "ocr").keys() == {"pixels", "none"}
    assert bad_truths(records, "math:exp") == {}  # may be slow, or take no empty response


@pytest.mark.parametrize("reward", [length_reward, f"{__name__}:length_reward"])
def test_a_function_of_ones_own_says_none_for_unreadable(reward) -> None:
    tally = Tally()
    assert score_record(record("ab", "", "c"), reward, tally).rewards == (2, 0, 1)
    assert (tally.unreadable, tally.expected) == (1, "The longer the better.")


def test_more_than_half_unreadable_warns_with_examples_and_the_expected_format() -> None:
    records = [record("the dog", "x" * 1000, "[0, 0, 1, 1]", id=str(i)) for i in range(3)]
    with pytest.warns(UnreadableAnswers) as caught:
        list(score_records(records))
    (warning,) = caught
    text = str(warning.message)
    assert "6 of 9 answers could not be read (66.7%)" in text
    assert "'the dog'" in text
    assert "[0.12, 0.34, 0.56, 0.78]" in text
    assert len(text) < 1000  # a long answer is cut


def test_half_unreadable_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(score_records([record("the dog", "[0, 0, 1, 1]")]))


def test_a_long_run_is_warned_early_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_EARLY", 4)
    scored = score_records([record("dog", "cat", id=str(i)) for i in range(5)])
    next(scored)
    with pytest.warns(UnreadableAnswers, match="4 of 4"):
        next(scored)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(scored)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grunding", "is not known: name a task .grounding, .*package.module:function"),
        ("grounding/qwen", "box format 'qwen' is not known"),
        ("no_such_module:f", "cannot be imported: No module named"),
        ("math:no_such_function", "cannot be imported: .*no attribute"),
        ("math:pi", "must be a function .*got float"),
        (":f", "is not known"),
        ("..m:f", "cannot be imported"),
    ],
)
def test_a_reward_that_cannot_be_found_is_an_error_that_says_why(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_task(name)


HOSTILE = """
from pathlib import Path
Path("was_here").touch()
def f(prompts, completions, **columns):
    return [1.0] * len(completions)
"""


@pytest.mark.parametrize("task", ["evilmod:f", "os:system", "evilmod:f.__call__", "grounding:x", "evilmod"])
def test_a_record_cannot_name_what_is_imported(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evilmod.py").write_text(HOSTILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    hostile = record("touch was_here", id="bad one", task=task)
    with pytest.raises(ValueError, match=r"record 'bad one': task .* is not known; .*never from a record"):
        list(score_records([hostile]))
    with pytest.raises(ValueError, match="record 'bad one'"):
        find_task(task, of_record="bad one")
    assert "never from a record" in bad_truths([hostile])["bad one"]
    assert not (tmp_path / "was_here").exists()
    assert find_task("evilmod:f").reward([""], [""]) == [1.0]  # whoever starts the run may
    assert (tmp_path / "was_here").exists()
    del sys.modules["evilmod"]


@pytest.mark.parametrize("result", [math.nan, math.inf, "high", [1], "nan"])
def test_a_reward_that_is_no_finite_number_is_an_error_that_names_the_record(result: object) -> None:
    with pytest.raises(ValueError, match=r"for 'y' of record 'a': a reward must be a finite number"):
        score_record(record("y"), lambda prompts, completions, **columns: [result], Tally())


@pytest.mark.parametrize("rewards", [(1e39, 0.0), (0.0, -1e39), (3e38, -3e38)])
def test_rewards_beyond_fp32_are_refused(rewards: tuple[float, ...]) -> None:
    with pytest.raises(FieldError, match=r"rewards: must be numbers of fp32"):
        replace(record("y", "z"), rewards=rewards)
    with pytest.raises(ValueError, match=r"gave record 'a' rewards: must be numbers of fp32"):
        score_record(record("y", "z"), lambda prompts, completions, **columns: list(rewards), Tally())


@pytest.mark.parametrize(
    "rewards", [(0.0, 1.0, 1 + 1e-9), (1 + 2e-9, 0.0, 1.0, 1 + 1e-9), (0.5, 1000.00001, 1000.0), (0.0, 1e-60, 1.0)]
)
def test_rewards_that_fp32_cannot_tell_apart_are_kept_apart(rewards: tuple[float, ...]) -> None:
    (scored,) = score_records(
        [record(*map(str, rewards))], lambda prompts, completions, **columns: [float(text) for text in completions]
    )
    assert scored.rewards is not None
    order = np.argsort(rewards)
    assert (np.diff(np.array(scored.rewards, dtype=np.float32)[order]) > 0).all()
    assert scored.rewards == pytest.approx(rewards, rel=3e-7, abs=1e-44)
    assert replace(scored, rewards=scored.rewards).rewards == scored.rewards


@pytest.mark.parametrize("rewards", [(1.0, 1 + 1e-9), (1e6 + 0.01, 1e6 + 0.02), (1e-50, 2e-50)])
def test_rewards_that_differ_by_less_than_fp32_can_hold_are_refused_with_advice(rewards: tuple[float, ...]) -> None:
    with pytest.raises(FieldError, match=r"are equal in fp32, .* subtract what all rewards have in common, or scale"):
        replace(record("y", "z"), rewards=rewards)


def test_rounding_noise_of_fp64_is_a_tie() -> None:
    rewards = replace(record("y", "z"), rewards=(0.3, 0.1 + 0.2)).rewards
    assert rewards == (0.3, 0.1 + 0.2)
    assert len(set(np.array(rewards, dtype=np.float32).tolist())) == 1


def test_a_reward_that_fails_or_gives_the_wrong_number_names_the_record() -> None:
    with pytest.raises(ValueError, match=r"'grounding' failed on record 'a': ValueError: answer must be a box"):
        list(score_records([record("y", answer="nothing")]))
    for result in ([1.0, 2.0], None):
        with pytest.raises(ValueError, match=r"one number a response: record 'a' has 1, got"):
            score_record(record("y"), lambda prompts, completions, result=result, **columns: result, Tally())
    with pytest.raises(ValueError, match="record 'a' names no task"):
        list(score_records([record("y", task="")]))


def test_a_record_without_responses_gets_no_rewards() -> None:
    assert next(iter(score_records([record()]))).rewards == ()
