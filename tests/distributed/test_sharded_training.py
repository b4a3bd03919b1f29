"""`perpo train` on two processes that share the weights equals one process, to rounding."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from perpo.cli import main as cli

from ..perpo import tiny_models, tiny_runs
from .launch import ROOT, assert_same_run, launch

SHARDED = ["--fsdp", "full_shard"]
FULL = ["--lora", "false", "--train_lm_head", "true"]
EVALUATED = ["--eval_strategy", "steps", "--eval_steps", "1"]


class Project:
    """The files of a run, and commands over them. Three lists: the last step of a pass has one, and one to fill up."""

    def __init__(self, folder: Path) -> None:
        self.folder = tiny_runs.save_run(folder, learning_rate=1e-2, optim="sgd", max_steps=3)
        lists = (folder / "lists.jsonl").read_text().splitlines(keepends=True)
        tiny_models.build("llava", seed=1)[0].save_pretrained(folder / "b")
        (folder / "lists.jsonl").write_text("".join(lists[:3]))
        (folder / "other.jsonl").write_text("".join(lists[1:]))

    def argv(self, output: str, *options: str) -> list[str]:
        """Of `perpo train`."""
        return ["train", "--config", str(self.folder / "run.yaml"), "--output_dir", str(self.folder / output), *options]

    def file(self, name: str) -> str:
        return str(self.folder / name)

    def alone(self, name: str, *options: str) -> Path:
        """The folder of the same run in this process."""
        assert cli.main(self.argv(f"{name} alone", "--gradient_accumulation_steps", "2", *options)) == 0
        return self.folder / f"{name} alone"


def runs(project: Project) -> dict[str, list[str]]:
    evaluated = ["--eval_file", project.file("lists.jsonl"), *EVALUATED]
    reference = ["--reference", "model", "--ref_model_name_or_path", project.file("model")]
    return {
        "adapters": evaluated,
        "all weights": [*FULL, *evaluated],
        "adapter_off": ["--reference", "adapter_off"],
        "start": ["--reference", "start"],
        "second model": [*FULL, *reference],
        "several models": [
            "--reference",
            "model",
            "--ref_model_name_or_path",
            project.file("model"),
            project.file("b"),
        ],
    }


def check_sharded(name: str, found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank[name]["code"] == 0, rank[name]["stderr"]
        assert rank[name]["n"] > 50
        assert rank[name]["whole"] == [], name


def test_two_processes_that_share_the_weights_equal_one(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    project = Project(tmp_path)
    chosen = {name: runs(project)[name] for name in ("adapters", "all weights")}
    cases: dict[str, Any] = {name: {"argv": project.argv(name, *options, *SHARDED)} for name, options in chosen.items()}
    cases["seed"] = {"argv": project.argv("seed", *SHARDED), "of_rank": {"1": ["--seed", "7"]}}
    found = launch(cases, tmp_path / "launch")
    for name, options in chosen.items():
        check_sharded(name, found)
        assert_same_run(tmp_path / name, project.alone(name, *options))
    for rank in found:
        assert rank["seed"]["code"] == 1
        assert "different: seed (42 in process 0, 7 in process 1). Start all of them with" in rank["seed"]["stderr"]


@pytest.mark.slow
def test_all_references_on_two_processes(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    project = Project(tmp_path)
    chosen = {name: options for name, options in runs(project).items() if name not in ("adapters", "all weights")}
    found = launch(
        {name: {"argv": project.argv(name, *options, *SHARDED)} for name, options in chosen.items()},
        tmp_path / "launch",
    )
    for name, options in chosen.items():
        check_sharded(name, found)
        assert_same_run(tmp_path / name, project.alone(name, *options))


@pytest.mark.slow
def test_gradients_through_sharded_weights_equal_plain_ones() -> None:
    """The head in the root group and in one of its own."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *command, "-m", "tests.distributed.run_gradients"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
