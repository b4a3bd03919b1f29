"""`perpo align`: from labelled images to an aligned model, in rounds of sampling, training and evaluation.

perpo align --model Qwen/Qwen2.5-VL-7B-Instruct --records train.jsonl --held_out held_out.jsonl --output_dir run \\
    --rounds 2 --generate '{k: 20}' --train '{bf16: true}'

Round r draws answers from the model of round r − 1 and trains that model on them. A step is one of the commands
`perpo generate`, `perpo train` and `perpo evaluate`, in a process of its own, with its settings in a file:

    output_dir/round-1/generate.yaml    lists.jsonl
                       train.yaml       model/
    output_dir/evaluation/evaluate.yaml answers.jsonl, evaluation.json, report.html: all models so far

The same command goes on where it was stopped, wherever that was: a step that is finished is not done again, and each of
the commands resumes by itself.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import yaml

from perpo.cli import evaluate, generate, train
from perpo.cli.settings import parse
from perpo.data.documents import mapping
from perpo.data.read import read_records
from perpo.data.record import write_records
from perpo.evaluation.evaluate import FIGURES
from perpo.model.adapters import base_of
from perpo.model.settings import LoadSettings, check_place
from perpo.storage import identity
from perpo.storage.fingerprints import file_fingerprint, fingerprint
from perpo.storage.lock import held

Interval = tuple[float, float | None, float | None]  # value, low, high

START = "start"
REFERENCES = ("round", "first", "none")
STATE = "trainer_state.json"  # the last file that `perpo train` writes

# What this command gives to each of the others; the sections may not.
GIVEN = {
    "generate": ("records", "output", "image_root"),
    "train": (
        "train_file",
        "output_dir",
        "image_root",
        "reference",
        "ref_model_name_or_path",
        "resume_from_checkpoint",
    ),
    "evaluate": ("models", "records", "output", "image_root"),
}
MODULES = {"generate": generate, "train": train, "evaluate": evaluate}


@dataclass
class AlignConfig(LoadSettings):
    """Which model, which data, how many rounds; and the settings of the three commands."""

    model_name_or_path: str = field(
        metadata={"help": "Folder or hub name of the model that the first round starts from.", "aliases": ["--model"]}
    )
    records: str = field(metadata={"help": "Images, prompts and true answers to train on: .jsonl, .json or .parquet."})
    output_dir: str = field(metadata={"help": "Folder of all rounds and of the evaluation."})
    held_out: str | None = field(
        default=None, metadata={"help": "Records that every model is evaluated on; default: no evaluation."}
    )
    rounds: int = field(default=1, metadata={"help": "How often answers are drawn anew. A larger number goes on."})
    lists_per_round: int | None = field(
        default=None,
        metadata={"help": "Records of a round, each round others, in a random order; default: all in every round."},
    )
    reference: str = field(
        default="round",
        metadata={
            "help": "The reference model of a round: the model that the round starts from, or the first of all.",
            "choices": list(REFERENCES),
        },
    )
    stop_when_worse: bool = field(
        default=True,
        metadata={
            "help": "End when, in any task, the first metric on held_out falls out of the interval of the best round; "
            "below 30 records there is none."
        },
    )
    image_root: str | None = field(default=None, metadata={"help": "Folder that image paths are under."})
    seed: int = field(
        default=0, metadata={"help": "Of the order of records; round r samples and trains with seed + r."}
    )
    processes: int = field(
        default=1, metadata={"help": "Processes, one a GPU, that sample and train, started by torchrun."}
    )
    generate: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Settings of `perpo generate`, as JSON or YAML mapping: {k: 20}."}
    )
    train: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Settings of `perpo train`: {bf16: true, learning_rate: 1.0e-5}."}
    )
    evaluate: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Settings of `perpo evaluate`: {n: 0, blank_test: false}."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rounds", "processes", "lists_per_round"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be ≥ 1, got {value}")
        if self.reference not in REFERENCES:
            raise ValueError(f"reference must be one of {', '.join(REFERENCES)}; got {self.reference!r}")
        for command, given in GIVEN.items():
            section = mapping(command, getattr(self, command))
            for name in section:
                if name in given or hasattr(LoadSettings, str(name)) or name in ("model", "model_name_or_path"):
                    raise ValueError(f"{command}: {name!r} is set by `perpo align`; leave it out of the section")
            setattr(self, command, section)
        if self.rounds > 1 and mapping("generate", self.generate).get("engine") == "openai":
            raise ValueError(
                "generate: with engine: openai every round would sample from the model that the server serves, and "
                "not from that of the round before; set rounds to 1, or another engine"
            )

    def section(self, command: str) -> dict[str, Any]:
        """Settings of a command as they were given, with how models are loaded and what all rounds share."""
        loading = {name: getattr(self, name) for name in LoadSettings.__dataclass_fields__}
        common = {name: value for name, value in loading.items() if value not in (None, {})}
        if self.image_root is not None:
            common["image_root"] = self.image_root
        return {**common, **mapping(command, getattr(self, command))}


SETTINGS = (AlignConfig,)


class Step(NamedTuple):
    """One command with its settings."""

    command: str
    file: Path  # that holds the settings
    processes: int = 1


def run(config: AlignConfig) -> None:
    """All rounds; prints what came of each."""
    check_place(config.model_name_or_path)
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder / ".lock", f"output_dir: {folder}"):
        identity.claim(folder, _identity(config), setting="output_dir", contents="rounds", pattern="round-*")
        _check_settings(config)
        print(_rounds(config, folder))


def _rounds(config: AlignConfig, folder: Path) -> str:
    models = {START: config.model_name_or_path}
    _evaluate(config, folder, models)
    for number in range(1, config.rounds + 1):
        place = folder / f"round-{number}"
        model = place / "model"
        if not (model / STATE).is_file():  # else the round is over, and its lists may have been deleted
            lists = place / "lists.jsonl"
            start = list(models.values())[-1]
            if not lists.is_file():
                _run(_generate_step(config, place, number, start))
            _run(_train_step(config, place, number, start))
        models[place.name] = str(model)
        _evaluate(config, folder, models)
        if worse := config.stop_when_worse and _worse(folder, models):
            return f"{_summary(folder, models)}\n\nstopped after {place.name}: {worse}"
    return _summary(folder, models)


# ------------------------------------------------------------------------------------------------------------- steps


def _generate_step(config: AlignConfig, place: Path, number: int, start: str) -> Step:
    place.mkdir(parents=True, exist_ok=True)
    settings = {
        "model_name_or_path": start,
        "records": _records_of_round(config, place, number),
        "output": str(place / "lists.jsonl"),
        "seed": config.seed + number,
        **config.section("generate"),
    }
    processes = 1 if settings.get("engine") == "vllm" else config.processes  # which has its own way to several GPUs
    return _write(Step("generate", place / "generate.yaml", processes), settings)


def _train_step(config: AlignConfig, place: Path, number: int, start: str) -> Step:
    place.mkdir(parents=True, exist_ok=True)
    settings = {
        "model_name_or_path": start,
        "train_file": str(place / "lists.jsonl"),
        "output_dir": str(place / "model"),
        "resume_from_checkpoint": "true",
        "seed": config.seed + number,
        **_reference(config, start),
        **config.section("train"),
    }
    return _write(Step("train", place / "train.yaml", config.processes), settings)


def _evaluate_step(config: AlignConfig, folder: Path, models: dict[str, str]) -> Step:
    (folder / "evaluation").mkdir(exist_ok=True)
    settings = {
        "models": [f"{name}={path}" for name, path in models.items()],
        "records": config.held_out,
        "output": str(folder / "evaluation"),
        "seed": config.seed,
        **config.section("evaluate"),
    }
    return _write(Step("evaluate", folder / "evaluation" / "evaluate.yaml"), settings)


def _reference(config: AlignConfig, start: str) -> dict[str, Any]:
    """The settings of `perpo train` for the reference model of a round that begins with the model `start`."""
    if config.reference == "none":
        return {"reference": "none"}
    first = config.model_name_or_path
    if config.reference == "round" or start == first:
        return {"reference": "start"}
    lora = mapping("train", config.train).get("lora", True)
    if str(lora).lower() == "true" and base_of(first) is None:
        return {"reference": "adapter_off"}
    return {"reference": "model", "ref_model_name_or_path": first}


def _records_of_round(config: AlignConfig, place: Path, number: int) -> str:
    """The file of a round's records: so many of a random order, from where the round before ended, and round again."""
    n = config.lists_per_round
    if n is None:
        return config.records
    file = place / "records.jsonl"
    if not file.is_file():
        skip_bad = bool(mapping("generate", config.generate).get("skip_bad", False))
        records, _ = read_records(config.records, require=("answer",), skip_bad=skip_bad)
        order = list(range(len(records)))
        random.Random(config.seed).shuffle(order)
        begin = (number - 1) * n
        write_records([records[order[i % len(order)]] for i in range(begin, begin + min(n, len(order)))], file)
    return str(file)


