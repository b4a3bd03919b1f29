"""`import perpo_kernels`: light, quick, and possible without triton. Each in a fresh interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PERPO_BACKEND")} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORT = """
import json, sys, time
import torch
already = set(sys.modules)
start = time.process_time()
import perpo_kernels
print(json.dumps({"seconds": time.process_time() - start, "new": sorted(set(sys.modules) - already)}))
"""


@pytest.fixture(scope="module")
def imported() -> dict:
    return json.loads(python(IMPORT))


def test_import_takes_less_than_a_second_beyond_torch(imported):
    assert imported["seconds"] < 1.0


@pytest.mark.parametrize("package", ["triton", "transformers", "numpy", "torch._dynamo"])
def test_import_brings_in_no_other_package(imported, package):
    assert not [name for name in imported["new"] if name == package or name.startswith(package + ".")]


def test_import_does_not_bring_in_the_training_layer(imported):
    assert not [name for name in imported["new"] if name == "perpo" or name.startswith("perpo.")]


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, perpo_kernels as pk
print(pk.perpo_loss(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])).item())
try:
    pk.perpo_loss(torch.zeros(1, 2), torch.zeros(1, 2), backend="triton")
except ValueError as error:
    print(error)
"""


def test_without_triton_eager_works_and_triton_names_the_reason():
    loss, message = python(WITHOUT_TRITON, TRITON_INTERPRET="1").splitlines()
    assert float(loss) == pytest.approx(0.744397, abs=1e-5)
    assert message == (
        "backend='triton' can't be used: the package triton is not installed (pip install triton); "
        "use 'eager' or 'auto'"
    )


def test_a_broken_triton_does_not_break_the_import(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libcuda.so.1 is missing')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    code = WITHOUT_TRITON.replace('sys.modules["triton"] = None', "")
    loss, message = python(code, TRITON_INTERPRET="1", PYTHONPATH=path).splitlines()
    assert float(loss) == pytest.approx(0.744397, abs=1e-5)
    assert "importing triton failed" in message
    assert "libcuda.so.1 is missing" in message


def test_public_names():
    import perpo_kernels as pk

    for name in pk.__all__:
        assert getattr(pk, name) is not None
    assert {
        "token_log_probs", "linear_token_log_probs", "perpo_loss", "linear_perpo_loss", "PerPOLoss", "LinearPerPOLoss",
        "objectives",
    } <= set(pk.__all__)  # fmt: skip
