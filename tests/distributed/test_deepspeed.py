"""`perpo train` on two processes with DeepSpeed ZeRO-3 equals one process, to rounding.

pip install deepspeed; pytest -m slow tests/distributed/test_deepspeed.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .launch import assert_alike_in_bf16, assert_same_run, launch
from .project import FULL, Project, check_sharded

ZERO_3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,  # of a tiny model, all parameters would stay whole
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


@pytest.mark.slow
def test_zero_3_on_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is no part of perpo[test]")
    project = Project(tmp_path)
    (tmp_path / "zero3.json").write_text(json.dumps(ZERO_3))
    (tmp_path / "zero3-bf16.json").write_text(json.dumps(ZERO_3 | {"bf16": {"enabled": "auto"}}))
    sharded = ["--deepspeed", project.file("zero3.json")]
    chosen = {name: options for name, options in project.runs().items() if name != "several models"}
    cases: dict[str, Any] = {name: {"argv": project.argv(name, *options, *sharded)} for name, options in chosen.items()}
    saving = [*FULL, *sharded, "--save_strategy", "steps", "--save_steps", "1"]
    cases["begun"] = {"argv": project.argv("ended", *saving, "--max_steps", "2")}
    cases["ended"] = {"argv": project.argv("ended", *saving, "--resume_from_checkpoint", "true")}
    bf16 = ["--bf16", "true"]
    cases["bf16"] = {"argv": project.argv("bf16", *bf16, "--deepspeed", project.file("zero3-bf16.json"))}
    found = launch(cases, tmp_path / "launch", DS_ACCELERATOR="cpu")
    for name in cases:
        check_sharded(name, found)
    folders = {name: project.alone(name, *options) for name, options in chosen.items()}
    for name, alone in folders.items():
        assert_same_run(tmp_path / name, alone)
    assert_alike_in_bf16(tmp_path / "bf16", project.alone("bf16", *bf16))
    assert_same_run(tmp_path / "ended", project.alone("ended", *FULL))
    resumed = {"argv": project.argv("ended", *saving, "--resume_from_checkpoint", "true", "--max_steps", "4")}
    resumed["argv"] += ["--gradient_accumulation_steps", "2"]
    (one,) = launch({"one": resumed}, tmp_path / "one", n=1, DS_ACCELERATOR="cpu")
    assert one["one"]["code"] == 1
    assert "was written by 2 processes with DeepSpeed, which cannot spread it over 1" in one["one"]["stderr"]
