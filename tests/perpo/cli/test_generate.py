"""`perpo generate`: from files to scored lists, over kills and several processes, and errors that say what to do."""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from perpo.cli import main as cli
from perpo.data.read import read_records
from perpo.encoding.encoder import Encoder
from perpo.model.load import load_model, load_processor
from perpo.rewards.scoring import UnreadableAnswers

from ...processes import ranks, start
from .. import tiny_models
from ..chat_server import ChatServer, running

pytestmark = pytest.mark.filterwarnings("ignore::perpo.rewards.scoring.UnreadableAnswers")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    made, processor = tiny_models.build("llava")
    made.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A tiny model is slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def project(tmp_path: Path, model: Path) -> Path:
    """A folder with images, records with true answers and a config file."""
    rows = []
    for i in range(6):
        tiny_models.picture((40, 28), i).save(tmp_path / f"{i}.png")
        row: dict[str, Any] = {"id": f"r{i}", "image": f"{i}.png", "prompt": "Read it.", "answer": "ab1"}
        rows.append(row | ({"task": "ocr-words"} if i == 5 else {}))
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model_name_or_path": str(model),
        "records": str(tmp_path / "records.jsonl"),
        "output": str(tmp_path / "lists.jsonl"),
        "image_root": str(tmp_path),
        "task": "ocr",
        "k": 3,
        "max_new_tokens": 6,
        "temperature": 1.5,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def run(project: Path, *arguments: str) -> int:
    return cli.main(["generate", "--config", str(project / "run.yaml"), *arguments])


