"""Settings from a YAML file and from the command line, which wins.

    perpo train --config run.yaml --learning_rate 1e-5

`transformers.HfArgumentParser` makes options from dataclasses. The settings of a file become arguments before those of
the command line, so both are parsed and checked in the same way. (jsonargparse would read files by itself, but it
ignores the aliases, choices and help texts that TrainingArguments and our dataclasses keep in the metadata of fields.)
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser, TrainingArguments

from perpo.data.documents import load_yaml
from perpo.model.settings import LoadSettings

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

_GIVEN = "_given"  # attribute: names of the settings of an object that were given


@dataclass
class ModelConfig(LoadSettings):
    """Which model, and how it is loaded."""

    model_name_or_path: str = field(
        metadata={"help": "Folder or hub name of the model and its processor.", "aliases": ["--model"]}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the hub."})


def parse(kinds: Sequence[type], arguments: Sequence[str], prog: str, summary: str = "") -> tuple[Any, ...]:
    """One object of each dataclass, from `--config FILE` and `--name value`; `--help` begins with `summary`.

    A setting that is misspelt, missing or of the wrong type ends the program with a message on stderr.
    """
    parser = _Parser(kinds, prog, summary)
    words = parser.words_of_file(arguments)
    try:
        *objects, _, rest = parser.parse_args_into_dataclasses(
            [*words, *arguments], look_for_args_file=False, return_remaining_strings=True
        )
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    if rest:
        parser.error(f"{rest[0]!r} does not belong to a setting; write --name value")
    for one in objects:  # no field, and so in no comparison and no file
        vars(one)[_GIVEN] = parser.given & {field.name for field in dataclasses.fields(one)}
    return tuple(objects)


def given_settings(one: Any) -> set[str]:
    """Names of the settings of a parsed object that a file or the command line gave."""
    return set(getattr(one, _GIVEN, ()))


def command(prog: str, objects: Sequence[Any]) -> str:
    """The command line that gives what `parse` was given, files included, without tokens of the hub."""
    words = [prog]
    for one in objects:
        for name in sorted(given_settings(one)):
            value = getattr(one, name)
            if name == "report_to" and not value:  # what "none" becomes
                value = "none"
            if value not in (None, []) and not name.endswith("hub_token"):
                words += [f"--{name}", *_shell(value)]
    return " ".join(words)


def _shell(value: Any) -> list[str]:
    if isinstance(value, list | tuple):
        return [word for one in value for word in _shell(one)]
    if isinstance(value, Mapping):
        return [shlex.quote(json.dumps(value))]
    return [shlex.quote(str(value).lower() if isinstance(value, bool) else str(getattr(value, "value", value)))]


class _Parser(HfArgumentParser):
    """Options of dataclasses, and `--config`."""

    def __init__(self, kinds: Sequence[type], prog: str, summary: str) -> None:
        inherits = any(issubclass(kind, TrainingArguments) for kind in kinds)
        super().__init__(
            list(kinds),
            prog=prog,
            usage="%(prog)s [--config FILE] [--setting value …]",
            epilog="Every setting of transformers.TrainingArguments can be given too." if inherits else None,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--config", metavar="FILE", help="YAML file of these settings; the command line wins.")
        self.summary = summary
        self.config_file = ""
        self.from_file: set[str] = set()  # names of the settings that the file alone gives
        self.given: set[str] = set()  # of all that are given
        self.hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
        self.names = {"help": "help", "config": "config"}  # name or alias, as users write it -> name of the field
        inherited = {one.name for one in dataclasses.fields(TrainingArguments)} if inherits else set()
        own = {"help", "config"} | OFTEN_SET
        for kind in kinds:
            own |= inspect.get_annotations(kind).keys()
            for one in dataclasses.fields(kind):
                if one.init:
                    self.names |= {name.lstrip("-"): one.name for name in [one.name, *one.metadata.get("aliases", ())]}
                    own |= {one.name} - inherited
        for action in self._actions:
            if action.dest not in own or action.option_strings[0].startswith("--no_"):
                action.help = argparse.SUPPRESS

    def format_help(self) -> str:
        """What the command does comes first."""
        return (f"{self.prog}: {self.summary}\n\n" if self.summary else "") + super().format_help()

    def error(self, message: str) -> NoReturn:
        """Called by argparse. A setting is either of the file or of the command line, never of both."""
        name = re.match(r"argument --(\w+)", message)
        source = f"config: {self.config_file}: " if name and name[1] in self.from_file else ""
        self.exit(2, f"{self.prog}: {source}{message}\n")
        raise AssertionError("exit does not return")

    def words_of_file(self, arguments: Sequence[str]) -> list[str]:
        """The settings of the file as arguments, without those that the command line gives too."""
        options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
        given = {self._field_of(option[2:], f"{option} is not a setting", negated=True) for option in options}
        self.given = set(given)
        if "config" not in given:
            return []
        first = argparse.ArgumentParser(self.prog, add_help=False, allow_abbrev=False)
        first.add_argument("--config")
        self.config_file = first.parse_known_args(list(arguments))[0].config
        try:
            settings = load_yaml(self.config_file)
        except (ValueError, OSError) as error:
            self.error(f"config: {error}")
        if not isinstance(settings, dict | None):
            self.error(f"config: {self.config_file} must hold lines `name: value`")
        words: list[str] = []
        for key, value in (settings or {}).items():
            name = self._field_of(str(key), f"config: {self.config_file} sets {key!r}, which is not a setting")
            if name in ("help", "config"):
                self.error(f"config: {self.config_file} sets {key!r}, which only the command line can")
            if name in self.from_file:
                self.error(f"config: {self.config_file} sets {name!r} twice")
            if name not in given:
                self.from_file.add(name)
                self.given.add(name)
                words += self._words(name, value)
        return words

    def _field_of(self, written: str, problem: str, negated: bool = False) -> str:
        """The name of the field. If there is none, the program ends with the problem and the closest name.

        Args:
            negated: accept no_NAME too, the switch that turns a setting off.
        """
        plain = written.replace("-", "_")
        for name in (plain, plain.removeprefix("no_") if negated else plain):
            if name in self.names:
                return self.names[name]
        near = difflib.get_close_matches(plain, self.names, 1)
        self.error(problem + (f"; did you mean {near[0]!r}?" if near else f"; {self.prog} --help lists them"))

    def _words(self, name: str, value: Any) -> list[str]:
        hint = self.hints[name]
        kinds = {get_origin(k) or k for k in (get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,))}
        several = list in kinds and kinds <= {list, NoneType}  # the option takes several arguments
        whole = isinstance(value, list) and list in kinds and not (several and value)
        if whole or type(value) in kinds & {dict, NoneType}:
            self.set_defaults(**{name: value})  # the command line has no way to write it
            return []
        if not several:
            return [f"--{name}={self._word(name, value)}"]
        if isinstance(value, Mapping):
            value = [f"{key}={inner}" for key, inner in value.items()]
        return [f"--{name}", *(self._word(name, one) for one in (value if isinstance(value, list) else [value]))]

    def _word(self, name: str, value: Any) -> str:
        if isinstance(value, dict | list | None):
            self.error(f"argument --{name}: must be a single value, got {value!r}")
        return str(value).lower() if isinstance(value, bool) else str(value)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Wider than argparse's own: the names are long."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=40, width=120)
