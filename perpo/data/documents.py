"""Read JSON and YAML: whole files, and mappings in settings. Errors name the file or the setting."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

UNREADABLE = (ValueError, RecursionError)  # bad syntax, bad UTF-8, a number too long; nested too deeply


def regular_file(path: str | os.PathLike[str]) -> Path:
    """The path, if it is that of a regular file: reading from a pipe can block for ever.

    Raises:
        OSError: there is no such file, or it is a folder, a pipe or a device.
    """
    file = Path(path)
    file.stat()  # FileNotFoundError, PermissionError
    if not file.is_file():
        raise OSError(f"{os.fspath(path)!r} is not a regular file but a folder, a pipe or a device; name a file")
    return file


def load_json(path: str | os.PathLike[str]) -> Any:
    """
    Raises:
        OSError: not a file that can be read.
        ValueError: not JSON.
    """
    try:
        return json.loads(regular_file(path).read_text(encoding="utf-8-sig"))
    except UNREADABLE as error:
        raise ValueError(f"{os.fspath(path)}: not valid JSON: {_reason(error)}") from error


def load_yaml(path: str | os.PathLike[str]) -> Any:
    """
    Raises:
        OSError: not a file that can be read.
        ValueError: not YAML.
    """
    try:
        return yaml.load(regular_file(path).read_text(encoding="utf-8-sig"), _EachOnce)
    except (*UNREADABLE, yaml.YAMLError) as error:
        raise ValueError(f"{os.fspath(path)}: not valid YAML: {_reason(error)}") from error


class _EachOnce(yaml.SafeLoader):
    """Refuses a name that is set twice; PyYAML takes the last value without a warning."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is set twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def mapping(name: str, value: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """The value of a setting that takes a mapping, given as one or as JSON or YAML text; None is the empty mapping.

    Args:
        name: of the setting, for errors.

    Raises:
        ValueError: anything else.
    """
    read: Any = value
    if isinstance(value, str):
        try:
            read = _json_or_yaml(value)
        except (*UNREADABLE, yaml.YAMLError) as error:
            raise ValueError(f"{name} must be a JSON or YAML mapping: {_reason(error)}") from error
    if read is None:
        return {}
    if not isinstance(read, Mapping) or not all(isinstance(key, str) for key in read):
        raise ValueError(f"{name} must be a JSON or YAML mapping of names to values, got {value!r:.120}")
    return dict(read)


def _json_or_yaml(text: str) -> Any:
    try:
        return json.loads(text)  # first: PyYAML reads 1e-3 as a string
    except ValueError:
        return yaml.safe_load(text)


def _reason(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
