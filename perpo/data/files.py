"""Rows in and out of files: JSONL, JSON arrays, Parquet and `datasets`. `perpo.data.read` makes records of rows.

Reading yields every row with its place, unreadable rows too, so that a caller can report or skip them. Writing is
atomic: a file appears whole or not at all, and an old file stays until the new one is on the disk.
"""

import importlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from PIL import Image

from perpo.data.documents import UNREADABLE, regular_file
from perpo.data.hub import hub_data, load_hub
from perpo.data.images import RowImage
from perpo.storage.atomic import atomic_file

_IN_JSON = ("prompt", "answer", "columns")  # fields of any type, which Parquet holds as JSON in NAME_json


class Row(NamedTuple):
    """One row. `problem` says why there are no `values`."""

    place: str  # "12" for a line of a text file, "row 12" elsewhere, both from 1
    values: Any
    problem: str | None = None


def read_rows(source: Any) -> Iterator[Row]:
    """The rows of a file (by its suffix), of a data set of the hub (see `perpo.data.hub`), of a `datasets.Dataset`
    (images stay in it), or an iterable of mappings.

    Raises:
        OSError: no such file, or a folder or pipe.
        ValueError: another suffix; a JSON file that is not one array or breaks off (the rest cannot be split).
        TypeError: not a source.
        ImportError: Parquet without pyarrow.
    """
    named = hub_data(source) if isinstance(source, str) else None
    if named is not None:
        yield from _read_dataset(load_hub(named))
    elif isinstance(source, str | os.PathLike):
        path = Path(source)
        readers = {".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
        if path.suffix not in readers:
            raise ValueError(
                f"records must be in a {', '.join(readers)} file, or in a data set of the hub, hf://owner/name:split; "
                f"got {os.fspath(source)!r}"
            )
        yield from readers[path.suffix](regular_file(path))
    elif type(source).__module__.partition(".")[0] == "datasets" and not isinstance(source, Mapping):
        yield from _read_dataset(source)
    elif isinstance(source, Iterable) and not isinstance(source, Mapping | bytes):
        yield from (Row(f"row {i}", values) for i, values in enumerate(source, 1))
    else:
        hint = f"; pick one of its splits: {', '.join(map(str, source))}" if isinstance(source, Mapping) else ""
        raise TypeError(f"records must come from a file, a data set or an iterable, got {type(source).__name__}{hint}")


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:  # bytes: lines end at \n only, and bad UTF-8 spoils one line, not the file
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield Row(str(number), json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")))
            except UNREADABLE as error:
                yield Row(str(number), None, f"not valid JSON: {error}")


def _read_json(path: Path) -> Iterator[Row]:
    """One element at a time, to know the line of each. (JSON parsers do not report it, ijson included.)"""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from error
    decoder = json.JSONDecoder()
    at = _after_space(text, 0)
    if text[at : at + 1] != "[":
        raise ValueError(f"{path}: expected a JSON array of records; name a file of one record a line .jsonl")
    line, counted, at = 1, 0, _after_space(text, at + 1)
    while text[at : at + 1] != "]" or counted:  # "]" right after "[" is an empty array
        line, counted = line + text.count("\n", counted, at), at
        try:
            values, at = decoder.raw_decode(text, at)
        except UNREADABLE as error:
            raise ValueError(f"{path}:{line}: not valid JSON from here on: {error}") from error
        yield Row(str(line), values)
        at = _after_space(text, at)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            raise ValueError(f"{path}:{line}: expected ',' or ']' after this record; the file may have broken off")
        at = _after_space(text, at + 1)
    rest = _after_space(text, at + 1)
    if rest < len(text):
        line = 1 + text.count("\n", 0, rest)
        raise ValueError(
            f"{path}:{line}: the array of records ends before this line, and more follows: {text[rest : rest + 40]!r}; "
            "write one array, or one record a line in a .jsonl file"
        )


def _after_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _read_parquet(path: Path) -> Iterator[Row]:
    parquet = _optional("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    number += 1
                    yield _from_parquet(values, f"row {number}")
    except ValueError as error:  # pyarrow's own are such
        raise ValueError(f"{path}: cannot be read as Parquet beyond row {number}: {error}") from error


def _from_parquet(values: dict[str, Any], place: str) -> Row:
    try:
        for name in [name for name in _IN_JSON if values.get(f"{name}_json") is not None]:
            values[name] = json.loads(values.pop(f"{name}_json"))
    except UNREADABLE as error:
        return Row(place, None, f"not valid JSON: {error}")
    return Row(place, values)


def _read_dataset(source: Any) -> Iterator[Row]:
    """Images are not decoded; those of a data set on disk are not loaded."""
    datasets = _optional("datasets")
    undecoded = datasets.Image(decode=False)
    lists: dict[str, bool] = {}  # column with images -> whether it holds lists of them
    for name, feature in (source.features or {}).items():
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        if isinstance(feature, datasets.Image) or isinstance(inner, datasets.Image):
            lists[name] = not isinstance(feature, datasets.Image)
            wanted = (
                undecoded
                if not lists[name]
                else [undecoded]
                if isinstance(feature, list)
                else type(feature)(undecoded)
                if lists[name]
                else None
            )
            source = source.cast_column(name, wanted)
    if not isinstance(source, datasets.Dataset):  # a stream, which can be read only once
        yield from (Row(f"row {i}", values) for i, values in enumerate(source, 1))
        return
    source = source.with_format(None)
    kept = {name: source.select_columns([name]) for name in lists}
    lengths = {name: _lengths(kept[name], name) for name, several in lists.items() if several}
    for i, values in enumerate(source.remove_columns(list(lists))):
        images: dict[str, Any] = {
            name: [RowImage(kept[name], i, name, item) for item in range(lengths[name][i])]
            if several
            else RowImage(kept[name], i, name)
            for name, several in lists.items()
        }
        yield Row(f"row {i + 1}", values | images)


def _with(inner: Any, feature: Any) -> Any:
    """The list feature with another element type; datasets before 4 also write it as a Python list."""
    return [inner] if isinstance(feature, list) else type(feature)(inner)


def _lengths(column: Any, name: str) -> list[int]:
    """Lengths of the lists in a column, without reading their contents."""
    found: list[int] = []
    for batch in column.with_format("arrow").iter(1024):
        found += [length or 0 for length in _optional("pyarrow.compute").list_value_length(batch[name]).to_pylist()]
    return found


def write_rows(rows: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> int:
    """Write the rows to a .jsonl or .parquet file, atomically, and return how many there were.

    Raises:
        ValueError: another suffix, or a value that JSON cannot hold.
        OSError: no space, no permission. The file is then as it was before.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"records are written to a .jsonl or .parquet file, got {os.fspath(path)!r}")
    with atomic_file(path) as file:
        if path.suffix == ".parquet":
            return _write_parquet(list(rows), file)
        n = 0
        for row in rows:
            if isinstance(row.get("image"), bytes | Image.Image | Mapping | RowImage):
                raise ValueError(
                    f"record {row.get('id')!r} holds its image itself, and JSON holds only paths: write .parquet"
                )
            flat = {**row.get("columns", {}), **row}
            flat.pop("columns", None)
            file.write(_json(flat, row) + b"\n")
            n += 1
        return n


def _json(value: Any, row: Mapping[str, Any]) -> bytes:
    try:
        try:
            return json.dumps(value, ensure_ascii=False, allow_nan=False, default=os.fspath).encode()
        except UnicodeEncodeError:  # half of a surrogate pair: only an escape can hold it
            return json.dumps(value, allow_nan=False, default=os.fspath).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"record {row.get('id')!r} cannot be written as JSON: {error}") from error


def _write_parquet(rows: Sequence[Mapping[str, Any]], file: IO[bytes]) -> int:
    """A column has one type in Parquet: `prompt` and `answer` are texts, or else JSON in `prompt_json`, `answer_json`;
    further columns are JSON together; images are paths, or else the pairs of bytes and path that `datasets` knows."""
    arrow, parquet = _optional("pyarrow"), _optional("pyarrow.parquet")
    text, numbers = arrow.string(), arrow.list_(arrow.float64())
    types = {"id": text, "task": text, "responses": arrow.list_(text), "complete": arrow.list_(arrow.bool_())}
    types |= dict.fromkeys(("rewards", "ref_log_probs", "flip_probs"), numbers) | {"weight": arrow.float64()}
    columns = {name: arrow.array([row[name] for row in rows], kind) for name, kind in types.items()}
    for name in ("prompt", "answer"):
        values = [row[name] for row in rows]
        if all(value is None or isinstance(value, str) for value in values):
            columns[name] = arrow.array(values, text)
        else:
            columns[f"{name}_json"] = arrow.array([_json(row[name], row).decode() for row in rows], text)
    if any(row["columns"] for row in rows):
        columns["columns_json"] = arrow.array([_json(row["columns"], row).decode() for row in rows], text)
    images = [_plain_path(row["image"]) for row in rows]
    if all(image is None or isinstance(image, str) for image in images):
        columns["image"] = arrow.array(images, text)
    else:
        columns["image"] = arrow.array(
            [None if image is None else _stored(image) for image in images],
            arrow.struct([("bytes", arrow.binary()), ("path", text)]),
        )
    parquet.write_table(arrow.table(columns), file)
    return len(rows)


def _plain_path(image: Any) -> Any:
    return os.fspath(image) if isinstance(image, os.PathLike) else image


def _stored(image: Any) -> dict[str, Any]:
    if isinstance(image, RowImage):
        image = image.load()
    if isinstance(image, Mapping):
        return {"bytes": image.get("bytes"), "path": image.get("path")}
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        image = buffer.getvalue()
    return {"bytes": image, "path": None} if isinstance(image, bytes) else {"bytes": None, "path": image}


def _optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this needs {module.partition('.')[0]}: pip install 'perpo[data]'") from error
