"""Write docs/settings.md: the settings of every command, from the dataclasses that the commands read.

    python docs/write_settings.py

A test (tests/test_docs.py) compares the page with what this makes.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

from perpo.cli.main import COMMANDS
from perpo.cli.plan import PlanConfig
from perpo.cli.settings import OFTEN_SET

PAGE = Path(__file__).with_name("settings.md")
HEAD = """# Settings

<!-- Written by docs/write_settings.py; do not edit. -->

Every setting of every command, as `perpo COMMAND --help` prints them. `--config FILE.yaml` holds lines `name: value`;
the command line wins over the file. A misspelt setting is an error, in either place.
"""
ENVIRONMENT = {
    "PERPO_BACKEND": "The backend of `perpo_kernels` where a call says `auto`: `triton`, `eager` or `reference`.",
    "PERPO_CHECK": "`1`: check values on a GPU too, such as labels out of range, at the cost of a synchronisation.",
    "PERPO_TRACEBACK": "`1`: show where an error comes from, instead of its message alone.",
}
WORDS = {bool: "true or false", int: "integer", float: "number", str: "text", dict: "mapping", list: "several"}


def page() -> str:
    parts = [HEAD]
    for name, command in COMMANDS.items():
        parts.append(f"## perpo {name}\n\n{command.summary[0].upper()}{command.summary[1:]}.\n")
        module = importlib.import_module(command.module)
        if name == "plan":
            parts.append("Every setting of [`perpo train`](#perpo-train) can be given too, and so can its file.\n")
        for kind in [PlanConfig] if name == "plan" else module.SETTINGS:
            rows = [row(one, kind) for one in settings(kind)]
            parts.append("\n".join([*intro(kind), "| setting | takes | default | |", "|---|---|---|---|", *rows, ""]))
    lines = [f"| `{name}` | {text} |" for name, text in ENVIRONMENT.items()]
    parts.append("\n".join(["## Environment\n", "| variable | |", "|---|---|", *lines, ""]))
    return "\n".join(parts)


def settings(kind: type) -> Iterator[dataclasses.Field[Any]]:
    """The fields of a dataclass, but for those that it leaves to transformers."""
    inherited = (
        {one.name for one in dataclasses.fields(TrainingArguments)} if issubclass(kind, TrainingArguments) else ()
    )
    own = inspect.get_annotations(kind)
    return (one for one in dataclasses.fields(kind) if one.init and (one.name in own or one.name not in inherited))


def intro(kind: type) -> list[str]:
    lines = [f"**{kind.__name__}**: {(kind.__doc__ or '').splitlines()[0]}", ""]
    if issubclass(kind, TrainingArguments):
        names = ", ".join(f"`--{name}`" for name in sorted(OFTEN_SET - inspect.get_annotations(kind).keys()))
        where = "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"
        lines += [
            f"Every setting of [`transformers.TrainingArguments`]({where}) can be given too; most often: {names}.",
            "",
        ]
    return lines


def row(one: "dataclasses.Field[Any]", kind: type) -> str:
    names = ", ".join(f"`{name}`" for name in (f"--{one.name}", *one.metadata.get("aliases", ())))
    cells = [names, takes(one, get_type_hints(kind)[one.name]), default(one), one.metadata["help"]]
    return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"


def takes(one: "dataclasses.Field[Any]", hint: Any) -> str:
    chosen = one.metadata.get("choices") or (get_args(hint) if get_origin(hint) is Literal else ())
    if chosen:
        return ", ".join(f"`{value}`" for value in chosen)
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    plain = [get_origin(inner) or inner for inner in kinds if inner is not NoneType]
    if dict in plain:  # its text, where a text is taken as well
        plain = [dict]
    return " or ".join(WORDS[inner] for inner in plain if inner in WORDS)


def default(one: "dataclasses.Field[Any]") -> str:
    value = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    if value is None or value == [] or value == {}:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
