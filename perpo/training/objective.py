"""The objective that settings name: a preset of `perpo_kernels.objectives` and its keywords -> an `Objective`."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import yaml

from perpo_kernels.objectives import PRESETS, Objective


def named_objective(
    objective: Objective | Mapping[str, Any] | str,
    beta: float | None = None,
    gamma: float | None = None,
    options: Mapping[str, Any] | str | None = None,
) -> Objective:
    """The objective of the settings `objective`, `beta`, `gamma` and `objective_options`.

    Args:
        objective: name of a preset, an `Objective`, or the fields of one, as a mapping or as JSON or YAML text.
        beta, gamma: keywords of the preset; None leaves its default.
        options: its other keywords, as a mapping or as JSON or YAML text.

    Raises:
        ValueError, TypeError: a name or keyword that is not known, given twice, or out of range.
    """
    keywords = _mapping(options)
    for name, value in (("beta", beta), ("gamma", gamma)):
        if value is None:
            continue
        if name in keywords:
            raise ValueError(f"{name} is given twice: {value!r}, and {keywords[name]!r} in objective_options")
        keywords[name] = value
    if isinstance(objective, str) and objective.lstrip().startswith("{"):  # on the command line
        objective = _read_mapping("objective", objective)
    if isinstance(objective, str):
        return _preset(objective, keywords)
    if keywords:
        raise ValueError(
            f"{', '.join(keywords)}: objective is not the name of a preset but an Objective, which holds its own "
            "numbers; set them there"
        )
    return objective if isinstance(objective, Objective) else _from_fields(objective)


def _preset(name: str, keywords: Mapping[str, Any]) -> Objective:
    if name not in PRESETS:
        raise ValueError(f"objective must be one of {', '.join(PRESETS)}; got {name!r}")
    known = list(inspect.signature(PRESETS[name]).parameters)
    for keyword in keywords:
        if keyword not in known:
            raise ValueError(f"{keyword}: objective={name!r} does not take it; it takes {', '.join(known)}")
    return PRESETS[name](**keywords)


def _from_fields(values: Any) -> Objective:
    if not isinstance(values, Mapping):
        raise TypeError(f"objective must be the name of a preset or an Objective, got {type(values).__name__}")
    known = [field.name for field in fields(Objective)]
    if unknown := set(values) - set(known):
        raise ValueError(f"objective: {', '.join(sorted(unknown))} is no field of Objective ({', '.join(known)})")
    return Objective(**{name: _as_number(value) for name, value in values.items()})


def _mapping(options: Mapping[str, Any] | str | None) -> dict[str, Any]:
    if isinstance(options, str):
        options = _read_mapping("objective_options", options)
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise ValueError(f'objective_options must be a mapping such as {{"epsilon": 0.2}}, got {options!r}')
    return {str(name): _number(str(name), value) for name, value in options.items()}


def _read_mapping(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)  # JSON is YAML
    except yaml.YAMLError as error:
        raise ValueError(f"{name} must be a JSON or YAML mapping: {error}") from error


def _as_number(value: Any) -> Any:
    """YAML takes 5e-3 for a text."""
    with contextlib.suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def _number(name: str, value: Any) -> float:
    value = _as_number(value)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"objective_options: {name} must be a number, got {value!r}")
    return value
