"""Start `tests.distributed.run_cases`, and compare what runs have written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def launch(cases: dict[str, Any], folder: Path, n: int = 2, **environment: str) -> list[dict[str, Any]]:
    """What each process noted of each case.

    Args:
        cases: name -> {"argv": […], "of_rank": {rank: […]}}.
    """
    folder.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    command += ["-m", "tests.distributed.run_cases", str(folder / "cases.json"), str(folder)]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(n)]
    assert all(each.keys() == cases.keys() for each in found)
    return found


def log(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def assert_same_run(ours: Path, theirs: Path, rel: float = 1e-4) -> None:
    """The same losses, gradients and metrics at every step, and the same weights in the end, to rounding."""
    our_log, their_log = log(ours), log(theirs)
    assert [entry["step"] for entry in our_log] == [entry["step"] for entry in their_log]
    compared = set()
    for mine, other in zip(our_log, their_log, strict=True):
        for name, value in other.items():
            if name.endswith(("loss", "grad_norm")) or "rewards/" in name or "logps/" in name or "lists/" in name:
                assert mine[name] == pytest.approx(value, rel=rel, abs=1e-5), (mine["step"], name)
                compared.add(name)
    assert {"loss", "grad_norm", "rewards/chosen", "logps/rejected"} <= compared
    (file,) = [path.name for path in theirs.glob("*model.safetensors")]
    found, expected = load_file(ours / file), load_file(theirs / file)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-5 * max(1, value.abs().max()), name
