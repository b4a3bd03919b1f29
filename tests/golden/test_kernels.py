"""Every kernel configuration has the Triton IR that is kept in the tree; a change names the configurations it touches.

The kernels are compiled in a process of their own: in this one they may be interpreted functions.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("tests.golden.kernels")

ROOT = Path(__file__).parents[2]
TRITON_FILES = Path("perpo_kernels/backends/triton")
ROW_KERNELS = ("log_prob_rows", "fused_rows_", "grad_rows_", "grad_rows_ (out)")

pinned = pytest.mark.skipif(
    triton.__version__ != kernels.kept()["triton"],
    reason=f"the hashes are of Triton {kernels.kept()['triton']}, this is {triton.__version__}",
)


def replay(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "tests.golden.kernels", "--ir", "--jobs", "1", *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


@pinned
@pytest.mark.parametrize(
    "targets", [["*/sm_90", "*/gfx942"], pytest.param(["*"], marks=pytest.mark.slow)], ids=" ".join
)
def test_every_configuration_has_the_kept_ir(targets: list[str]) -> None:
    done = replay(ROOT, "--only", *targets)
    assert done.returncode == 0, (
        f"{done.stdout}{done.stderr}\n`python -m tests.golden.kernels` says which of them compile to other code. If "
        "the kernels are meant to change, renew the file with --write and say why in the commit"
    )


def test_the_file_holds_both_hashes_of_all_configurations_and_no_others() -> None:
    hashes = kernels.kept()["hashes"]
    assert list(hashes) == kernels.names()
    assert all(set(pair) == {"ir", "code"} for pair in hashes.values())
    for name, pair in hashes.items():  # which is why the front end runs for one of them above
        kernel, _, target = name.rpartition("/")
        assert target == "gfx942" or pair["ir"] == hashes[f"{kernel}/sm_90"]["ir"], name


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the tree, in another folder, whose kernels a test may change."""
    for folder in ("perpo_kernels", "benchmarks", "tests/golden"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    return tmp_path


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text, f"{file.name} no longer holds {old!r}; choose another line"
    file.write_text(text.replace(old, new))


@pinned
def test_a_changed_line_names_the_configurations_that_it_touches(copy: Path) -> None:
    edit(
        copy / TRITON_FILES / "common.py", "8.023904131956376e-07", "8.023904131956376e-06"
    )  # in tanh, which a soft cap alone takes
    done = replay(copy, "--only", "*rows*/bf16 32000/sm_90", "*rows*/bf16 262208*/sm_90")
    assert done.returncode == 1, done.stderr
    named = {line.split(":")[0] for line in done.stdout.splitlines()[1:]}
    assert named == {f"{kernel}/bf16 262208 capped" for kernel in ROW_KERNELS}


@pinned
def test_names_and_line_numbers_change_nothing(copy: Path) -> None:
    for file in (copy / TRITON_FILES).glob("*.py"):
        file.write_text("# another first line\n" + file.read_text().replace("lane_mask", "lanes_inside"))
    edit(copy / TRITON_FILES / "common.py", "row_total", "sum_of_the_row")
    every_kernel = "*/bf16 32000/sm_90", "*/bf16 262208 capped/sm_90", "list_loss*/k 20/sm_90", "list_loss*mdpo/sm_90"
    done = replay(copy, "--only", *every_kernel)
    assert done.returncode == 0, done.stdout + done.stderr


def test_differences_are_told_apart() -> None:
    kept = {"a/b/sm_80": {"ir": "1", "code": "1"}, "a/b/sm_90": {"ir": "1", "code": "1"}, "a/c/sm_90": {"ir": "1"}}
    made = {"a/b/sm_80": {"ir": "2", "code": "1"}, "a/b/sm_90": {"ir": "2", "code": "2"}, "a/d/sm_90": {"ir": "1"}}
    found = kernels.differences(kept, made)
    assert found == {
        "a/b/sm_80": "other ir",
        "a/b/sm_90": "other ir and code",
        "a/c/sm_90": "gone",
        "a/d/sm_90": "new",
    }
    assert kernels.differences(kept, {name: {"ir": "1"} for name in kept}) == {}  # the front end alone
    assert kernels.report({"a/b/x": "new", "a/b/y": "new"}) == "a/b: new (x, y)"
