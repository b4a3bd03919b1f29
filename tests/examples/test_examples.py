"""The programs in examples/ run as they stand, and learn."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from ..processes import ROOT, ranks

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
    both = ranks(2, str(EXAMPLES / "accelerate_loop.py"), ACCELERATE_USE_CPU="true")
    shown = [one.communicate() for one in both]
    assert [one.returncode for one in both] == [0, 0], shown
    assert [printed.count("loss ") for printed, _ in shown] == [2, 0]


def test_the_lightning_module_learns(example: Any, tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="lightning is no part of perpo[test]")
    logged = example("lightning_module").main(
        accelerator="cpu", enable_progress_bar=False, default_root_dir=str(tmp_path)
    )
    assert logged["lists/active"] > 0.9
    assert logged["rewards/margins"] > 0.1