def _write(step: Step, settings: dict[str, Any]) -> Step:
    step.file.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return step


def _check_settings(config: AlignConfig) -> None:
    """Read each command's settings as it will, before anything runs; a mistake ends the program with a message."""
    folder, start = Path(config.output_dir), config.model_name_or_path
    place = folder / "round-1"
    steps = [_generate_step(config, place, 1, start), _train_step(config, place, 1, start)]
    if config.held_out is not None:
        steps.append(_evaluate_step(config, folder, {START: start}))
    for step in steps:
        parse(MODULES[step.command].SETTINGS, ["--config", str(step.file)], f"perpo align: {step.command}")


def _run(step: Step) -> None:
    """Run a step in processes of its own, which get the signals of this one.

    Raises:
        ValueError: it failed; what is wrong stands above.
        SystemExit: it was stopped by a signal.
    """
    title = f"{step.file.parent.name}: perpo {step.command} --config {step.file}"
    print(f"\n── {title}", flush=True)
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={step.processes}"] if step.processes > 1 else []
    command = [sys.executable, *launcher, "-m", "perpo", step.command, "--config", str(step.file)]
    with subprocess.Popen(command) as process:
        stopped: list[int] = []

        def forward(number: int, frame: FrameType | None) -> None:
            stopped.append(number)
            if number == signal.SIGTERM or not sys.stdin.isatty():  # a terminal sends SIGINT to all its processes
                process.send_signal(number)

        before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            status = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if stopped:
        print(f"{signal.Signals(stopped[0]).name}: stopped in {title}; the same command goes on", file=sys.stderr)
        raise SystemExit(128 + stopped[0])
    if status:
        raise ValueError(f"{title} ended with status {status}; once that is mended, the same command goes on")


