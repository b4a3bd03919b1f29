"""`perpo evaluate`: two models from files to figures and report; goes on after a kill; errors that say what to do."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import get_peft_model

from perpo.cli import main as cli
from perpo.data.record import ListRecord, write_records
from perpo.evaluation.answer_store import AnswerStore
from perpo.evaluation.config import EvaluationConfig
from perpo.evaluation.evaluate import evaluate
from perpo.evaluation.models import ModelSource
from perpo.model.trainable import language_lora
from perpo.sampling.with_transformers import TransformersSampler

from .. import tiny_models
from ..evaluating import ocr_records, save_models, save_records


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and an adapter on the first."""
    folder = tmp_path_factory.mktemp("models")
    save_models(folder, "base", "aligned")
    model, _ = tiny_models.build("llava")
    config = language_lora(model, r=4, alpha=64)
    config.init_lora_weights = False
    get_peft_model(model, config).save_pretrained(folder / "lora")
    return folder


@pytest.fixture
def project(models: Path, tmp_path: Path) -> Path:
    save_records(tmp_path, [*ocr_records(3), ListRecord("g", None, "Where?", [0.1, 0.2, 0.5, 0.6], "grounding")])
    config = {
        "models": [f"base={models / 'base'}", f"aligned={models / 'aligned'}"],
        "records": str(tmp_path / "held_out.jsonl"),
        "image_root": str(tmp_path),
        "output": str(tmp_path / "out"),
        "n": 2,
        "batch_size": 2,
        "max_new_tokens": 4,
        "resamples": 50,
        "device": "cpu",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def run(project: Path, *arguments: str) -> int:
    return cli.main(["evaluate", "--config", str(project / "run.yaml"), *arguments])


def figures(project: Path) -> dict[str, Any]:
    return json.loads((project / "out" / "evaluation.json").read_text())


@pytest.mark.filterwarnings("ignore::perpo.rewards.scoring.UnreadableAnswers")
def test_two_models_and_an_adapter_side_by_side(
    project: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three = [f"base={models / 'base'}", f"aligned={models / 'aligned'}", f"lora={models / 'base'} + {models / 'lora'}"]
    assert run(project, "--models", *three, "--max-new-tokens", "5") == 0  # the command line wins
    shown = capsys.readouterr().out
    assert "ocr: 3 records" in shown
    assert "gap without image" in shown
    found = figures(project)
    assert found["settings"]["max_new_tokens"] == 5
    assert [model["name"] for model in found["models"]] == ["base", "aligned", "lora"]
    assert len({model["identity"] for model in found["models"]}) == 3
    ocr, grounding = found["tasks"]
    assert (ocr["n_records"], grounding["n_records"]) == (3, 1)
    assert ocr["models"]["base"]["metrics"]["edit_distance"]["gap"] is not None
    assert len(ocr["models"]["lora"]["mean_best_reward_of_k"]) == 2
    rows = [json.loads(line) for line in (project / "out" / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 3 * 4  # models × (greedy, blank, sampled) × records
    texts = {model["name"]: [r["texts"] for r in rows if r["model"] == model["identity"]] for model in found["models"]}
    assert texts["base"] != texts["aligned"]
    assert texts["base"] != texts["lora"]
    assert (project / "out" / "report.html").stat().st_size > 20_000


@pytest.mark.filterwarnings("ignore::perpo.rewards.scoring.UnreadableAnswers")
def test_a_run_that_broke_off_goes_on_without_asking_twice(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = yaml.safe_load((project / "run.yaml").read_text())
    evaluate(EvaluationConfig(**settings | {"output": str(project / "whole")}))
    whole = (project / "whole" / "evaluation.json").read_text()

    asked, sample = [], TransformersSampler.sample

    def generate(self: TransformersSampler, questions: Any, *options: Any) -> Any:
        asked.append(len(questions))
        if len(asked) == 9:
            raise KeyboardInterrupt
        return sample(self, questions, *options)

    monkeypatch.setattr(TransformersSampler, "sample", generate)
    with pytest.raises(KeyboardInterrupt):
        evaluate(EvaluationConfig(**settings))
    assert not (project / "out" / "evaluation.json").exists()
    with (project / "out" / "answers.jsonl").open("ab") as file:
        file.write(b'{"model": "')  # half a line
    evaluate(EvaluationConfig(**settings))
    assert len(asked) == 1 + 2 * (2 + 2 + 4)  # of each model: greedy, blank, sampled; and the one that broke off
    assert (project / "out" / "evaluation.json").read_text().replace("/out", "/whole") == whole
    monkeypatch.setattr(ModelSource, "load", lambda *_, **__: pytest.fail("all is answered: nothing to load"))
    # a changed question or picture is asked again, a changed truth is not
    records = [json.loads(line) for line in (project / "held_out.jsonl").read_text().splitlines()]
    records[0]["answer"] = "another truth"
    write_records((ListRecord(**r) for r in records), project / "held_out.jsonl")
    evaluate(EvaluationConfig(**settings))
    tiny_models.picture((28, 40), 99).save(project / "r0.png")
    with pytest.raises(pytest.fail.Exception, match="nothing to load"):
        evaluate(EvaluationConfig(**settings))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
@pytest.mark.filterwarnings("ignore::perpo.rewards.scoring.UnreadableAnswers")
def test_a_killed_run_loses_no_answer(project: Path) -> None:
    command = [sys.executable, "-m", "perpo", "evaluate", "--config", str(project / "run.yaml"), "--n", "300"]
    answers = project / "out" / "answers.jsonl"
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            if answers.exists() and answers.stat().st_size:
                break
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = answers.read_bytes()
    assert before.count(b"\n") >= 1
    assert run(project, "--n", "1") == 0  # greedy and blanked answers are used again; n = 1 for speed
    after = answers.read_bytes()
    assert after.startswith(before[: before.rfind(b"\n") + 1])
    with AnswerStore(answers) as store:
        keys = [(row["model"], row["condition"], row["record"]) for row in map(json.loads, after.splitlines())]
        assert len(keys) == len(set(keys)) == len(store)  # nothing twice


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modles", "x"], "--modles"),
        (["--n", "-1"], "n must be ≥ 0, got -1"),
        (["--batch-size", "0"], "batch_size must be ≥ 1"),
        (["--temperature", "0"], "temperature must be > 0"),
        (["--confidence", "1"], "confidence must be in (0, 1), got 1.0"),
        (["--top_p", "1.5"], "top_p must be in (0, 1], got 1.5"),
        (["--reward", "nothing"], "reward 'nothing' is not known"),
        (["--models", "a=x", "a=y"], "'a' is the name of two models"),
        (["--models", "a=no/such/folder"], "there is no folder 'no/such/folder'"),
        (["--box_formats", "latin"], "box format 'latin' is not known"),
        (["--box_formats", "other=llava"], "is for a model 'other'"),
        (["--records", "none.jsonl"], "none.jsonl"),
        (["--reward", "grounding"], "reward 'grounding' failed on record 'r0'"),
        (["--image_root", "/nowhere"], "does not exist"),
        (["--bleu_tokenize", "elvish"], "bleu_tokenize: sacrebleu has no tokenizer 'elvish'"),
        (["--processor_options", "{"], "processor_options must be a JSON or YAML mapping"),
    ],
)
def test_bad_input_is_named_before_any_model_is_loaded(
    project: Path,
    arguments: list[str],
    message: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ModelSource, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.delenv("PERPO_TRACEBACK", raising=False)
    try:
        code: Any = run(project, *arguments)
    except SystemExit as stop:
        code = stop.code
    assert code != 0
    assert message in capfd.readouterr().err


def test_records_without_a_task_or_an_answer_are_named(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for record, message in (
        (ListRecord("r", None, "?", "x"), "record 'r' names no task"),
        (ListRecord("r", None, "?", None, "ocr"), "answer: is missing"),
        (ListRecord("r", None, "?", "no box", "grounding"), "answer must be a box"),
    ):
        write_records([record], project / "held_out.jsonl")
        assert run(project) == 1
        assert message in capfd.readouterr().err


def test_bad_truths_and_damaged_pictures_are_named_or_skipped_for_every_model(
    project: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = ListRecord("pixels", None, "Where?", [10, 20, 300, 400], "grounding")
    with monkeypatch.context() as patch:
        patch.setattr(ModelSource, "load", lambda *_, **__: pytest.fail("a model was loaded"))
        save_records(project, [*ocr_records(2), pixels])
        assert run(project) == 1
        assert "failed on record 'pixels'" in capfd.readouterr().err
        save_records(project, [*ocr_records(3), pixels])
        whole = (project / "r1.png").read_bytes()
        (project / "r1.png").write_bytes(whole[: len(whole) // 2])
        assert run(project, "--reward", "ocr-words", "--limit", "3") == 1
        assert "record 'r1': image" in capfd.readouterr().err
    assert run(project, "--skip_bad", "--n", "0") == 0
    assert "NOTE 2 bad records were skipped; the first: " in capfd.readouterr().out
    assert [task["n_records"] for task in figures(project)["tasks"]] == [2]


def test_too_little_memory_is_said_with_what_to_set(
    project: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(TransformersSampler, "sample", full)
    assert run(project) == 1
    assert "out of memory\nset batch_size to fewer answers" in capfd.readouterr().err


def test_the_format_of_a_model_goes_before_that_of_all() -> None:
    config = EvaluationConfig(["a=x"], "r.jsonl", "out", box_formats=["qwen3-vl", "b=internvl"])
    assert (config.box_format_of("a"), config.box_format_of("b")) == ("qwen3-vl", "internvl")
    assert EvaluationConfig(["a=x"], "r.jsonl", "out").box_format_of("a") is None


def test_help_lists_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for name in ("--models", "--records", "--output", "--max_new_tokens", "--blank_test"):
        assert name in shown
