"""Under torchrun: `perpo` commands one after the other in the same processes, since starting one takes long.

    torchrun … -m tests.distributed.run_cases CASES.json FOLDER

CASES.json holds a mapping: name -> {"argv": […], "of_rank": {"1": […]}} (more arguments of one process). Each process
writes FOLDER/RANK.json: name -> exit code, what it printed to stderr, and which of the trainer's parameters were
DTensors when it ended.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from perpo.cli import main as cli
from perpo.training.trainer import PerPOTrainer

STARTED: list[PerPOTrainer] = []


def note_trainer(train: Any) -> Any:
    def noting(self: PerPOTrainer, *args: Any, **options: Any) -> Any:
        STARTED.append(self)
        return train(self, *args, **options)

    return noting


def run(argv: list[str]) -> dict[str, Any]:
    STARTED.clear()
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = cli.main(argv)
    found: dict[str, Any] = {"code": code, "stderr": said.getvalue()}
    if STARTED:
        parameters = list(STARTED[0].model.named_parameters())
        found["whole"] = [name for name, p in parameters if not isinstance(p, DTensor) and not hasattr(p, "ds_id")]
        found["n"] = len(parameters)
    return found


def main() -> None:
    torch.set_num_threads(1)
    cases, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    PerPOTrainer.train = note_trainer(PerPOTrainer.train)  # type: ignore[method-assign]
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        import deepspeed  # noqa: F401

        # It would compile C++ for collectives in shared memory, which gloo can do.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    rank = os.environ["RANK"]
    found = {}
    for name, case in cases.items():
        found[name] = run([*case["argv"], *case.get("of_rank", {}).get(rank, [])])
        (folder / f"{rank}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
