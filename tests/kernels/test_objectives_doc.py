"""docs/objectives.md has every preset, with its defaults as they are in the code and its paper, and no other."""

import inspect
import re
from pathlib import Path

import pytest

from perpo_kernels import objectives

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"


def table() -> dict[str, dict[str, str]]:
    """Name of the objective -> heading -> cell."""
    text = PAGE.read_text(encoding="utf-8").splitlines()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text if line.startswith("|")]
    start = next(i for i, line in enumerate(lines) if line[0] == "objective")
    rows = [dict(zip(lines[start], line, strict=True)) for line in lines[start + 2 :]]
    names = [row["objective"].strip("`") for row in rows]
    assert len(set(names)) == len(names)
    return dict(zip(names, rows, strict=True))


def test_the_table_has_every_preset_and_nothing_else() -> None:
    public = {
        name
        for name, fn in inspect.getmembers(objectives, inspect.isfunction)
        if fn.__module__ == objectives.__name__ and not name.startswith("_")
    }
    assert set(objectives.PRESETS) == public
    assert list(table()) == list(objectives.PRESETS)


@pytest.mark.parametrize("name", objectives.PRESETS)
def test_the_row_of_an_objective_is_of_its_preset(name: str) -> None:
    row = table()[name]
    stated = {key: float(value) for key, value in re.findall(r"(\w+)=([-\d.e]+)", row["defaults"])}
    parameters = inspect.signature(objectives.PRESETS[name]).parameters
    assert stated == {key: parameter.default for key, parameter in parameters.items()}
    for paper in re.findall(r"arXiv (\d+\.\d+)", objectives.PRESETS[name].__doc__ or ""):
        assert f"https://arxiv.org/abs/{paper}" in row["paper"]
    assert row["loss of a list"]
    assert row["when to use it"]


@pytest.mark.parametrize("name", objectives.PRESETS)
def test_the_row_says_what_an_objective_needs(name: str) -> None:
    needs, objective = table()[name]["needs beside answers and rewards"], objectives.PRESETS[name]()
    assert ('reference="none"' in needs) == (not objective.reference)
    assert ("image" in needs) == (objective.pairs == "given")
