"""The programs in examples/ run as they stand, and learn."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def test_the_accelerate_loop_learns(example: Any) -> None:
    losses = example("accelerate_loop").main()
    assert len(losses) == 2 * 16
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_the_accelerate_loop_runs_on_two_processes() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 300, "check": False}
    done = subprocess.run([*command, str(EXAMPLES / "accelerate_loop.py")], env=environment, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("loss ") == 2


def test_the_lightning_module_learns(example: Any, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="lightning is no part of perpo[test]")
    logged = example("lightning_module").main(
        accelerator="cpu", enable_progress_bar=False, default_root_dir=str(tmp_path)
    )
    assert logged["lists/active"] > 0.9
    assert logged["rewards/margins"] > 0.1
