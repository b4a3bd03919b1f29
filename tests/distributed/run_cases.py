"""`perpo` commands one after the other in the processes of one group, since starting them takes long.

Each process writes FOLDER/RANK.json: name of a case -> exit code, what it printed to stderr, and which of the trainer's
parameters were whole when it ended.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
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


def main(cases: dict[str, Any], folder: Path, environment: dict[str, Any]) -> None:
    """
    Args:
        cases: name -> {"argv": […], "of_rank": {rank: […]}} (more arguments of one process).
        environment: of this process.
    """
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    PerPOTrainer.train = note_trainer(PerPOTrainer.train)
    rank = os.environ["RANK"]
    found = {}
    sys.stderr = (folder / f"{rank}.stderr").open("w", buffering=1)
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        import deepspeed  # noqa: F401 - whether it is there

        # It would compile C++ for collectives in shared memory, which gloo can do.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    for name, case in cases.items():
        start = time.monotonic()
        found[name] = run([*case["argv"], *case.get("of_rank", {}).get(rank, [])])
        print(f"{name}: {time.monotonic() - start:.1f} s", file=sys.stderr)
        (folder / f"{rank}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()
