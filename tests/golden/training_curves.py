"""Losses of ten optimizer steps on a tiny LLaVA through `PerPOTrainer`: head × objective × rows.

    python -m tests.golden.training_curves            # compare with training_curves.json
    python -m tests.golden.training_curves --write    # renew it, after a change that is meant to change the losses

The curves must not depend on the CPU, its instruction set or the number of threads, which move float32 losses by 2e-6.
The runs compute in float64; adapters start at multiples of 1/1024, which every CPU draws alike; answers are short,
since the batch holds reference log-probs in float32 (an ulp of -80 is 8e-6).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import PrinterCallback

from perpo.model.trainable import freeze, language_lora
from perpo.training.trainer import PerPOTrainer
from tests.perpo import tiny_models, tiny_runs

FILE = Path(__file__).with_suffix(".json")
HEADS = ("frozen", "trainable")
OBJECTIVES = ("perpo", "plackett_luce", "mdpo")  # pairs, a list-wise softmax, pairs over a corrupted image
ROWS = ("shared", "separate")
ANSWERS = ("1", "no", "0")
TOLERANCE = 1e-6  # relative, of every loss; the logged loss is rounded to float32, 6e-8
DISTRIBUTIONS = ("torch", "transformers", "accelerate", "peft", "numpy", "pillow")
DECIDING = ("torch", "transformers")  # a minor release of these may change the curves


@functools.cache
def curve(head: str, objective: str, rows: str) -> tuple[float, ...]:
    """The losses of ten steps over four lists, two a step."""
    model, processor = tiny_models.build("llava", dtype=torch.float64)
    lists = [dataclasses.replace(record, responses=ANSWERS[: record.k]) for record in tiny_runs.records(4)]
    settings: dict[str, Any] = {"prefix_sharing": "on" if rows == "shared" else "off", "objective": objective}
    if head == "frozen":
        adapters, settings["reference"] = language_lora(model, r=4, alpha=8), "adapter_off"
    else:
        adapters, settings["reference"] = None, "precomputed"
        freeze(model, head=False)
    with tempfile.TemporaryDirectory() as folder, one_thread():
        config = tiny_runs.config(
            Path(folder),
            per_device_train_batch_size=2,
            max_steps=10,
            learning_rate=3e-3,
            max_chunk_bytes=8192,  # three rows of logits: a list takes several chunks
            **settings,
        )
        runner = PerPOTrainer(model, config, lists, processor, peft_config=adapters)
        generator = torch.Generator().manual_seed(0)
        for parameter in (p for name, p in runner.model.named_parameters() if "lora_" in name):
            parameter.data = torch.randint(-256, 257, parameter.shape, generator=generator).double() / 1024
        runner.remove_callback(PrinterCallback)
        runner.train()
    return tuple(line["loss"] for line in runner.state.log_history if "loss" in line)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes in one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def names() -> Iterator[tuple[str, str, str]]:
    yield from itertools.product(HEADS, OBJECTIVES, ROWS)


def kept() -> dict[str, Any]:
    """The file: `versions` that wrote it, and `curves` by head/objective/rows."""
    return json.loads(FILE.read_text())


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in DISTRIBUTIONS}


def other_versions() -> str | None:
    """In which of the deciding versions this environment is not the one that wrote the file, for a reader."""
    theirs, ours = kept()["versions"], versions()

    def minor(version: str) -> list[str]:
        return version.split(".")[:2]

    differ = [f"{n} {theirs[n]} (here {ours[n]})" for n in DECIDING if minor(theirs[n]) != minor(ours[n])]
    return "the curves were written with " + ", ".join(differ) if differ else None


def deviation(losses: tuple[float, ...], expected: tuple[float, ...] | list[float]) -> float:
    """The largest relative difference of two curves."""
    return max(abs(ours / theirs - 1) for ours, theirs in zip(losses, expected, strict=True))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.golden.training_curves", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name}")
    write = parser.parse_args(arguments).write
    curves = {"/".join(name): curve(*name) for name in names()}
    before = kept() if FILE.exists() else {"curves": {}}
    for name, losses in curves.items():
        old = before["curves"].get(name)
        print(f"{name}: {'new' if old is None else f'largest relative difference {deviation(losses, old):.1e}'}")
    if write:
        FILE.write_text(json.dumps({"versions": versions(), "curves": curves}, indent=1) + "\n")


if __name__ == "__main__":
    main()
