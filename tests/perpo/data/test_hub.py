"""Records from data sets by name: what is asked of `datasets`, and what becomes of it. Nothing is downloaded."""

from pathlib import Path
from typing import Any

import pytest

from perpo.cli import main as cli
from perpo.data.hub import HubData, hub_data
from perpo.data.images import RowImage, open_image
from perpo.data.read import read_records

from .. import tiny_runs

datasets = pytest.importorskip("datasets")


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("hf://me/boxes", HubData("me/boxes", None, None, "train", False)),
        ("hf://me/boxes:test", HubData("me/boxes", None, None, "test", False)),
        ("me/boxes:test", HubData("me/boxes", None, None, "test", False)),
        ("me/boxes.v2:train[:10]", HubData("me/boxes.v2", None, None, "train[:10]", False)),
        ("hf://me/boxes@v1/small:train?streaming", HubData("me/boxes", "v1", "small", "train", True)),
        ("hf://me/boxes/small", HubData("me/boxes", None, "small", "train", False)),
        ("hf://./folder:train", HubData("./folder", None, None, "train", False)),
        ("hf:///a/b/c", HubData("/a/b/c", None, None, "train", False)),
        ("me/boxes", None),  # a path that is misspelt asks no hub
        ("lists.jsonl", None),
        ("runs/lists.jsonl", None),
        ("/a/b:c.jsonl", None),
    ],
)
def test_a_source_names_a_data_set(source: str, found: HubData | None) -> None:
    assert hub_data(source) == found


def test_what_begins_like_a_data_set_and_names_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'hf://boxes' names no data set: write hf://owner/name:split"):
        read_records("hf://boxes")
    with pytest.raises(ValueError, match=r"or in a data set of the hub, hf://owner/name:split; got 'me/boxes'"):
        read_records("me/boxes")


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, ...]]:
    """`datasets.load_dataset` gives the lists of the tiny runs; what it was asked for is kept."""
    asked: list[tuple[Any, ...]] = []
    rows = [
        {
            "id": r.id,
            "image": r.image,
            "prompt": r.prompt,
            "responses": list(r.responses),
            "rewards": list(r.rewards or ()),
        }
        for r in tiny_runs.records()
    ]
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "image": datasets.Image(),
            "prompt": datasets.Value("string"),
            "responses": datasets.List(datasets.Value("string")),
            "rewards": datasets.List(datasets.Value("float64")),
        }
    )
    data = datasets.Dataset.from_list(rows, features=features)

    def load(name: str, config: Any, *, split: str, revision: Any, streaming: bool) -> Any:
        asked.append((name, config, split, revision, streaming))
        if split == "none":
            raise ValueError("Unknown split")
        if name == "me/gone":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'me/gone' doesn't exist on the Hub")
        if name == "me/away":
            raise ConnectionError("no network")
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


@pytest.mark.parametrize("streaming", [False, True])
def test_records_come_from_a_data_set_by_name(streaming: bool, lists: list[tuple[Any, ...]]) -> None:
    records, report = read_records("hf://me/boxes@v1:train" + "?streaming" * streaming)
    assert lists == [("me/boxes", None, "train", "v1", streaming)]
    assert [record.rewards for record in records] == [record.rewards for record in tiny_runs.records()]
    assert isinstance(records[0].image, RowImage) is not streaming  # else it stays in the data set
    assert open_image(records[0].image).size == (28, 40)
    assert report.source == "hf://me/boxes@v1:train" + "?streaming" * streaming


def test_what_cannot_be_loaded_is_named(lists: list[tuple[Any, ...]]) -> None:
    with pytest.raises(ValueError, match="hf://me/boxes:none cannot be loaded: Unknown split"):
        read_records("me/boxes:none")
    with pytest.raises(ValueError, match="hf://me/gone:train cannot be loaded: Dataset 'me/gone' doesn't exist"):
        read_records("hf://me/gone")
    with pytest.raises(ConnectionError, match="no network"):
        read_records("hf://me/away")


def test_a_folder_that_datasets_can_load_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(
        '{"id": "a", "prompt": "Q?", "responses": ["x", "y"], "rewards": [1, 0]}\n'
    )
    records, _ = read_records(f"hf://{tmp_path / 'set'}:train")
    assert records[0].responses == ("x", "y")


def test_a_run_trains_on_a_data_set_by_name(tmp_path: Path, lists: list[tuple[Any, ...]]) -> None:
    run = tiny_runs.save_run(tmp_path, max_steps=1)
    given = ["--train_file", "hf://me/boxes:train", "--eval_file", "me/boxes:test", "--eval_strategy", "steps"]
    assert cli.main(["train", "--config", str(run / "run.yaml"), *given]) == 0
    assert [(name, split) for name, _, split, *_ in lists] == [("me/boxes", "train"), ("me/boxes", "test")]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "datasets:\n- me/boxes\n" in card
    assert "| lists | me/boxes, train |" in card
