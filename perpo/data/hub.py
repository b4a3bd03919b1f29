"""Data sets of the Hugging Face hub as sources of records: `hf://owner/name:split`, read by `datasets.load_dataset`.

    hf://owner/name                              its split train
    owner/name:validation                        a name with its split needs no hf://
    hf://owner/name@v1.2/config:train[:1000]     a revision, a configuration, a slice
    hf://owner/name:train?streaming              nothing is kept on the disk; images wait in memory
    hf://./folder:train                          a folder that `datasets` can load

Without ?streaming the data set is kept in the cache of `datasets`, and images stay there until they are opened.
"""

from __future__ import annotations

import importlib
import re
from typing import Any, NamedTuple

PREFIX = "hf://"
_HUB = r"[\w.-]+/[\w.-]+?"
_FOLDER = r"\.{0,2}/[^@:?]+"
_SOURCE = re.compile(
    rf"(?P<name>{_HUB}|{_FOLDER})(?:@(?P<revision>[^:?/]+))?(?:/(?P<config>[^:?/]+))?(?::(?P<split>[^?]+))?(?P<stream>\?streaming)?"
)


class HubData(NamedTuple):
    """What a source names."""

    name: str
    revision: str | None
    config: str | None
    split: str
    streaming: bool


def hub_data(source: str) -> HubData | None:
    """The data set that a source names; None where it is the path of a file.

    Raises:
        ValueError: it begins with hf:// and names none.
    """
    given = source.removeprefix(PREFIX)
    found = _SOURCE.fullmatch(given)
    marked = source.startswith(PREFIX)
    if found is None or not (marked or (found["split"] and re.fullmatch(_HUB, found["name"]))):
        if marked:
            raise ValueError(
                f"{source!r} names no data set: write hf://owner/name:split, where needed with @revision after the "
                "name, then /config, and ?streaming at the end"
            )
        return None
    return HubData(
        found["name"], found["revision"], found["config"], found["split"] or "train", found["stream"] is not None
    )


def load_hub(data: HubData) -> Any:
    """The `datasets.Dataset`, or with streaming the `datasets.IterableDataset`.

    Raises:
        ValueError: there is no such data set, configuration or split, or it cannot be read.
        OSError: no connection.
        ImportError: without `datasets`.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError("this needs datasets: pip install 'perpo[data]'") from error
    try:
        return datasets.load_dataset(
            data.name, data.config, split=data.split, revision=data.revision, streaming=data.streaming
        )
    except ConnectionError:
        raise
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{PREFIX}{data.name}:{data.split} cannot be loaded: {error}") from error
