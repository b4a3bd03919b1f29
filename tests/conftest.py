"""Where tests run: on the first CUDA device if there is one, otherwise on the CPU with Triton's interpreter."""

import atexit
import gc
import importlib.util
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from .interpreter import replace_once_a_launch

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: must come before any import of the kernels
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one thread a worker: the workers share the cores
for variable in ("PERPO_BACKEND", "PERPO_CHECK"):  # the shell's settings are not the suite's
    os.environ.pop(variable, None)

settings.register_profile(
    "perpo",
    deadline=None,  # the first example compiles kernels
    derandomize=True,
    database=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("perpo")

has_triton = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not has_triton, reason="triton has no package for this platform")
if has_triton and DEVICE.type == "cpu":
    replace_once_a_launch()


def pytest_collection_finish() -> None:
    """What was imported stays: collections of garbage, of which accelerate makes one a training, leave it out."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # nanobind counts what is left at the end


@pytest.fixture
def device() -> torch.device:
    """The device that the kernels run on; every tensor of a test lives there."""
    return DEVICE


@pytest.fixture(params=["eager", pytest.param("triton", marks=needs_triton)])
def backend(request: pytest.FixtureRequest) -> str:
    """Each implementation of the primitives; Triton runs in its interpreter where there is no GPU."""
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def write_docs() -> Any:
    """write_docs(page, header, rows): the table under this header has these rows; PERPO_WRITE_DOCS=1 writes it."""

    def compare(page: Path, header: str, rows: list[str]) -> None:
        text = page.read_text(encoding="utf-8")
        before, found, after = text.partition(f"{header}\n")
        assert found, f"{page.name} has no table that begins with {header}"
        old = list(itertools.takewhile(lambda line: line.startswith("|"), after.split("\n")))
        if os.environ.get("PERPO_WRITE_DOCS"):
            rest = after.split("\n")[len(old) :]
            page.write_text(before + found + "\n".join([*rows, *rest]), encoding="utf-8")
            old = rows
        assert old == rows, "PERPO_WRITE_DOCS=1 writes the table anew"

    return compare
