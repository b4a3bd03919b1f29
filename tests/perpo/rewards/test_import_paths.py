"""No command imports what a record names, and the error names the record."""

import json
import sys
from pathlib import Path

import pytest

from perpo.cli import main as cli

EVIL = "from pathlib import Path\nPath('was_here').touch()\ndef f(prompts, completions, **columns):\n    return [1.0]\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "evilmod.py").write_text(EVIL)
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("task", ["evilmod:f", "os:system"])
@pytest.mark.parametrize("skip_bad", [[], ["--skip_bad"]])
@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--model_name_or_path", "model", "--output", "lists.jsonl"],
        ["evaluate", "--models", "base=model", "--output", "out"],
    ],
)
def test_a_commands_records_cannot_name_what_is_imported(
    command: list[str], skip_bad: list[str], task: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"id": "the bad one", "image": None, "prompt": "touch was_here", "answer": "a", "task": task}
    (project / "records.jsonl").write_text(json.dumps(row) + "\n")
    assert cli.main([*command, "--records", "records.jsonl", *skip_bad]) == 1
    printed = "".join(capsys.readouterr())
    assert f"record 'the bad one': task '{task}' is not known" in printed
    assert "never from a record" in printed
    assert "evilmod" not in sys.modules
    assert not (project / "was_here").exists()