def test_from_files_to_scored_lists(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {
        "--records": project / "records.jsonl",
        "--output": project / "more.jsonl",
        "--image-root": project,
        "--k": 4,
        "--temperature": 1.2,
        "--top-p": 0.99,
        "--max-new-tokens": 5,
        "--seed": 7,
        "--task": "grounding",
        "--answer-format": "qwen3-vl",
        "--reward": "ocr",
    }
    model = yaml.safe_load((project / "run.yaml").read_text())["model_name_or_path"]
    spelled = [str(word) for pair in arguments.items() for word in pair]
    assert cli.main(["generate", f"--model={model}", *spelled]) == 0
    shown = capsys.readouterr()
    assert "6 lists, 24 answers; mean reward 0." in shown.out
    assert f"written to {project / 'more.jsonl'}" in shown.out
    assert "6/6" in shown.err
    assert "list/s, reward 0." in shown.err or "s/list, reward 0." in shown.err
    lists, _ = read_records(project / "more.jsonl", check_images=True, root=project)
    assert [one.task for one in lists] == ["grounding/qwen3-vl"] * 5 + ["ocr-words"]
    assert all(one.k == len(set(one.responses)) == 4 for one in lists)
    identity = json.loads((project / "more.jsonl.parts" / "identity.json").read_text())
    assert identity.items() >= {"k": "4", "top_p": "0.99", "max_new_tokens": "5", "seed": "7", "reward": "ocr"}.items()


def test_answers_in_another_format_are_loud(project: Path) -> None:
    records = (project / "records.jsonl").read_text().replace('"ab1"', "[0, 0, 0.5, 0.5]").replace("ocr-words", "")
    (project / "records.jsonl").write_text(records)
    with pytest.warns(UnreadableAnswers, match=r"18 of 18 answers could not be read(?s:.)*bbox_2d"):
        assert run(project, "--task", "grounding", "--answer_format", "qwen3-vl") == 0


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(project: Path) -> None:
    """SIGKILL in the middle of sampling."""
    few = [json.loads(line) for line in (project / "records.jsonl").read_text().splitlines()]
    rows = [few[i % 5] | {"id": f"m{i}"} for i in range(200)]
    (project / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    process = start("-m", "perpo", "generate", "--config", str(project / "run.yaml"))
    shard = project / "lists.jsonl.parts" / "shard-00000.jsonl"
    end = time.monotonic() + 120
    while not (shard.exists() and shard.read_bytes().count(b"\n") >= 3):
        assert process.returncode is None, process.output
        assert time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    before = shard.read_bytes()
    finished = before.count(b"\n")
    assert 3 <= finished < 150
    assert not (project / "lists.jsonl").exists()
    rows = rows[: finished + 4]  # the rest is no part of this test
    (project / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(project) == 0
    after = shard.read_bytes()
    assert after.startswith(before[: before.rfind(b"\n") + 1])
    assert [json.loads(line)["id"] for line in after.splitlines()] == [row["id"] for row in rows]
    assert run(project, "--output", str(project / "undisturbed.jsonl")) == 0
    assert (project / "lists.jsonl").read_bytes() == (project / "undisturbed.jsonl").read_bytes()


def test_a_process_killed_beside_another_goes_on_alone(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [json.loads(line) for line in (project / "records.jsonl").read_text().splitlines()]
    rows = [few[i % 5] | {"id": f"m{i}"} for i in range(40)]
    (project / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    processes = ranks(2, "-m", "perpo", "generate", "--config", str(project / "run.yaml"))
    shards = [project / "lists.jsonl.parts" / f"shard-0000{rank}.jsonl" for rank in range(2)]
    end = time.monotonic() + 120
    while not (shards[1].exists() and shards[1].read_bytes().count(b"\n") >= 2):
        assert processes[1].returncode is None, processes[1].output
        assert time.monotonic() < end
        time.sleep(0.01)
    processes[1].kill()
    processes[1].wait(60)
    shown = "".join(processes[0].communicate(timeout=120))
    assert processes[0].returncode == 0, shown
    finished = shards[1].read_bytes().count(b"\n")
    still = re.search(r"(\d+) records are still with other processes", shown)
    assert still, shown
    assert 20 - finished <= int(still[1]) <= 20  # the other may have been killed after this one had counted
    assert not (project / "lists.jsonl").exists()
    before = [shard.read_bytes() for shard in shards]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(project) == 0
    monkeypatch.undo()
    after = [shard.read_bytes() for shard in shards]
    assert after[0] == before[0]
    assert after[1].startswith(before[1][: before[1].rfind(b"\n") + 1])
    ids = [[json.loads(line)["id"] for line in shard.splitlines()] for shard in after]
    assert ids == [[row["id"] for row in rows[rank::2]] for rank in range(2)]
    assert run(project, "--output", str(project / "undisturbed.jsonl")) == 0
    assert (project / "lists.jsonl").read_bytes() == (project / "undisturbed.jsonl").read_bytes()


def test_processes_share_the_records_and_the_last_writes(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, message in ((1, "3 records are still with other processes"), (0, "written to")):
        assert not (project / "lists.jsonl").exists()
        monkeypatch.setenv("RANK", str(rank))
        assert run(project) == 0
        assert message in capsys.readouterr().out
    shards = sorted((project / "lists.jsonl.parts").glob("shard-*.jsonl"))
    ids = [[json.loads(line)["id"] for line in shard.read_text().splitlines()] for shard in shards]
    assert ids == [["r0", "r2", "r4"], ["r1", "r3", "r5"]]
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert run(project, "--output", str(project / "alone.jsonl")) == 0
    assert (project / "alone.jsonl").read_bytes() == (project / "lists.jsonl").read_bytes()


def test_an_adapter_is_sampled_from_and_told_from_another(
    project: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        tuned = get_peft_model(load_model(str(model)), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        tuned.save_pretrained(project / name)
        load_processor(str(model)).save_pretrained(project / name)
    assert run(project) == 0
    capsys.readouterr()
    assert run(project, "--model", str(project / "one")) == 1
    assert "different: adapters (none there, " in capsys.readouterr().err
    assert run(project, "--model", str(project / "one"), "--output", str(project / "one.jsonl")) == 0
    assert (project / "one.jsonl").read_bytes() != (project / "lists.jsonl").read_bytes()
    assert run(project, "--model", str(project / "two"), "--output", str(project / "one.jsonl")) == 1


def test_another_model_or_setting_is_refused(
    project: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(project) == 0
    other = tmp_path_factory.mktemp("other")
    made, processor = tiny_models.build("llava", seed=1)
    made.save_pretrained(other)
    processor.chat_template += " "
    processor.save_pretrained(other)
    capsys.readouterr()
    assert run(project, "--model", str(other), "--seed", "3") == 1
    error = capsys.readouterr().err
    for difference in ("chat template (", "seed (0 there, 3 now)", "weights ("):
        assert difference in error
    assert "Traceback" not in error


def test_bad_records_are_named_or_skipped(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "3.png").write_text("no image")
    with (project / "records.jsonl").open("a") as file:
        file.write("{not json\n")
    assert run(project) == 1
    assert "records.jsonl:7: not valid JSON" in capsys.readouterr().err
    lines = (project / "records.jsonl").read_text().splitlines()
    (project / "records.jsonl").write_text("\n".join(lines[:6]))
    assert run(project) == 1
    assert "record 'r3': image" in capsys.readouterr().err
    assert run(project, "--skip-bad") == 0
    assert "1 bad records skipped" in capsys.readouterr().out
    assert len(read_records(project / "lists.jsonl")[0]) == 5


def test_bad_truths_and_missing_images_are_known_before_the_model_is_loaded(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line) for line in (project / "records.jsonl").read_text().splitlines()]
    rows[4] |= {"task": "grounding", "answer": [10, 20, 300, 400]}  # pixels
    rows[5] |= {"image": "gone.png"}
    monkeypatch.setattr("perpo.model.settings.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    for bad, message in (
        (rows[:5], "records.jsonl:5: reward 'grounding' failed on record 'r4': ValueError: answer must be a box"),
        ([*rows[:4], rows[5]], "gone.png' does not exist"),
        ([*rows[:5], rows[4] | {"id": "r9"}], "(2 such records)"),
    ):
        (project / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
        assert run(project) == 1
        assert message in capsys.readouterr().err
    monkeypatch.undo()
    assert run(project, "--skip_bad") == 0
    shown = capsys.readouterr()
    assert "4 lists of 0 answers; 2 bad records skipped" in shown.out
    assert shown.err.count("skipped: ") == 2
    assert [record.id for record in read_records(project / "lists.jsonl")[0]] == ["r0", "r1", "r2", "r3"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "0"], "k must be ≥ 1"),
        (["--max_samples", "2"], "max_samples must be ≥ k = 3, got 2"),
        (["--temperature", "0"], "temperature=0 gives the same answer 3 times"),
        (["--top_p", "2"], "top_p must be in (0, 1]"),
        (["--answer_format", "qwen"], "box format 'qwen' is not known"),
        (["--reward", "no.such:thing"], "reward 'no.such:thing' cannot be imported"),
        (["--engine", "vllm"], "vllm cannot be imported"),
        (["--engine", "slow"], "invalid choice: 'slow'"),
        (["--engine_options", "{}}"], "engine_options must be a JSON or YAML mapping"),
        (["--engine_options", '{"a": 1}'], "set engine='vllm'"),
        (["--engine", "openai"], "base_url must be an address such as http://localhost:8000/v1, got None"),
        (["--base_url", "http://host/v1", "--request_retries", "2"], "base_url, request_retries: only for a server"),
        (["--engine", "openai", "--base_url", "http://host/v1", "--answers_at_once", "2"], "answers_at_once is for"),
        (["--task", ""], "record 'r0' names no task: set task or reward"),
        (["--output", "/nowhere/lists.jsonl"], "there is no folder '/nowhere'"),
        (["--output", "lists.csv"], "output must be a .jsonl or .parquet file"),
        (["--records", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--max_prompt_length", "7"], "record 'r0': max_prompt_length=7: this prompt has"),
    ],
)
def test_bad_settings_are_named(
    arguments: list[str],
    message: str,
    project: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    try:
        code = run(project, *arguments)
    except SystemExit as error:
        code = error.code
    error_shown = capsys.readouterr().err
    assert message in error_shown
    assert code in (1, 2)
    assert "Traceback" not in error_shown


def test_a_run_with_a_server_that_is_killed_goes_on_and_ends_as_if_it_had_not_been(project: Path) -> None:
    """SIGKILL with requests in flight: no record is answered twice but those, and the lists are the same."""
    few = [json.loads(line) for line in (project / "records.jsonl").read_text().splitlines()]
    rows = [few[i % 5] | {"id": f"m{i}"} for i in range(60)]
    (project / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = yaml.safe_load((project / "run.yaml").read_text())
    made = load_model(settings["model_name_or_path"])
    processor = load_processor(settings["model_name_or_path"])
    with running(ChatServer(Encoder.for_model(processor, made), ["served"])) as server:
        arguments = ["--engine", "openai", "--base_url", server.url, "--requests_in_flight", "4", "--k", "2"]
        assert run(project, *arguments, "--output", str(project / "whole.jsonl")) == 0
        asked = len(server.asked)
        server.asked.clear()
        server.seconds = 0.1
        process = start("-m", "perpo", "generate", "--config", str(project / "run.yaml"), *arguments)
        shard = project / "lists.jsonl.parts" / "shard-00000.jsonl"
        end = time.monotonic() + 120
        while not (shard.exists() and shard.read_bytes().count(b"\n") >= 8):
            assert process.returncode is None, process.output[1]
            assert time.monotonic() < end
            time.sleep(0.02)
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
        assert shard.read_bytes().count(b"\n") < 60
        server.seconds = 0.0
        assert run(project, *arguments) == 0
    assert len(server.asked) <= asked + 2 * 4
    assert (project / "lists.jsonl").read_bytes() == (project / "whole.jsonl").read_bytes()
    identity = json.loads((project / "lists.jsonl.parts" / "identity.json").read_text())
    assert (identity["engine"], identity["served model"]) == ("openai", "served")
    lists, _ = read_records(project / "lists.jsonl")
    assert [one.id for one in lists] == [f"m{i}" for i in range(60)]


def test_a_misspelt_rank_is_named(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(os.environ, "RANK", "first")
    assert run(project) == 1
    assert "RANK must be a number, got 'first'" in capsys.readouterr().err


def test_vllm_is_given_what_transformers_reads_off_the_model(
    project: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model's end tokens, its adapters and the type that it was saved in: vLLM's own choices are others."""
    asked: dict[str, Any] = {}

    def engine(name: str, encoder: Any, sampling: Any, options: dict[str, Any], *, adapter: str | None) -> Any:
        asked.update(name=name, ends=encoder.end_ids, adapter=adapter, **options)
        raise ValueError("no engine here")

    monkeypatch.setattr("perpo.cli.generate.VllmSampler", engine)
    made = load_model(str(model))
    ends = tuple(made.generation_config.eos_token_id)
    assert len(ends) == 2
    assert run(project, "--engine", "vllm", "--engine_options", '{"max_model_len": 99}') == 1
    assert "no engine here" in capsys.readouterr().err
    assert asked == {
        "name": str(model),
        "ends": ends,
        "adapter": None,
        "dtype": "float32",
        "trust_remote_code": False,
        "revision": None,
        "max_model_len": 99,
    }
    adapter = project / "adapter"
    adapted = get_peft_model(made, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(model)
    adapted.save_pretrained(adapter)
    load_processor(str(model)).save_pretrained(adapter)
    assert run(project, "--engine", "vllm", "--model", str(adapter), "--dtype", "bfloat16") == 1
    assert (asked["name"], asked["adapter"], asked["dtype"]) == (str(model), str(adapter), "bfloat16")
    assert asked["ends"] == ends

    bare = project / "bare"
    shutil.copytree(model, bare)
    (bare / "generation_config.json").unlink()
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"eos_token_id": ends[1]}))
    assert run(project, "--engine", "vllm", "--model", str(bare)) == 1
    assert asked["ends"] == (load_model(str(bare)).generation_config.eos_token_id,) == ends[1:]
