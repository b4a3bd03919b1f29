"""`perpo score`: rewards for answers that exist, whoever gave them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from perpo.cli import main as cli
from perpo.data.read import read_records
from perpo.encoding.encoder import Encoder
from perpo.model.load import load_processor
from perpo.rewards.scoring import UnreadableAnswers

from .. import tiny_models, tiny_qwen

REWARD = """
calls = []


def length(prompts, completions, **columns):
    "Any text."
    calls.extend(completions)
    if "break" in completions and columns["id"][0] not in allowed:
        raise KeyboardInterrupt
    return [float(len(text)) for text in completions]


allowed = set()
"""


def save(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def records(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"id": "page", "prompt": "Read.", "answer": "abcd", "task": "ocr", "responses": ["abcd", "abc", "ab", "cd"]},
        {"id": "count", "prompt": "How many?", "answer": 3, "task": "counting", "responses": ["three", "3", "many"]},
        {"id": "other", "prompt": "Read.", "answer": "ab", "responses": ["ab", "a"], "rewards": [7, 8], "hue": "red",
         "ref_log_probs": [-1, -2], "complete": [True, False]},
    ]  # fmt: skip
    return save(tmp_path / "records.jsonl", rows)


def score(*arguments: Any) -> int:
    return cli.main(["score", *map(str, arguments)])


def test_answers_from_anywhere_become_lists(records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score("--records", records, "--output", tmp_path / "lists.jsonl", "--task", "ocr") == 0
    shown = capsys.readouterr().out
    assert "1 records have rewards already, which are replaced" in shown
    lines = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.startswith(("ocr", "counting"))}
    assert lines["ocr"] == ["2", "6", "0.708", "1.000", "0.0%", "33.3%", "100.0%"]
    assert lines["counting"] == ["1", "3", "0.667", "1.000", "33.3%", "66.7%", "100.0%"]
    page, count, other = read_records(tmp_path / "lists.jsonl")[0]
    assert page.rewards == (1, 0.75, 0.5, 0.5)
    assert count.rewards == (1, 1, 0)
    assert (other.rewards, other.task, other.columns) == ((1, 0.5), "ocr", {"hue": "red"})
    assert (other.ref_log_probs, other.complete) == ((-1, -2), (True, False))


def test_responses_in_a_file_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [{"id": name, "prompt": "Read.", "answer": "ab", "task": "exact"} for name in ("a", "7", "c")]
    asked[1]["id"] = 7
    records = save(tmp_path / "records.jsonl", asked)
    answers = save(
        tmp_path / "answers.jsonl",
        [
            {"id": "a", "response": "ab", "tokens": 3},
            {"id": 7, "responses": ["x", "ab"], "complete": [False, True]},
            {"id": "a", "response": "b"},
        ],
    )
    given = ["--records", records, "--responses", answers, "--output", tmp_path / "lists.jsonl"]
    assert score(*given) == 1
    assert "has none for 1 records, such as 'c'\nskip_bad leaves out" in capsys.readouterr().err
    assert score(*given, "--skip_bad") == 0
    shown = capsys.readouterr().out
    assert "4 responses to 2 records; 1 records without any left out; fields not used: tokens" in shown
    first, second = read_records(tmp_path / "lists.jsonl")[0]
    assert (first.responses, first.rewards, first.complete) == (("ab", "b"), (1, 0), None)
    assert (second.responses, second.rewards, second.complete) == (("x", "ab"), (0, 1), (False, True))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a"}], "answers.jsonl, 1: needs one of response (a text) and responses"),
        ([{"id": "a", "response": "x", "responses": ["x"]}], "has ['response', 'responses']"),
        ([{"id": "a", "response": ["x"]}], "response: must be a text, got ['x']"),
        ([{"id": "a", "responses": "x"}], "responses: must be a list of texts, got 'x'"),
        ([{"id": "a", "response": "x", "complete": 1}], "complete: must be true or false"),
        ([{"response": "x"}], "id: must be that of a record, got None"),
        ([{"id": "a", "response": "x"}, {"id": "d", "response": "x"}], "1 ids belong to no record, such as 'd'"),
        ([{"id": "own", "response": "x"}], "record 'own' has 1 answers of its own"),
        (["x"], 'must be an object {"id": …, "response": …}, got \'x\''),
    ],
)
def test_responses_that_cannot_be_taken_are_named(
    rows: list[Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [{"id": "a", "prompt": "Read.", "answer": "ab", "task": "exact"}]
    if rows[0] == {"id": "own", "response": "x"}:
        asked.append({"id": "own", "prompt": "Read.", "answer": "ab", "responses": ["c"]})
    given = [
        "--records",
        save(tmp_path / "records.jsonl", asked),
        "--responses",
        save(tmp_path / "answers.jsonl", rows),
    ]
    assert score(*given, "--output", tmp_path / "lists.jsonl") == 1
    assert message in capsys.readouterr().err


def test_boxes_in_pixels_need_the_size_that_the_model_saw(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perpo.model.load.AutoProcessor", tiny_qwen.Processor)
    tiny_qwen.save(tmp_path / "model")
    tiny_models.picture((400, 280), 0).save(tmp_path / "0.png")
    said = '{"bbox_2d": [0, 0, 28, 28]}'
    row = {"id": "a", "image": "0.png", "prompt": "Where?", "answer": [0, 0, 0.5, 1], "responses": [said, "[]"]}
    given = ["--task", "grounding", "--answer_format", "qwen2.5-vl", "--image_root", tmp_path]
    records = save(tmp_path / "records.jsonl", [row])
    assert score(*given, "--records", records, "--output", tmp_path / "a.jsonl") == 1
    assert "record 'a': qwen2.5-vl models write boxes in pixels of the image as they saw it; name the model" in (
        capsys.readouterr().err
    )
    monkeypatch.setattr("perpo.model.load.AutoModelForImageTextToText", None)  # no weights
    assert score(*given, "--records", records, "--output", tmp_path / "a.jsonl", "--model", tmp_path / "model") == 0
    width, height = Encoder(load_processor(str(tmp_path / "model"))).seen_size((400, 280))
    assert (width, height) != (400, 280)
    inside, area = min(28, width / 2) * 28, 28 * 28
    iou = inside / (area + width / 2 * height - inside)
    (of_model,) = read_records(tmp_path / "a.jsonl")[0]
    assert of_model.rewards == pytest.approx((iou, 0))
    told = save(tmp_path / "told.jsonl", [row | {"image_size": [width, height]}])
    assert score(*given, "--records", told, "--output", tmp_path / "b.jsonl") == 0
    assert read_records(tmp_path / "b.jsonl")[0][0].rewards == of_model.rewards
    options = ["--model", tmp_path / "model", "--processor_options", '{"max_pixels": 784}']
    assert score(*given, "--records", records, "--output", tmp_path / "a.jsonl", *options) == 1
    assert "different: image size (" in capsys.readouterr().err


def test_an_answer_cut_in_a_thought_that_the_template_opened_is_unreadable(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, processor = tiny_models.build("llava")
    processor.save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(Encoder, "opened", "<think>")
    given = ["--records", records, "--output", tmp_path / "lists.jsonl", "--task", "ocr", "--model", tmp_path / "tiny"]
    with pytest.warns(UnreadableAnswers):
        assert score(*given) == 0
    lists, _ = read_records(tmp_path / "lists.jsonl")
    assert lists[0].rewards == (0, 0, 0, 0)
    assert lists[0].responses == ("abcd", "abc", "ab", "cd")  # as they came
    monkeypatch.setattr(Encoder, "opened", "")
    assert score(*given) == 1
    assert "opened by the template" in capsys.readouterr().err


def test_a_function_of_one_s_own_comes_from_the_command_line_alone_and_is_not_asked_twice(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_lengths.py").write_text(REWARD)
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    del rows[0]["answer"]  # the function takes none
    rows[1]["responses"] = ["three", "break"]
    save(records, rows)
    given = ["--records", records, "--output", tmp_path / "lists.jsonl", "--reward", "own_lengths:length"]
    assert score(*given) == 130
    assert not (tmp_path / "lists.jsonl").exists()
    module = sys.modules["own_lengths"]
    asked = list(module.calls)
    module.allowed.add("count")
    assert score(*given) == 0
    assert module.calls[len(asked) :] == ["three", "break", "ab", "a"]  # the first record is kept
    assert [record.rewards for record in read_records(tmp_path / "lists.jsonl")[0]] == [(4, 3, 2, 2), (5, 5), (2, 1)]
    capsys.readouterr()

    rows[0]["responses"][0] = "other"
    save(records, rows)
    assert score(*given) == 1
    assert "record 'page' has another responses now" in capsys.readouterr().err
    rows[0]["responses"][0] = "abcd"
    save(records, rows)
    (tmp_path / "own_lengths.py").write_text(REWARD.replace("float(len(text))", "2.0 * len(text)"))
    del sys.modules["own_lengths"]
    assert score(*given) == 1
    assert "different: source of the reward (" in capsys.readouterr().err

    save(records, [rows[0] | {"task": "own_lengths:length", "answer": "a"}])
    assert score("--records", records, "--output", tmp_path / "new.jsonl") == 1
    assert "An import path is taken from the command line or a config alone" in capsys.readouterr().err


def test_a_record_that_cannot_be_scored_is_named_or_left_out(
    records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    rows[1]["answer"] = "no number"
    save(records, rows)
    given = ["--records", records, "--output", tmp_path / "lists.jsonl", "--task", "ocr"]
    assert score(*given) == 1
    assert "failed on record 'count'" in capsys.readouterr().err
    assert score(*given, "--skip_bad") == 0
    shown = capsys.readouterr()
    assert "1 bad records skipped" in shown.out
    assert "skipped: reward 'counting' failed on record 'count'" in shown.err + shown.out
    assert [record.id for record in read_records(tmp_path / "lists.jsonl")[0]] == ["page", "other"]


def test_answers_that_cannot_be_read_are_loud_by_task(records: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    rows[1]["responses"] = ["some", "many", "3"]
    save(records, rows)
    with pytest.warns(UnreadableAnswers, match="2 of 3 answers could not be read"):
        assert score("--records", records, "--output", tmp_path / "lists.jsonl", "--task", "ocr") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "/nowhere/lists.jsonl"], "there is no folder '/nowhere'"),
        (["--output", "lists.csv"], "output must be a .jsonl or .parquet file"),
        (["--task", ""], "record 'other' names no task: set task or reward"),
        (["--reward", "no.such:thing"], "reward 'no.such:thing' cannot be imported"),
        (["--answer_format", "qwen"], "box format 'qwen' is not known"),
        (["--processor_options", "{a: 1}"], "processor_options has no effect without model_name_or_path"),
        (["--model", "nowhere"], "there is no folder 'nowhere'"),
    ],
)
def test_bad_settings_are_named(
    arguments: list[str], message: str, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = score("--records", records, "--output", tmp_path / "lists.jsonl", "--task", "ocr", *arguments)
    except SystemExit as stop:
        code = stop.code
    assert code in (1, 2)
    assert message in capsys.readouterr().err
