"""Settings from a YAML file and from the command line, which wins; and those that every command shares.

perpo train --config run.yaml --learning_rate 1e-5
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

OFTEN_SET = {
    "output_dir",
    "max_steps",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "bf16",
    "fsdp",
    "fsdp_config",
    "warmup_steps",
    "save_steps",
    "save_total_limit",
    "eval_strategy",
    "report_to",
    "resume_from_checkpoint",
    "dataloader_num_workers",
    "seed",
}


@dataclass
class ModelConfig:
    """Which model, and how it is loaded."""

    model_name_or_path: str = field(
        metadata={"help": "Folder or hub name of the model and its processor.", "aliases": ["--model"]}
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the weights: 'auto' (as they were saved), 'float32', 'bfloat16' or 'float16'.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention: 'sdpa', 'eager', 'flash_attention_2', …; default: the model's."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the hub."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that comes with the model. Only for sources that you trust."}
    )
    processor_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Passed to the processor, as JSON or YAML mapping: {"max_pixels": 401408}.'},
    )

    def __post_init__(self) -> None:
        if isinstance(self.processor_options, str):
            try:
                self.processor_options = json.loads(self.processor_options)
            except json.JSONDecodeError as error:
                raise ValueError(f"processor_options must be a JSON mapping: {error}") from error
        if not isinstance(self.processor_options, dict | None):
            raise ValueError(f"processor_options must be a mapping, got {self.processor_options!r}")


def parse(kinds: Sequence[type], arguments: Sequence[str], prog: str) -> tuple[Any, ...]:
    """One object of each dataclass, from `--config FILE` and `--name value`.

    Ends the program with a message on stderr for what is misspelt, missing or of the wrong type.
    """
    inherits = any(issubclass(kind, TrainingArguments) for kind in kinds)
    parser = HfArgumentParser(
        list(kinds),
        prog=prog,
        usage="%(prog)s [--config FILE] [--setting value …]",
        epilog="Every setting of transformers.TrainingArguments can be given too." if inherits else None,
        formatter_class=_HelpFormatter,
    )
    _hide_inherited(parser, kinds)
    parser.add_argument("--config", metavar="FILE", help="YAML file of these settings; the command line wins.")
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config")
    config_file = first.parse_known_args(list(arguments))[0].config
    if config_file is not None:
        hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
        _set_defaults(parser, config_file, hints)
    try:
        *objects, rest = parser.parse_args_into_dataclasses(list(arguments), look_for_args_file=False)
    except (ValueError, TypeError) as error:
        parser.exit(2, f"{prog}: {error}\n")
    assert rest.config == config_file
    return tuple(objects)


def _set_defaults(parser: argparse.ArgumentParser, config_file: str, hints: Mapping[str, Any]) -> None:
    """What the file sets, checked as if it had been given on the command line.

    Args:
        hints: types of all settings: some take mappings or lists, which only a file can hold.
    """
    try:
        settings = yaml.safe_load(Path(config_file).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        parser.exit(2, f"{parser.prog}: config: {error}\n")
    if not isinstance(settings, dict):
        parser.exit(2, f"{parser.prog}: config: {config_file} must hold lines `name: value`\n")
    actions = {action.dest: action for action in reversed(parser._actions)}  # --x rather than --no_x, if both set x
    for name, value in settings.items():
        action = actions.get(name)
        if action is None or name in ("help", "config"):
            near = difflib.get_close_matches(str(name), actions, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            parser.exit(2, f"{parser.prog}: config: {config_file} sets {name!r}, which is no setting{hint}\n")
        try:
            action.default = _as_given(parser, action, value, hints[name])
        except argparse.ArgumentError as error:
            parser.exit(2, f"{parser.prog}: config: {config_file}: {error}\n")
        action.required = False


def _as_given(parser: argparse.ArgumentParser, action: argparse.Action, value: Any, hint: Any) -> Any:
    """A value of a file as the command line would have set it."""
    union = get_origin(hint) in (Union, UnionType)
    kinds = {get_origin(kind) or kind for kind in (get_args(hint) if union else (hint,))}
    several = action.nargs == "+"
    if type(value) in kinds & {dict, type(None)} or (isinstance(value, list) and list in kinds and not several):
        return value
    if several and isinstance(value, dict):
        value = [f"{name}={inner}" for name, inner in value.items()]
    values = value if several and isinstance(value, list) else [value]
    found = []
    for one in values:
        if isinstance(one, dict | list | None):
            raise argparse.ArgumentError(action, f"must be a single value, got {one!r}")
        text = str(one).lower() if isinstance(one, bool) else str(one)  # argparse is private here, and long the same
        found.append(parser._get_value(action, text))
        parser._check_value(action, found[-1])
    return found if several else found[0]


def _hide_inherited(parser: argparse.ArgumentParser, kinds: Sequence[type]) -> None:
    """Leave the hundred settings that a dataclass inherits out of --help, but for those that most runs set."""
    own = {name for kind in kinds for name in inspect.get_annotations(kind)} | OFTEN_SET
    for action in parser._actions:
        if action.dest not in (*own, "help", "config") or action.option_strings[0].startswith("--no_"):
            action.help = argparse.SUPPRESS


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Wider than argparse's own: the names are long."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=40, width=120)
