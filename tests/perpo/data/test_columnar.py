"""Parquet and `datasets` hold what JSONL holds, and images besides."""

import dataclasses
import io
from pathlib import Path

import pytest
from PIL import Image

from perpo.data.images import RowImage, open_image
from perpo.data.read import RecordError, read_records
from perpo.data.record import ListRecord, write_records

pytest.importorskip("pyarrow", reason="Parquet is an extra: perpo[data]")

RED = Image.new("RGB", (4, 2), (255, 0, 0))
CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}]


def png() -> bytes:
    buffer = io.BytesIO()
    RED.save(buffer, "PNG")
    return buffer.getvalue()


def record(**fields: object) -> ListRecord:
    given = {
        "id": "a",
        "image": "a.jpg",
        "prompt": "?",
        "answer": "x",
        "responses": ("x", "y"),
        "rewards": (1.0, 1 / 3),
    }
    return ListRecord(**(given | fields))


def test_parquet_gives_back_what_was_written(tmp_path: Path) -> None:
    plain = [record(), record(id="b", image=None, ref_log_probs=(-1.5, -2.0), task="ocr"), record(id="c", rewards=None)]
    mixed = [record(prompt=CHAT, answer=[0.1, 0.2, 0.3, 0.4]), record(id="b", answer=3), record(id="c", answer=None)]
    for records in (plain, mixed):
        assert write_records(records, tmp_path / "a.parquet") == 3
        assert read_records(tmp_path / "a.parquet", require=())[0] == records


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_no_field_is_lost(suffix: str, tmp_path: Path) -> None:
    whole = record(
        task="ocr",
        ref_log_probs=(-1.5, -2.0),
        flip_probs=(0.1, 0.0),
        complete=(True, False),
        weight=0.5,
        columns={"page": 3, "note_json": "no JSON"},
    )
    for one in dataclasses.fields(ListRecord):
        default = one.default_factory() if one.default_factory is not dataclasses.MISSING else one.default
        assert getattr(whole, one.name) != default, f"{one.name} is not tested"
    write_records([whole, record(id="b")], tmp_path / f"a{suffix}")
    assert read_records(tmp_path / f"a{suffix}")[0] == [whole, record(id="b")]


def test_parquet_holds_images_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    row = RowImage([{"image": {"bytes": png(), "path": None}}], 0, "image")
    images = [png(), RED, "a.png", Path("a.png"), {"bytes": png(), "path": "z"}, row]
    write_records([record(id=str(i), image=image) for i, image in enumerate(images)], tmp_path / "a.parquet")
    for read in read_records(tmp_path / "a.parquet")[0]:
        assert open_image(read.image, tmp_path).getpixel((0, 0)) == (255, 0, 0)


def test_a_bad_row_is_named_by_its_number(tmp_path: Path) -> None:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    rows = [{"id": str(i), "prompt": "?", "responses": ["x"], "rewards": [r], "answer_json": a} for i, r, a in
            [(1, 1.0, "3"), (2, None, "3"), (3, 1.0, "{")]]  # fmt: skip
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(RecordError, match=r"a.parquet: row 2: rewards: item 0 must be a finite number"):
        read_records(tmp_path / "a.parquet")
    records, report = read_records(tmp_path / "a.parquet", skip_bad=True)
    assert ([r.answer for r in records], [e.place for e in report.errors]) == ([3], ["row 2", "row 3"])


def test_a_failed_parquet_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_records([record()], path)
    with pytest.raises(ValueError, match="record 'b' cannot be written as JSON"):
        write_records([record(), record(id="b", answer={1})], path)
    assert read_records(path)[0] == [record()]
    assert [file.name for file in tmp_path.iterdir()] == ["a.parquet"]


def test_a_dataset_is_read_without_loading_its_images() -> None:
    datasets = pytest.importorskip("datasets", reason="an extra: perpo[data]")
    rows = {"id": ["a", "b"], "prompt": [CHAT, CHAT], "responses": [["x", "y"]] * 2, "rewards": [[1.0, 0.0]] * 2}
    source = datasets.Dataset.from_dict(rows | {"image": [RED, RED]}).cast_column("image", datasets.Image())
    records, _ = read_records(source.with_format("numpy"))
    assert [r.id for r in records] == ["a", "b"]
    assert records[0].prompt == CHAT  # without the nulls that columns fill in
    assert isinstance(records[1].image, RowImage)
    assert open_image(records[1].image).size == (4, 2)
    streamed, _ = read_records(source.to_iterable_dataset())
    assert open_image(streamed[1].image).size == (4, 2)
    with pytest.raises(TypeError, match="pick one of its splits: train"):
        read_records(datasets.DatasetDict({"train": source}))


def test_lists_of_one_image_are_taken_and_of_several_refused() -> None:
    datasets = pytest.importorskip("datasets", reason="an extra: perpo[data]")
    rows = {"prompt": ["?"] * 3, "responses": [["x", "y"]] * 3, "rewards": [[1.0, 0.0]] * 3}
    blue = Image.new("RGB", (2, 4), (0, 0, 255))
    source = datasets.Dataset.from_dict(rows | {"images": [[RED], [RED, blue], [blue]]})
    source = source.cast_column("images", datasets.List(datasets.Image()))
    for one in (source, source.to_iterable_dataset()):
        with pytest.raises(RecordError, match="row 2: images: holds 2 images, but a record has one"):
            read_records(one)
        records, report = read_records(one, skip_bad=True)
        assert [open_image(record.image).size for record in records] == [(4, 2), (2, 4)]
        assert (report.n_bad, report.n_without_image) == (1, 0)
    assert isinstance(read_records(source, skip_bad=True)[0][0].image, RowImage)


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(ValueError, match=r"a.parquet: cannot be read as Parquet beyond row 0"):
        read_records(tmp_path / "a.parquet")
