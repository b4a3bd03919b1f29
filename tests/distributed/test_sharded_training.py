"""`perpo train` on two processes that share the weights equals one process, to rounding."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from perpo.cli import main as cli

from .launch import ROOT, assert_alike_in_bf16, assert_same_run, launch
from .project import FULL, Project, check_sharded

SHARDED = ["--fsdp", "full_shard"]


def test_two_processes_that_share_the_weights_equal_one(tmp_path: Path) -> None:
    project = Project(tmp_path)
    chosen = {name: project.runs()[name] for name in ("adapters", "all weights")}
    cases: dict[str, Any] = {name: {"argv": project.argv(name, *options, *SHARDED)} for name, options in chosen.items()}
    bf16 = ["--bf16", "true"]
    cases["bf16"] = {"argv": project.argv("bf16", *bf16, *SHARDED)}
    cases["lists"] = {
        "argv": project.argv("lists", *SHARDED),
        "of_rank": {"1": ["--train_file", project.file("other.jsonl")]},
    }
    cases["seed"] = {"argv": project.argv("seed", *SHARDED), "of_rank": {"1": ["--seed", "7"]}}
    found = launch(cases, tmp_path / "launch")
    for name, options in chosen.items():
        check_sharded(name, found)
        assert_same_run(tmp_path / name, project.alone(name, *options))
    check_sharded("bf16", found)
    assert_alike_in_bf16(tmp_path / "bf16", project.alone("bf16", *bf16))
    for rank in found:
        assert rank["lists"]["code"] == rank["seed"]["code"] == 1
        assert "different: lists" in rank["lists"]["stderr"]
        assert "different: seed (42 in process 0, 7 in process 1). Start all of them with" in rank["seed"]["stderr"]


@pytest.mark.slow
def test_all_references_on_two_processes(tmp_path: Path) -> None:
    project = Project(tmp_path)
    chosen = {name: options for name, options in project.runs().items() if name not in ("adapters", "all weights")}
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


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_processes(tmp_path: Path) -> None:
    """From two to one and from one to two, in the middle of the second pass over three lists."""
    project = Project(tmp_path, optim="adamw_torch", learning_rate=1e-3, save_steps=1, save_strategy="steps")
    steps, twice = (
        {"begun": ["--max_steps", "3"], "ended": ["--max_steps", "5"]},
        ["--gradient_accumulation_steps", "2"],
    )
    kinds: dict[str, list[str]] = {"adapters": [], "all weights": FULL}

    def cases(n: int, part: str, suffix: str) -> dict[str, Any]:
        given = [*steps[part], *SHARDED, *(twice if n == 1 else [])]
        resume = ["--resume_from_checkpoint", "true"] if part == "ended" else []
        return {
            f"{name} {suffix}": {"argv": project.argv(f"{name} {suffix}", *options, *given, *resume)}
            for name, options in kinds.items()
        }

    found = launch(cases(2, "begun", "2 to 1"), tmp_path / "a")
    found += launch(cases(1, "ended", "2 to 1") | cases(1, "begun", "1 to 2"), tmp_path / "b", n=1)
    found += launch(cases(2, "ended", "1 to 2"), tmp_path / "c")
    for rank in found:
        for name, case in rank.items():
            assert (case["code"], case["whole"]) == (0, []), (name, case["stderr"])
    assert (
        "was written by 2 processes and is resumed by 1: with the same lists" in found[2]["adapters 2 to 1"]["stderr"]
    )
    for name, options in kinds.items():
        whole = project.alone(name, *steps["ended"], *options)
        for way in ("2 to 1", "1 to 2"):
            assert_same_run(tmp_path / f"{name} {way}", whole)
    other = project.argv("adapters 2 to 1", *twice, *steps["ended"], "--resume_from_checkpoint", "true")
    assert cli.main(other) == 1
