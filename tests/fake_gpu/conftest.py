"""The CUDA path without a GPU: each line of it runs on fake CUDA tensors, which have shapes and devices but no numbers.

In a plain test run the files here are one test, in a process of its own (`stand_in` says why). To see the tests inside:

    python -m pytest -p tests.fake_gpu.stand_in tests/fake_gpu
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_gpu import stand_in

HERE = Path(__file__).parent


class OwnProcess(pytest.File):
    """A file of tests that are run elsewhere: its quick ones, and its slow ones if it has any."""

    def collect(self) -> Iterator[pytest.Item]:
        yield RunFile.from_parent(self, name="quick", expression="not slow")
        if "mark.slow" in self.path.read_text(encoding="utf-8"):
            slow = RunFile.from_parent(self, name="slow", expression="slow")
            slow.add_marker("slow")
            yield slow


class RunFile(pytest.Item):
    def __init__(self, *, expression: str, **options: Any) -> None:
        super().__init__(**options)
        self.expression, self.files = expression, [self.path]

    def runtest(self) -> None:
        if reason := stand_in.problem():
            pytest.skip(reason)
        command = [sys.executable, "-m", "pytest", "-p", "tests.fake_gpu.stand_in", "-p", "no:cacheprovider"]
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
        result = subprocess.run(
            [*command, "-p", "no:xdist", "-m", self.expression, *map(str, self.files)],
            cwd=HERE.parents[1],
            env=environment,
            capture_output=True,
            text=True,
        )
        self.add_report_section("call", "the tests inside", result.stdout)
        if result.returncode:
            raise RuntimeError(
                f"{' '.join(command)} {' '.join(map(str, self.files))}\n{result.stdout}\n{result.stderr}"
            )

    def repr_failure(self, excinfo: Any, style: Any = None) -> str:
        return str(excinfo.value)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"{', '.join(path.name for path in self.files)}, {self.name}"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What was chosen of these files runs together, since half of such a process is imports."""
    together: dict[str, RunFile] = {}
    for item in [item for item in items if isinstance(item, RunFile)]:
        first = together.setdefault(item.expression, item)
        if first is not item:
            first.files.append(item.path)
            items.remove(item)


def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> Any:
    return None if stand_in.loaded else OwnProcess.from_parent(parent, path=module_path)


if stand_in.loaded:
    from tests.fake_gpu.device import FakeGpu, fake_gpu

    @pytest.fixture
    def gpu() -> Iterator[FakeGpu]:
        """Inside the test, tensors on CUDA are fake and what happens on them is noted."""
        with fake_gpu() as noted:
            yield noted
