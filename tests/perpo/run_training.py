"""A training run in a process of its own: `python -m tests.perpo.run_training OUTPUT_DIR JSON [KILL_AT_STEP]`.

Saves the trained parameters and the log of rank 0; with "evaluate" it only evaluates, on the same lists. With
KILL_AT_STEP the process kills itself after that step, and leaves a checkpoint behind that looks as if it was being
written.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from transformers import TrainerCallback

from tests.perpo import tiny_runs


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            torn = Path(args.output_dir) / f"checkpoint-{self.step}"
            torn.mkdir()
            (torn / "trainer_state.json").write_text('{"global_step": ')
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, kill_at: int | None = None, **options: Any) -> None:
    torch.set_num_threads(1)
    family, n_lists, lora = options.pop("family", "llava"), options.pop("n_lists", 4), options.pop("lora", True)
    resume, dropout = options.pop("resume", None), options.pop("dropout", 0.0)
    evaluate = options.pop("evaluate", False)
    runner = tiny_runs.trainer(family, folder, lora=lora, data=tiny_runs.records(n_lists), dropout=dropout, **options)
    if kill_at is not None:
        runner.add_callback(KillAt(kill_at))
    if evaluate:
        runner.evaluate(runner.train_dataset)
    else:
        runner.train(resume_from_checkpoint=resume)
    if runner.is_world_process_zero():
        torch.save((tiny_runs.trained(runner.model), runner.state.log_history), folder / "trained.pt")


if __name__ == "__main__":
    train(Path(sys.argv[1]), *map(int, sys.argv[3:]), **json.loads(sys.argv[2]))
