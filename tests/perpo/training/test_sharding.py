"""What is refused or said of sharding, before any of it; `tests/distributed` shards."""

import importlib.util
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perpo.training import sharding
from perpo.training.sharding import check_checkpoint

from .. import tiny_runs


def test_sharding_in_a_single_process_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fsdp: there is no group of processes to share the weights"):
        tiny_runs.trainer("llava", tmp_path, fsdp="full_shard", reference="none")
    assert sharding.LAUNCHED not in os.environ  # which would have the next trainer sharded


def test_an_engine_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"deepspeed='zero3.json': the package is not installed; `pip install"):
        tiny_runs.config(tmp_path, deepspeed="zero3.json")


def checkpoint(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).touch()
    return folder


def trainer(n: int, *, fsdp: bool = False, deepspeed: bool = False) -> Any:
    return SimpleNamespace(
        args=SimpleNamespace(world_size=n),
        is_fsdp_enabled=fsdp,
        is_deepspeed_enabled=deepspeed,
        is_world_process_zero=lambda: True,
    )


OF_FSDP = ("pytorch_model_fsdp.bin", "optimizer.bin", "rng_state_0.pth", "rng_state_1.pth")
OF_DEEPSPEED = (
    "global_step2/zero_pp_rank_0_mp_rank_00_model_states.pt",
    "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "global_step2/zero_pp_rank_1_mp_rank_00_optim_states.pt",
)


@pytest.mark.parametrize(
    ("files", "now", "message"),
    [
        (OF_FSDP, trainer(2), "written with FSDP, and this run has whole weights in every process"),
        (("optimizer.pt", "rng_state.pth"), trainer(2, fsdp=True), "with whole weights in every process, and this run"),
        (OF_DEEPSPEED, trainer(2, fsdp=True), "was written with DeepSpeed, and this run has FSDP"),
        (OF_DEEPSPEED, trainer(1, deepspeed=True), "by 2 processes with DeepSpeed, which cannot spread it over 1"),
    ],
)
def test_checkpoints_that_cannot_be_read_are_refused(files: Any, now: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        check_checkpoint(now, checkpoint(tmp_path, *files))


def test_another_number_of_processes_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "logger", logging.getLogger("sharding"))
    check_checkpoint(trainer(2, fsdp=True), checkpoint(tmp_path, *OF_FSDP))
    assert not caplog.records
    check_checkpoint(trainer(4, fsdp=True), tmp_path)
    assert "was written by 2 processes and is resumed by 4: with the same lists in every step" in caplog.text
