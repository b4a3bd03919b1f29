"""The command `perpo`: finds the sub-command, imports only that, reads its settings and runs it.

A sub-command is a line in COMMANDS and a module with

    SETTINGS         dataclasses that `perpo.cli.settings.parse` reads
    run(*settings)   does the work and prints the result; raises one of EXPECTED for what the user can correct
    OUT_OF_MEMORY    what takes less memory; only for commands that load a model
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

EXPECTED = (ValueError, OSError, ImportError)  # shown as one line; any other error is a bug


class Command(NamedTuple):
    module: str
    summary: str


COMMANDS = {
    "align": Command(
        "perpo.cli.align", "sample, train and evaluate in rounds, from labelled images to an aligned model"
    ),
    "coco": Command("perpo.cli.coco", "grounding records from a COCO-style file"),
    "generate": Command("perpo.cli.generate", "sample and score candidate answers: lists for `perpo train`"),
    "score": Command("perpo.cli.score", "rewards for answers that exist, from any source: lists for `perpo train`"),
    "plan": Command("perpo.cli.plan", "what a training step costs and what fits on a GPU"),
    "train": Command("perpo.cli.train", "align a vision-language model with lists of scored answers"),
    "evaluate": Command("perpo.cli.evaluate", "compare models on held-out records, with and without the image"),
    "merge": Command("perpo.cli.merge", "add an adapter to its base model's weights"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `perpo ARGUMENTS`; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0 if given else 2
    name, *rest = given
    if name not in COMMANDS:
        print(f"perpo: no command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    sys.path.append(os.getcwd())  # for rewards by import path: a console script does not search the current folder
    command = importlib.import_module(COMMANDS[name].module)
    import torch  # the usage above needs none

    parse = importlib.import_module("perpo.cli.settings").parse
    settings = parse(command.SETTINGS, rest, f"perpo {name}", COMMANDS[name].summary)
    try:
        command.run(*settings)
    except (*EXPECTED, torch.OutOfMemoryError) as error:
        if os.environ.get("PERPO_TRACEBACK"):
            raise
        hint = getattr(command, "OUT_OF_MEMORY", "") if isinstance(error, torch.OutOfMemoryError) else ""
        print(f"perpo {name}: {error}\n{hint}(PERPO_TRACEBACK=1 shows where this comes from)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"perpo {name}: interrupted; what was finished is kept", file=sys.stderr)
        return 130
    return 0


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: perpo COMMAND [--setting value …]",
            "",
            "Perceptual Preference Optimization of vision-language models.",
            "",
            *lines,
            "",
            "`perpo COMMAND --help` lists the settings of a command; --config FILE.yaml holds them.",
        ]
    )
