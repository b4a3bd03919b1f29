"""The files of a small run of `perpo train`, and commands over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from perpo.cli import main as cli

from ..perpo import tiny_models, tiny_runs

FULL = ["--lora", "false", "--train_lm_head", "true"]


class Project:
    """Three lists: the last step of a pass over them has one, and one to fill up. Two models."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        torch.set_num_threads(1)
        settings = {"learning_rate": 1e-2, "optim": "sgd", "max_steps": 3, "lr_scheduler_type": "constant"} | settings
        self.folder = tiny_runs.save_run(folder, **settings)
        tiny_models.build("llava", seed=1)[0].save_pretrained(folder / "b")
        lists = (folder / "lists.jsonl").read_text().splitlines(keepends=True)
        (folder / "lists.jsonl").write_text("".join(lists[:3]))
        (folder / "other.jsonl").write_text("".join(lists[1:]))

    def argv(self, output: str, *options: str) -> list[str]:
        """Of `perpo train`."""
        return ["train", "--config", str(self.folder / "run.yaml"), "--output_dir", str(self.folder / output), *options]

    def file(self, name: str) -> str:
        return str(self.folder / name)

    def alone(self, name: str, *options: str) -> Path:
        """The folder of the same run in this process."""
        assert cli.main(self.argv(f"{name} alone", "--gradient_accumulation_steps", "2", *options)) == 0
        return self.folder / f"{name} alone"

    def runs(self) -> dict[str, list[str]]:
        """Options of runs that differ in what is trained and in the reference."""
        evaluated = ["--eval_file", self.file("lists.jsonl"), "--eval_strategy", "steps", "--eval_steps", "1"]
        reference = ["--reference", "model", "--ref_model_name_or_path", self.file("model")]
        return {
            "adapters": evaluated,
            "all weights": [*FULL, *evaluated],
            "adapter_off": ["--reference", "adapter_off"],
            "start": ["--reference", "start"],
            "second model": [*FULL, *reference],
            "several models": [*reference, self.file("b")],
        }


def check_sharded(name: str, found: list[dict[str, Any]]) -> None:
    """That no parameter of a case was whole in any process."""
    for rank in found:
        assert rank[name]["code"] == 0, rank[name]["stderr"]
        assert rank[name]["n"] > 50
        assert rank[name]["whole"] == [], name
