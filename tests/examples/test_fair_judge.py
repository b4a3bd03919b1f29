"""The judge of examples/fair_judge.py: the fair wording is taken, and places cancel in the win rates."""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from perpo.data.record import ListRecord

from ..perpo import tiny_runs

ROOT = Path(__file__).parents[2]
WORDINGS = tuple(name + " {question} {first} {second}" for name in ("biased", "fair", "late"))
BIAS = {"biased": 3.0, "fair": 0.2, "late": -3.0}  # of the logit of A


@pytest.fixture
def fair_judge(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("fair_judge")


def by_number(questions: Sequence[ListRecord]) -> torch.Tensor:
    """A judge that likes large numbers, and a place, as the wording says."""
    logits = []
    for question in questions:
        wording, _, first, second = str(question.prompt).split()
        logits.append(BIAS[wording] + float(first) - float(second))
    return torch.tensor(logits).double().sigmoid()


def lists() -> list[ListRecord]:
    return [ListRecord(f"r{i}", None, "which?", responses=("1", "0", "2.5", "1")[: 4 - i % 2]) for i in range(6)]


def test_the_fairest_wording_is_taken_and_its_win_rates_are_the_rewards(fair_judge: Any) -> None:
    judged, best, values = fair_judge.judge(lists(), by_number, WORDINGS, n_choose=4)
    assert best == WORDINGS[1]
    assert values[0] == values[2] == -0.5
    assert values[1] > -0.1
    for record, before in zip(judged, lists(), strict=True):
        assert replace(record, rewards=None) == before
        numbers = [float(x) for x in record.responses]
        wins = {(i, j): by_number([asked]).item() for (i, j), asked in pairs(fair_judge, before)}
        for i in range(record.k):
            others = [j for j in range(record.k) if j != i]
            expected = sum((wins[i, j] + 1 - wins[j, i]) / 2 for j in others) / len(others)
            assert record.rewards[i] == pytest.approx(expected, abs=1e-12)
        assert sum(record.rewards) == pytest.approx(record.k / 2)
        assert record.rewards[numbers.index(2.5)] == max(record.rewards)
        if record.k == 4:
            assert record.rewards[0] == pytest.approx(record.rewards[3])  # equal answers, in other places


def pairs(fair_judge: Any, record: ListRecord) -> list[tuple[tuple[int, int], ListRecord]]:
    places = permutations(range(record.k), 2)
    return list(zip(places, fair_judge.comparisons(record, WORDINGS[1]), strict=True))


def test_it_runs_on_a_model_and_its_lists_can_be_trained_on(
    fair_judge: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = tiny_runs.save_run(tmp_path)
    given = fair_judge.perpo.read_records(project / "lists.jsonl", root=str(project))[0]
    unscored = [replace(record, rewards=None) for record in given]
    fair_judge.perpo.write_records(unscored, project / "unscored.jsonl")
    output = project / "judged.jsonl"
    options = ["--model", str(project / "model"), "--records", str(project / "unscored.jsonl"), "--n_choose", "2"]
    options += ["--output", str(output), "--image_root", str(project)]
    judged = fair_judge.main(options)
    assert "fairness" in capsys.readouterr().out
    again, report = fair_judge.perpo.read_records(output, root=str(project), check_images=True)
    assert [record.rewards for record in again] == [record.rewards for record in judged]
    assert [record.responses for record in again] == [record.responses for record in unscored]
    assert report.n_records == 4
    assert all(0 <= reward <= 1 for record in judged for reward in record.rewards)
    assert all(record.has_preference for record in judged)
    with pytest.raises(SystemExit):  # it would be written over
        fair_judge.main(options)


def test_the_model_is_asked_for_one_letter(fair_judge: Any) -> None:
    model, processor = tiny_runs.tiny_models.build("llava")
    encoder = fair_judge.perpo.Encoder.for_model(processor, model)
    record = replace(tiny_runs.records()[0], rewards=None)
    questions = fair_judge.comparisons(record, fair_judge.WORDINGS[0])
    found = fair_judge.model_judge(model, processor, None, batch_size=4)(questions)
    letters = [encoder.response(letter, complete=False)[-1] for letter in "AB"]
    for question, value in zip(questions, found.tolist(), strict=True):
        inputs = encoder.prompt(question.prompt, question.image)
        before = encoder.response("A", complete=False)[:-1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([before]).long()], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1, letters].double()
        assert value == pytest.approx(logits.softmax(0)[0].item(), abs=1e-4)


@pytest.mark.parametrize(
    ("change", "wordings", "message"),
    [
        ({}, ("{question} {first}",), "must have {question}, {first} and {second}, once each"),
        ({}, ("{question} {first} {second} {x}",), "must have {question}, {first} and {second}, once each"),
        ({"responses": ("a",)}, WORDINGS, "record 'r0' has 1 answers; give lists of two answers or more"),
        ({"rewards": (1.0, 2.0, 3.0, 4.0)}, WORDINGS, "record 'r0' has rewards already"),
        ({"prompt": [{"role": "user", "content": "?"}]}, WORDINGS, "record 'r0': the judge is shown a question"),
    ],
)
def test_what_it_cannot_judge_is_refused(fair_judge: Any, change: Any, wordings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fair_judge.judge([replace(lists()[0], **change)], by_number, wordings)
