"""`import perpo`: light, and every public name is where the package says."""

import subprocess
import sys

import pytest

import perpo


@pytest.mark.parametrize("name", perpo.__all__)
def test_every_public_name_is_found_and_is_its_home_s(name: str) -> None:
    assert getattr(perpo, name).__module__ == perpo._HOME[name]
    assert name in dir(perpo)


def test_a_name_that_is_none_is_refused_with_those_that_are() -> None:
    with pytest.raises(AttributeError, match=r"'PerpoTrainer'; it has ListRecord, .*PerPOTrainer"):
        _ = perpo.PerpoTrainer


def test_import_brings_in_neither_torch_nor_transformers() -> None:
    code = "import sys, perpo; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
