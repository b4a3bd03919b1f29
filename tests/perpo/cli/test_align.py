"""`perpo align`: rounds of the other commands, which go on wherever they were killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from perpo.cli import align
from perpo.cli.main import main

from .. import tiny_models

ROOT = Path(__file__).parents[3]
Shown = pytest.CaptureFixture[str]
ANSWER = "".join(map(chr, range(32, 127)))  # random bytes have some of it
pytestmark = pytest.mark.filterwarnings("ignore::perpo.rewards.scoring.UnreadableAnswers")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    model, processor = tiny_models.build("llava")
    model.save_pretrained(tmp_path / "tiny")
    processor.save_pretrained(tmp_path / "tiny")
    rows = []
    for i in range(6):
        tiny_models.picture((40, 28), i).save(tmp_path / f"{i}.png")
        rows.append({"id": f"r{i}", "image": f"{i}.png", "prompt": "Read it.", "answer": ANSWER, "task": "ocr"})
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    settings = {
        "model": str(tmp_path / "tiny"),
        "records": str(tmp_path / "records.jsonl"),
        "held_out": str(tmp_path / "held_out.jsonl"),
        "image_root": str(tmp_path),
        "output_dir": str(tmp_path / "run"),
        "lists_per_round": 4,
        "stop_when_worse": False,
        "generate": {"k": 3, "max_new_tokens": 5},
        "train": {"lora_r": 2, "learning_rate": 0.01, "use_cpu": True, "report_to": "none", "disable_tqdm": True},
        "evaluate": {"n": 0, "blank_test": False, "max_new_tokens": 5, "resamples": 50, "device": "cpu"},
    }
    settings["train"] |= {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1}
    (tmp_path / "align.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands that were run, as "round-1 generate"; here, in this process."""
    done: list[str] = []

    def run(step: align.Step) -> None:
        done.append(f"{step.file.parent.name} {step.command}")
        assert main([step.command, "--config", str(step.file)]) == 0

    monkeypatch.setattr(align, "_run", run)
    return done


def run(project: Path, *options: str) -> int:
    return main(["align", "--config", str(project / "align.yaml"), *options])


def written(project: Path, name: str) -> dict[str, Any]:
    return yaml.safe_load((project / "run" / name).read_text())


def weights(project: Path, number: int) -> dict[str, torch.Tensor]:
    return load_file(project / "run" / f"round-{number}" / "model" / "adapter_model.safetensors")


ROUNDS = [
    "evaluation evaluate",
    "round-1 generate",
    "round-1 train",
    "evaluation evaluate",
    "round-2 generate",
    "round-2 train",
    "evaluation evaluate",
]


def test_each_round_starts_from_the_last_and_more_rounds_go_on(project: Path, steps: list[str], capsys: Shown) -> None:
    assert run(project) == 0
    assert steps == ROUNDS[:4]
    first = weights(project, 1)
    assert run(project, "--rounds", "2") == 0
    assert steps == ROUNDS
    assert all(torch.equal(value, first[name]) for name, value in weights(project, 1).items())
    assert any(not torch.equal(value, first[name]) for name, value in weights(project, 2).items())
    shown = capsys.readouterr().out
    assert f"the last model: {project / 'run' / 'round-2' / 'model'}" in shown
    assert shown.count("  best") == 2
    assert "training continues with the adapters" in shown
    model = str(project / "run" / "round-1" / "model")
    for command in ("generate", "train"):
        assert written(project, f"round-2/{command}.yaml")["model_name_or_path"] == model
        seeds = [written(project, f"round-{number}/{command}.yaml")["seed"] for number in (1, 2)]
        assert seeds[1] == seeds[0] + 1
    evaluated = json.loads((project / "run" / "evaluation" / "evaluation.json").read_text())["tasks"][0]["models"]
    assert list(evaluated) == ["start", "round-1", "round-2"]
    assert run(project, "--rounds", "2") == 0
    assert steps == ROUNDS  # nothing is done twice


def test_a_round_takes_other_records_until_all_had_their_turn(project: Path, steps: list[str]) -> None:
    settings = yaml.safe_load((project / "align.yaml").read_text())
    del settings["held_out"]
    (project / "align.yaml").write_text(yaml.safe_dump(settings))
    assert run(project, "--rounds", "3", "--lists_per_round", "2", "--output_dir", str(project / "three")) == 0
    seen = [
        json.loads(line)["id"]
        for number in (1, 2, 3)
        for line in (project / "three" / f"round-{number}" / "lists.jsonl").read_text().splitlines()
    ]
    assert sorted(seen) == [f"r{i}" for i in range(6)]
    assert not (project / "three" / "evaluation").exists()


