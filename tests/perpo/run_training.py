"""A training run in a process of its own: `python -m tests.perpo.run_training OUTPUT_DIR JSON [KILL_AT [STOP_AT]]`.

Saves the trained parameters and the log of rank 0; with "evaluate" it only evaluates, on the same lists. With
KILL_AT (0: never) the process kills itself after that step, and leaves a checkpoint behind that looks as if it was
being written; with STOP_AT the last rank sends itself SIGTERM in the middle of that step.
"""

import json
import os
import signal
import sys
from dataclasses import replace
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


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1 and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def train(folder: Path, kill_at: int = 0, stop_at: int = 0, **options: Any) -> None:
    torch.set_num_threads(1)
    family, n_lists, lora = options.pop("family", "llava"), options.pop("n_lists", 4), options.pop("lora", True)
    resume, dropout = options.pop("resume", None), options.pop("dropout", 0.0)
    evaluate, blind = options.pop("evaluate", False), options.pop("without_image", ())
    broken = options.pop("broken", None)
    data = [replace(one, image=None) if i in blind else one for i, one in enumerate(tiny_runs.records(n_lists))]
    if broken is not None:
        data[broken] = replace(data[broken], prompt="<image> or <image>?")
    runner = tiny_runs.trainer(family, folder, lora=lora, data=data, dropout=dropout, **options)
    if kill_at:
        runner.add_callback(KillAt(kill_at))
    if stop_at:
        runner.add_callback(StopAt(stop_at))
    if evaluate:
        runner.evaluate(runner.train_dataset)
    else:
        runner.train(resume_from_checkpoint=resume)
    if runner.is_world_process_zero():
        torch.save((tiny_runs.trained(runner.model), runner.state.log_history), folder / "trained.pt")


if __name__ == "__main__":
    train(Path(sys.argv[1]), *map(int, sys.argv[3:]), **json.loads(sys.argv[2]))
