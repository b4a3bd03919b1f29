"""The notebook as it is committed: clean, and its cells run in order, on a few pictures, or whole if slow tests run."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


def cells(kind: str) -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """All cells, in a folder of their own; their names afterwards."""
    import matplotlib

    matplotlib.use("Agg")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    scope: dict[str, Any] = {"__name__": "__main__"}
    for i, source in enumerate(cells("code")):
        exec(compile(source, f"{NOTEBOOK.name}, code cell {i}", "exec"), scope)
    matplotlib.pyplot.close("all")
    return scope


def test_the_notebook_is_clean() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        keys = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            keys |= {"outputs", "execution_count"}
        assert set(cell) == keys
        assert cell["metadata"] == {}
        assert all(line.endswith("\n") for line in cell["source"][:-1])


def test_its_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", "\n".join(cells("markdown")))
    assert targets
    assert all((NOTEBOOK.parent / target).exists() for target in targets)


def test_its_cells_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PERPO_NOTEBOOK_SMALL", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    scope = run(tmp_path, monkeypatch)
    torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert "6 lists, 24 answers; mean reward" in shown
    assert "loss 0.6931" in shown
    assert "(too few records)" in shown
    assert len(scope["change"]) == 6
    assert (tmp_path / "quickstart_output" / "run" / "README.md").exists()


@pytest.mark.slow
def test_it_takes_less_than_five_minutes_and_the_model_gets_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PERPO_NOTEBOOK_SMALL", raising=False)
    started = time.monotonic()
    scope = run(tmp_path, monkeypatch)
    assert time.monotonic() - started < 300
    change = scope["change"].values()
    assert sum(change) / len(change) > 0.02
