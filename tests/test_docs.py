"""The pages of the documentation: links lead somewhere, pages and pictures are found, code runs, figures are kept."""

import dataclasses
import importlib.util
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch.distributed as dist
import yaml

import perpo_kernels
from perpo.cli import main as cli
from perpo.demo.compare import BEST_OF_K, Result
from perpo.demo.race.__main__ import learning_rates
from perpo.demo.race.arms import Arm
from perpo.demo.race.arms import questions as race_questions
from perpo.demo.race.report import NAMES
from perpo.demo.race.results import Results
from perpo.demo.race.rows import read_rows
from perpo.demo.report import mean_and_error
from perpo.demo.tasks import TASKS, make_records
from perpo_kernels.objectives import PRESETS, Objective

from .test_readme import ROOT, table

DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "recipes" / "README.md"])
LINK = re.compile(r"(!?)\[(?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """A page without its fenced code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> list[str]:
    return [target for _, target in LINK.findall(prose(page)) if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: str, language: str) -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in links(page):
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), f"{target} does not exist"
        assert found.is_relative_to(ROOT), f"{target} leads out of the project"
        if anchor:
            assert anchor in anchors(found), f"{target}: {name(found)} has no such heading"


def test_every_page_is_linked_from_the_index() -> None:
    index = DOCS / "README.md"
    linked = {(index.parent / target.partition("#")[0]).resolve() for target in links(index)}
    assert [name(page) for page in PAGES if page not in linked] == ["docs/README.md"]
    assert ROOT / "CITATION.cff" in linked
    assert "docs/README.md" in links(ROOT / "README.md")


def test_every_picture_is_shown_and_explained_on_a_page_of_the_documentation() -> None:
    shown = {}
    for page in DOCS.glob("*.md"):
        paragraphs = page.read_text(encoding="utf-8").split("\n\n")
        for i, paragraph in enumerate(paragraphs):
            if found := re.fullmatch(r"!\[(.+)\]\((.+)\)", paragraph.strip()):
                shown[(page.parent / found[2]).resolve()] = paragraphs[i + 1]
    pictures = {path for path in DOCS.rglob("*") if path.suffix in (".png", ".svg")}
    assert pictures == set(shown)
    for picture, words in shown.items():
        assert len(words.split()) > 15, f"the page does not say what to see in {picture.name}: {words!r}"
        assert not words.startswith(("#", "!", "|"))


@contextmanager
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("page", ["api.md", "frozen_head.md", "objectives.md"])
def test_the_code_of_a_page_runs(page: str) -> None:
    examples = blocks(page, "python")
    assert examples
    for example in examples:
        scope: dict[str, Any] = {}
        with one_rank() if "torch.distributed" in example else nullcontext():
            exec(compile(example, page, "exec"), scope)
        if "make_graphed_callables" in example:
            continue  # it needs a GPU; tests/gpu/test_cuda_graph.py looks at its gradients
        hidden = scope["hidden"] if "hidden" in scope else scope["logits"]
        assert hidden.grad.isfinite().all()
        assert hidden.grad.any()
    if page == "api.md":
        assert not scope["logits"].grad[:, -1].any()  # nothing follows the last position


# ----------------------------------------------------------------------------------------------------------- settings