# ------------------------------------------------------------------------------------------------- what came of it


def _evaluate(config: AlignConfig, folder: Path, models: dict[str, str]) -> None:
    if config.held_out is not None and not set(models) <= set(_evaluated(folder)):
        _run(_evaluate_step(config, folder, models))


def _tasks(folder: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads((folder / "evaluation" / FIGURES).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet
        return []
    return list(found["tasks"])


def _evaluated(folder: Path) -> list[str]:
    return [name for task in _tasks(folder)[:1] for name in task["models"]]


def _first_metric(task: dict[str, Any]) -> tuple[str, float, dict[str, Interval]]:
    """Its label, 1 or −1 as higher or lower is better, and of each model the value with its bounds (None: too few)."""
    name, about = next(iter(task["metrics"].items()))
    found = {model: of["metrics"][name]["greedy"] for model, of in task["models"].items()}
    values = {model: (one["value"], one["low"], one["high"]) for model, one in found.items()}
    return about["label"], 1.0 if about["higher_is_better"] else -1.0, values


def _worse(folder: Path, models: dict[str, str]) -> str:
    """In what the last model is worse than the best so far; empty if in nothing."""
    *earlier, last = models
    for task in _tasks(folder):
        label, sign, values = _first_metric(task)
        best = max(earlier, key=lambda name: sign * values[name][0])
        _, low, high = values[best]
        if low is not None and high is not None and sign * values[last][0] < min(sign * low, sign * high):
            return f"{label} of {task['task']} is {values[last][0]:.3f}, that of {best} {_shown(values[best])}"
    return ""


def _summary(folder: Path, models: dict[str, str]) -> str:
    lines = [""]
    for task in _tasks(folder):
        label, sign, values = _first_metric(task)
        known = {name: values[name] for name in models}
        best = max(known, key=lambda name: sign * known[name][0])
        lines.append(f"{label} of {task['task']} ({task['n_records']} records)")
        lines += [f"  {name:12} {_shown(one)}" + ("  best" if name == best else "") for name, one in known.items()]
    if not _tasks(folder):
        lines.append("no held_out records: nothing was evaluated")
    return "\n".join([*lines, "", f"the last model: {list(models.values())[-1]}"])


def _shown(one: Interval) -> str:
    value, low, high = one
    bounds = "too few records for an interval" if low is None or high is None else f"{low:.3f}, {high:.3f}"
    return f"{value:.3f} [{bounds}]"


def _identity(config: AlignConfig) -> dict[str, str]:
    """What the rounds depend on; how many there are may change."""
    files = {"records": config.records, "held_out": config.held_out}
    return {
        "model": config.model_name_or_path,
        **{name: "none" if file is None else _content(file) for name, file in files.items()},
        **{name: str(getattr(config, name)) for name in ("lists_per_round", "reference", "seed")},
        **{command: fingerprint(config.section(command)) for command in GIVEN},
    }


def _content(file: str) -> str:
    return file_fingerprint(Path(file)) if os.path.isfile(file) else file
