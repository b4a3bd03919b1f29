"""The benchmarks collect, run once at tiny sizes, and write rows that the report can read. No time is asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROW_KEYS = {
    "question", "case", "peer", "time_ms", "ratio_to_floor", "ratio_to_ours", "peak_extra_bytes", "shapes", "dtype",
    "clock", "device", "driver", "load", "torch", "triton", "python", "packages", "commit", "date",
    "ok", "reason", "extra",
}  # fmt: skip


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # one thread: the suite's workers share the cores
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **environment}
    # The command is a run of its own: pytest-benchmark refuses to measure what it takes for an xdist worker.
    env = {name: value for name, value in env.items() if name != "PYTEST_ADDOPTS" and "XDIST" not in name}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    command = ["-m", "pytest", "benchmarks", "--benchmark-only", "--tiny", "--rounds", "1", "--rows", str(path)]
    done = run(sys.executable, *command, "-p", "no:cacheprovider", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout + done.stderr
    (path.parent / "printed.txt").write_text(done.stdout)
    return path


def test_every_question_writes_complete_rows(rows_file):
    rows = json.loads(rows_file.read_text())
    questions = {path.stem.removeprefix("test_") for path in (ROOT / "benchmarks").glob("test_*.py")}
    assert {row["question"] for row in rows} == questions | {"linear_pairs"}
    for row in rows:
        assert set(row) == ROW_KEYS
        assert row["ok"] or row["reason"]
        if row["peer"] in ("perpo_kernels", "plain PyTorch"):
            assert row["ok"], row
            if row["question"] == "accuracy":
                assert set(row["extra"]) == {"log_probs", "loss", "d_hidden", "d_weight"}
                continue
            assert row["question"] == "memory" or row["time_ms"]["median"] > 0
            assert row["peak_extra_bytes"] >= 0


@pytest.mark.parametrize("options", [[], ["--short"]])
def test_the_report_shows_every_case(rows_file, options, tmp_path):
    done = run(sys.executable, "-m", "benchmarks.report", str(rows_file), "--into", str(tmp_path), *options)
    assert done.returncode == 0, done.stderr
    for row in json.loads(rows_file.read_text()):
        assert row["case"] in done.stdout
    drawn = {"tables.md", *(f"{name}-cpu.png" for name in ("floor", "memory", "prefix-sharing"))}
    assert {path.name for path in tmp_path.iterdir()} == (set() if options else drawn)


def test_the_run_prints_ours_every_peer_and_the_floor(rows_file):
    printed = (rows_file.parent / "printed.txt").read_text()
    assert "linear_loss: frozen tiny T64, float32" in printed
    for row in json.loads(rows_file.read_text()):
        assert f"  {row['peer']} " in printed
        assert row["ok"] or row["reason"] in printed


def test_rows_are_added_to_a_file_whole_or_not_at_all(tmp_path):
    from benchmarks import rows

    path = tmp_path / "results.json"
    rows.append(path, [{"a": 1}])
    with pytest.raises(TypeError):
        rows.append(path, [{"a": object()}])
    rows.append(path, [{"a": "π"}])
    assert rows.read(path) == [{"a": 1}, {"a": "π"}]
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_the_gpu_script_says_what_it_would_do_and_that_there_is_no_gpu():
    import torch

    done = run("bash", "benchmarks/gpu.sh", "--dry-run", "--stages", "tests,tune", "--out", "somewhere.json")
    assert "tests (at most" in done.stdout
    assert "benchmarks.tune --rows somewhere.json" in done.stdout
    assert "linear_loss" not in done.stdout
    if torch.cuda.is_available():
        assert done.returncode == 0
    else:
        assert done.returncode == 2
        assert "no CUDA device" in done.stderr


def test_the_gpu_script_writes_down_a_stage_that_fails_and_goes_on(tmp_path):
    out = tmp_path / "rows.json"
    # a Triton that cannot be imported: the tuner fails, the list loss does not need it
    broken = tmp_path / "site" / "triton"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('broken on purpose')")
    done = run(
        "bash", "benchmarks/gpu.sh", "--stages", "tune,list_loss", "--out", str(out),
        PERPO_BENCH_SMOKE="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(tmp_path / "site"),
    )  # fmt: skip
    rows = json.loads(out.read_text())
    stages = {row["case"]: row for row in rows if row["question"] == "stage"}
    assert done.returncode == 1, done.stdout + done.stderr
    assert not stages["tune"]["ok"]
    assert "broken on purpose" in stages["tune"]["reason"]
    assert stages["list_loss"]["ok"], stages["list_loss"]["reason"]
    assert any(row["question"] == "list_loss" for row in rows)
    assert "| stage | tune |" in done.stdout