@pytest.fixture(scope="module")
def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_settings", DOCS / "write_settings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_settings_is_current(writer: ModuleType) -> None:
    assert writer.PAGE.read_text(encoding="utf-8") == writer.page(), "run: python docs/write_settings.py"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_page_has_every_setting_that_help_shows(
    writer: ModuleType, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    shown = set(re.findall(r"^  (--\w+)", capsys.readouterr().out, re.MULTILINE)) - {"--config", "--help"}
    own, of_train = (writer.page().split(f"\n## perpo {name}\n")[1].split("\n## ")[0] for name in (command, "train"))
    section = own + of_train * ("[`perpo train`](#perpo-train)" in own)
    assert shown
    assert shown <= set(re.findall(r"`(--\w+)`", section))


def test_the_page_has_every_variable_that_the_code_reads(writer: ModuleType) -> None:
    code = [path for room in ("perpo", "perpo_kernels") for path in (ROOT / room).rglob("*.py")]
    read = {found for path in code for found in re.findall(r"PERPO_[A-Z_]+", path.read_text(encoding="utf-8"))}
    assert set(writer.ENVIRONMENT) == read


# --------------------------------------------------------------------------------------------------------- quickstart


@pytest.fixture
def demo_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `make demo` leaves of grounding, smaller; in a folder that has the shipped model where a checkout has it."""
    folder = tmp_path / "demo_output" / "grounding" / "seed0"
    folder.mkdir(parents=True)
    make_records(TASKS["grounding"], 16, "train", 0, folder, "train")
    make_records(TASKS["grounding"], 30, "test", 0, folder, "held_out")
    (tmp_path / "perpo").symlink_to(ROOT / "perpo")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_of_the_quickstart_run(demo_output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for block in blocks("quickstart.md", "bash") for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("perpo ")]
    assert [command[0] for command in commands] == ["generate", "train", "evaluate"]
    for command in commands:
        assert cli.main(command) == 0
    printed = capsys.readouterr().out
    shown = {shape(line) for line in printed.splitlines()}
    for line in "".join(blocks("quickstart.md", "text")).splitlines():
        if "% of the answers" not in line:  # none need be cut or unreadable
            assert shape(line) in shown, f"not printed: {line}"
    assert json.loads((demo_output / "my_lists.jsonl").read_text().splitlines()[0])["rewards"]
    assert (demo_output / "my_evaluation" / "report.html").exists()


def shape(line: str) -> str:
    """A line without what differs from run to run."""
    return " ".join(re.sub(r"[-+]?\d[\d.]*%?", "#", line).split())


def cells_of_the_demo() -> Iterator[tuple[str, str, str]]:
    """Recorded mean ± error as the quickstart writes it, its row and its column."""
    record = json.loads((DOCS / "demo" / "results.json").read_text())
    results = [Result(**one) for one in record["results"]]
    titles = {"sft": "SFT", "dpo": "DPO, best against worst", "uniform_pairs": "all pairs, equal weights"}
    titles |= {"perpo": "PerPO", BEST_OF_K: f"best of {record['recipe']['k']} samples, on the training lists"}
    for model, title in titles.items():
        for task in TASKS.values():
            for metric in task.metrics:
                values = [one.metrics[metric] for one in results if (one.task, one.model) == (task.name, model)]
                yield title, metric, "{:.3f} ± {:.3f}".format(*mean_and_error(values))


def test_the_table_of_the_demo_is_recorded() -> None:
    text = (DOCS / "quickstart.md").read_text(encoding="utf-8").replace("**", "")
    rows = {row[0]: row[1:] for row in table(text, "5 seeds, 600 held-out pictures each")}
    expected: dict[str, list[str]] = {}
    for title, _, cell in cells_of_the_demo():
        expected.setdefault(title, []).append(cell)
    assert rows == expected


# -------------------------------------------------------------------------------------------------------- the project


def test_versions_and_names_agree() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version == perpo_kernels.__version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert version in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_contributing_names_what_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert importlib.util.find_spec(module) is not None, module
    paths = [path for path in re.findall(r"`([\w./]+)`", text) if "/" in path and "NAME" not in path]
    for path in paths:
        assert any((ROOT / base / path).exists() for base in ("", "perpo_kernels")), path
    assert len(paths) > 5
    targets = set(re.findall(r"`make ([\w-]+)`", text))
    assert targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_number_of_objectives_is_that_of_the_presets() -> None:
    assert f"the {len(PRESETS) - 1} others of its family" in (DOCS / "README.md").read_text(encoding="utf-8")
    assert dataclasses.asdict(PRESETS["perpo"]()) == dataclasses.asdict(Objective())


# ------------------------------------------------------------------------------------------------------------ the race


def test_the_tables_of_the_race_are_of_its_rows() -> None:
    """The page quotes tables of `python -m perpo.demo.race --report`, and their means are those of the rows."""
    tables = (DOCS / "race" / "tables.md").read_text(encoding="utf-8").splitlines()
    quoted = [line for line in (DOCS / "race.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len(quoted) > 20
    assert [line for line in quoted if line not in tables and "---" not in line] == []
    rows = read_rows(DOCS / "race")
    results = Results(DOCS / "race", rows, learning_rates(rows)).of_all(*race_questions(range(1))["race"])
    (start,) = (i for i, line in enumerate(tables) if line == f"Grounding, {results.of_seeds}")
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables[start + 4 : start + 4 + 25]]
    named = {name: objective for objective, name in NAMES.items()}
    for objective, rounds, ap50, *_ in shown:
        arm = Arm(objective=named[objective], rounds=int(rounds or 1))
        assert ap50.partition(" ")[0] == f"{results.mean(arm, 'ap50'):.3f}"
    assert len(results.only or ()) >= 3
