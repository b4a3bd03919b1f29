"""Start `tests.distributed.run_cases` in several processes, and compare what runs have written."""

from __future__ import annotations

import json
import multiprocessing
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from . import run_cases

ROOT = Path(__file__).parents[2]
# One process imports everything, and each rank is a copy of it: imports take ten times as long as a tiny run.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.distributed.run_cases"])


def launch(cases: dict[str, Any], folder: Path, n: int = 2, **environment: str) -> list[dict[str, Any]]:
    """What each of n processes of one group noted of each case. They are started as torchrun would.

    Args:
        cases: name -> {"argv": […], "of_rank": {rank: […]}}.
    """
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in range(n):
        variables = {**environment, **group, "RANK": rank, "LOCAL_RANK": rank}
        ranks.append(CONTEXT.Process(target=run_cases.main, args=(cases, folder, variables), daemon=True))
        ranks[-1].start()
    end = time.monotonic() + 900
    while any(rank.is_alive() for rank in ranks) and time.monotonic() < end:
        time.sleep(0.1)
        if any(rank.exitcode for rank in ranks):
            break
    for rank in ranks:
        rank.join(2)
        rank.kill()
    assert [rank.exitcode for rank in ranks] == [0] * n, [path.read_text() for path in folder.glob("*.stderr")]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(n)]


def log(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def weights(folder: Path) -> dict[str, Any]:
    """Of a saved adapter, or of a saved model, under the names that it has here: files hold those of several years."""
    if (folder / "adapter_model.safetensors").exists():
        return load_file(folder / "adapter_model.safetensors")
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def assert_same_run(ours: Path, theirs: Path, rel: float = 1e-4) -> None:
    """The same losses, gradients and metrics at every step, and the same weights in the end, to rounding."""
    our_log, their_log = log(ours), log(theirs)
    assert [entry["step"] for entry in our_log] == [entry["step"] for entry in their_log]
    compared = set()
    for mine, other in zip(our_log, their_log, strict=True):
        for name, value in other.items():
            if name == "train_loss":  # of a run that was resumed: that of its steps since, over all steps
                continue
            if name.endswith(("loss", "grad_norm")) or "rewards/" in name or "logps/" in name or "lists/" in name:
                assert mine[name] == pytest.approx(value, rel=rel, abs=1e-5), (mine["step"], name)
                compared.add(name)
    assert {"loss", "grad_norm", "rewards/chosen", "logps/rejected"} <= compared
    found, expected = weights(ours), weights(theirs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-5 * max(1, value.abs().max()), name


def assert_alike_in_bf16(ours: Path, theirs: Path) -> None:
    for name in ("loss", "grad_norm"):
        expected = [entry[name] for entry in log(theirs) if name in entry]
        assert [entry[name] for entry in log(ours) if name in entry] == pytest.approx(expected, rel=0.03), name
