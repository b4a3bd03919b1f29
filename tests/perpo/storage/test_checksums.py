"""Damage to a folder's files is noticed, and the file is named."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from perpo.storage.checksums import CHECKSUMS, check_weights, damage, files_of, weights_of, write_checksums
from perpo.storage.identity import DamagedError

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": torch.arange(6.0), "b": torch.ones(2, 3)}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "state.pt").write_bytes(b"123")
    return tmp_path


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def cut(file: Path, n_bytes: int = 1) -> None:
    file.write_bytes(file.read_bytes()[:-n_bytes])


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (lambda f: flip(f / WEIGHTS, -1), f"{WEIGHTS} is damaged: its checksum differs"),
    (lambda f: cut(f / WEIGHTS), rf"{WEIGHTS} is damaged: \d+ bytes, and \d+ were written"),
    (lambda f: (f / WEIGHTS).write_bytes(b""), rf"{WEIGHTS} is damaged: 0 bytes"),
    (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    (lambda f: flip(f / "part" / "state.pt", 0), "part/state.pt is damaged: its checksum differs"),
    (lambda f: (f / CHECKSUMS).write_text(""), f"{CHECKSUMS} is damaged"),
    (lambda f: (f / CHECKSUMS).write_text("[]"), f"{CHECKSUMS} is damaged"),
    (lambda f: (f / CHECKSUMS).write_text('{"a": 3}'), f"{CHECKSUMS} is damaged"),
]


@pytest.mark.parametrize(("harm", "named"), DAMAGE)
def test_damage_is_named_by_file(harm: Callable[[Path], None], named: str, folder: Path) -> None:
    assert damage(folder) is None
    write_checksums(folder, files_of(folder))
    assert damage(folder) == []
    harm(folder)
    (problem,) = damage(folder) or ()
    assert re.search(named, problem)


@pytest.mark.parametrize("kept", [weights_of, files_of])
def test_of_a_model_only_the_weights_are_checked(kept: Callable[[Path], list[Path]], folder: Path) -> None:
    """A configuration may be edited, and the state of the optimizer takes long to read."""
    write_checksums(folder, kept(folder))
    (folder / "config.json").write_text("{} ")
    check_weights(folder)
    flip(folder / WEIGHTS, -1)
    with pytest.raises(DamagedError, match=f"if the file was changed on purpose, delete {folder / CHECKSUMS}"):
        check_weights(folder)


@pytest.mark.parametrize("n_bytes", [1, 40, 200])
def test_a_safetensors_file_that_is_cut_off_needs_no_checksum_to_be_noticed(n_bytes: int, folder: Path) -> None:
    check_weights(folder)
    cut(folder / WEIGHTS, n_bytes)
    with pytest.raises(DamagedError, match=f"{folder / WEIGHTS} is damaged"):
        check_weights(folder)


def test_a_name_on_the_hub_is_left_alone() -> None:
    check_weights("owner/name")