@pytest.mark.parametrize(
    ("reference", "lora", "expected"),
    [
        ("round", True, {"reference": "start"}),
        ("first", True, {"reference": "adapter_off"}),
        ("first", False, {"reference": "model", "ref_model_name_or_path": "TINY"}),
        ("none", True, {"reference": "none"}),
    ],
)
def test_the_reference_is_the_rounds_start_or_the_first_model(
    project: Path, reference: str, lora: bool, expected: dict[str, str]
) -> None:
    config = align.AlignConfig(
        str(project / "tiny"), str(project / "records.jsonl"), "run", reference=reference, train={"lora": lora}
    )
    made = align._reference(config, str(project / "run" / "round-1" / "model"))
    assert made == {name: value.replace("TINY", str(project / "tiny")) for name, value in expected.items()}


def test_it_stops_when_the_held_out_metric_falls_out_of_the_best_rounds_interval(
    project: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Shown
) -> None:
    values = {"start": 0.5, "round-1": 0.6, "round-2": 0.52, "round-3": 0.4, "round-4": 0.7}

    def tasks(folder: Path) -> list[dict[str, Any]]:
        models = {
            name: {"metrics": {"iou": {"greedy": {"value": v, "low": v - 0.1, "high": v + 0.1}}}}
            for name, v in values.items()
        }
        about = {"iou": {"label": "mean IoU", "higher_is_better": True}}
        return [{"task": "grounding", "n_records": 9, "metrics": about, "models": models}]

    monkeypatch.setattr(align, "_tasks", tasks)
    monkeypatch.setattr(align, "_run", lambda step: None)
    assert run(project, "--rounds", "4", "--stop_when_worse", "true") == 0
    shown = capsys.readouterr().out
    assert "stopped after round-3: mean IoU of grounding is 0.400, that of round-1 0.600 [0.500, 0.700]" in shown
    assert "round-4" not in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "rounds must be ≥ 1, got 0"),
        (["--train", "{output_dir: x}"], "train: 'output_dir' is set by `perpo align`"),
        (["--generate", "{dtype: float32}"], "generate: 'dtype' is set by `perpo align`"),
        (
            ["--generate", "{engine: openai}", "--rounds", "2"],
            "every round would sample from the model that the server",
        ),
        (["--train", "{learning_rte: 1}"], "did you mean 'learning_rate'?"),
        (["--evaluate", "{n: many}"], "argument --n: invalid int value"),
        (["--train", "[1]"], "train"),
        (["--model", "nowhere"], "there is no folder 'nowhere'"),
        (["--reference", "last"], "invalid choice"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    project: Path, options: list[str], message: str, steps: list[str], capsys: Shown
) -> None:
    try:
        status = run(project, *options)
    except SystemExit as end:  # of the parser
        status = int(end.code or 0)
    assert status != 0
    assert message in capsys.readouterr().err
    assert steps == []


def test_other_settings_do_not_go_on_with_rounds_that_are_there(project: Path, steps: list[str], capsys: Shown) -> None:
    assert run(project) == 0
    assert run(project, "--train", "{lora_r: 3}") == 1
    assert "holds rounds that this run cannot take as its own; different: train" in capsys.readouterr().err
    assert len(steps) == 4


@pytest.mark.slow
def test_killed_at_twenty_places_it_ends_with_the_same_weights(project: Path) -> None:
    command = [sys.executable, "-m", "perpo", "align", "--config", str(project / "align.yaml"), "--rounds", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = [*command, "--output_dir", str(project / "whole")]
    begin = time.monotonic()
    subprocess.run(whole, cwd=ROOT, env=environment, check=True, capture_output=True)
    took = time.monotonic() - begin
    generator, kills = random.Random(0), 0
    places = set()
    while kills < 20:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            process.wait(generator.uniform(0.05, 0.5) * took)
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, generator.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
            process.wait(60)
            kills += 1
            places.add(tuple(sorted(str(path) for path in (project / "run").rglob("*.*"))))
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert len(places) > 3
    for number in (1, 2):
        ours = weights(project, number)
        theirs = load_file(project / "whole" / f"round-{number}" / "model" / "adapter_model.safetensors")
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
