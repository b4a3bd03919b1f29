"""What is judged of a completion is its final answer: not its thoughts, and nothing where it was cut while thinking."""

import re
import time
import unicodedata
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from perpo.data.record import ListRecord
from perpo.evaluation.metrics import judge, metrics_of
from perpo.rewards.completions import composed, final_answer
from perpo.rewards.scoring import Tally, score_record

RIGHT = {
    "grounding": ([0, 0, 0.5, 1], "[0, 0, 0.5, 1]", "[0, 0, 1, 1]"),
    "grounding-giou": ([0, 0, 0.5, 1], "[0, 0, 0.5, 1]", "[0, 0, 1, 1]"),
    "grounding/qwen3-vl": ([0, 0, 0.5, 1], '{"bbox_2d": [0, 0, 500, 1000]}', 'A plate {"bbox_2d": [9, 9, 99, 99]} no.'),
    "ocr": ("a line of text", "a line of text", "it might read b"),
    "ocr-words": ("a line of text", "a line of text", "it might read b"),
    "counting": (3, "3", "1, 2, 3, 4"),
    "numeric": (3.5, "3.5", "7?"),
    "exact": ("cat", "cat", "dog"),
}
FORMS = [
    "<think>{thought}</think>{answer}",
    "{thought}</think>\n\n{answer}",  # the chat template has opened the thought
    "<think>{thought}</think><answer>{answer}</answer>",
    "<think>{thought}<answer>{thought}</answer></think><answer>{answer}</answer>{thought}",
    "<think>{thought}</think>{thought}<think>{thought}</think>{answer}",
    "<think>{thought}</think><answer>{answer}",
    "{thought}<answer>{answer}</answer>",
    "◁think▷{thought}◁/think▷{answer}",
    "[THINK]{thought}[/THINK]{answer}",
    "<THINKING>{thought}</THINKING>{answer}",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("task", RIGHT)
def test_every_task_judges_what_follows_the_thoughts(task: str, form: str) -> None:
    truth, answer, thought = RIGHT[task]
    completion = form.format(thought=thought, answer=answer)
    tally = Tally()
    assert score_record(ListRecord("a", None, "?", truth, responses=(completion,)), task, tally).rewards == (1,)
    assert tally.unreadable == 0


@pytest.mark.parametrize("form", ["<think>{0}", "<think>{0}</think>{0}<think>{0}", "◁think▷{0}"])
@pytest.mark.parametrize("task", RIGHT)
def test_cut_while_thinking_is_unreadable(task: str, form: str) -> None:
    truth, answer, _ = RIGHT[task]
    tally = Tally()
    record = ListRecord("a", None, "?", truth, responses=(form.format(answer),))
    assert score_record(record, task, tally).rewards == (0,)
    assert tally.summary() == "1 of 1 answers could not be read (100.0%): 1 cut while thinking"


def test_cut_while_thinking_is_not_right_even_where_nothing_is_to_be_read() -> None:
    for task, truth in (("ocr", ""), ("ocr-words", ""), ("grounding", []), ("counting", 0)):
        record = ListRecord("a", None, "?", truth, responses=("<think>none []",))
        assert score_record(record, task, Tally()).rewards == (0,)


@pytest.mark.parametrize("task", RIGHT)
def test_the_metrics_of_an_evaluation_judge_the_same(task: str) -> None:
    truth, answer, thought = RIGHT[task]
    texts = [answer, f"<think>{thought}</think><answer>{answer}</answer>", f"<think>{answer}"]
    answers = judge(ListRecord("a", None, "?", truth), texts, task, None, Tally())
    assert [a.readable for a in answers] == [True, True, False]
    for metric in metrics_of(task)[0]:
        plain, thinking, cut = (float(metric.value(metric.terms([a]).sum(0))) for a in answers)
        worst = 0.0 if metric.higher_is_better else metric.scale
        assert plain == thinking != cut == worst, metric.name


def test_a_reward_of_ones_own_gets_the_thoughts_too() -> None:
    seen: list[Any] = []

    def reward(prompts: list, completions: list, **columns: list) -> list[float]:
        seen.extend(completions)
        return [1.0] * len(completions)

    score_record(ListRecord("a", None, "?", 1, responses=("<think>a</think>b",)), reward, Tally())
    assert seen == ["<think>a</think>b"]


@pytest.mark.parametrize("unit", ["<think>", "</think>", "<answer>", "</answer>", "<", "[/THINK", "<think"])
def test_finding_the_answer_is_linear(unit: str) -> None:
    start = time.perf_counter()
    final_answer(unit * 100_000)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("run", ["\u0301\u0327", "\u0f71\u0f72", "\u0f73", "\u0344\u0327"])
def test_composing_a_run_of_marks_is_linear(run: str) -> None:
    text = "a" + run * (200_000 // len(run))
    start = time.process_time()
    composed(text, "NFC")
    composed(text, "NFKC")
    assert time.process_time() - start < 4


@given(
    st.text(st.sampled_from("ae\u00e9\u0301\u0327\u0344\u0f73\u1100\u1161\uff21 "), max_size=40),
    st.sampled_from(["NFC", "NFKC"]),
)
def test_what_people_write_is_composed_as_unicode_says(text: str, form: Any) -> None:
    """Up to thirty marks in a row."""
    assume(len(text) <= 30 or not re.search("[\u0301\u0327\u0344\u0f73]{30}", text))
    assert composed(text, form) == unicodedata.normalize(form, text)
