"""`perpo train`: what it refuses before any work is done, what it leaves out, and what it says when memory runs out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from perpo.cli import main as cli
from perpo.cli import train as train_command
from perpo.data.record import ListRecord
from perpo.model import settings as loading
from perpo.training.trainer import PerPOTrainer

from .. import tiny_runs

Shown = pytest.CaptureFixture[str]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    return tiny_runs.save_run(tmp_path)


def command(project: Path, *extra: str) -> list[str]:
    return ["train", "--config", str(project / "run.yaml"), *extra]


def damage(image: Path) -> None:
    image.write_bytes(image.read_bytes()[:-200])


def log(project: Path, output: str = "out") -> list[dict[str, Any]]:
    return json.loads((project / output / "trainer_state.json").read_text())["log_history"]


def no_model(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a model was loaded")


def test_a_damaged_image_is_named_before_the_model_is_loaded(project: Path, capsys: Shown, monkeypatch: Any) -> None:
    monkeypatch.setattr(loading, "load_model", no_model)
    damage(project / "r2.png")
    assert cli.main(command(project, "--reference", "adapter_off")) == 1
    error = capsys.readouterr().err
    assert "lists.jsonl:3: record 'r2': image '" in error
    assert "r2.png' cannot be" in error
    assert "skip_bad leaves out such records and counts them" in error
    assert "Traceback" not in error


def test_damaged_images_are_left_out_and_counted(project: Path, capsys: Shown) -> None:
    damage(project / "r2.png")
    options = ["--skip_bad", "true", "--dataloader_num_workers", "1", "--num_train_epochs", "1", "--max_steps", "-1"]
    assert cli.main(command(project, *options)) == 0
    shown = capsys.readouterr()
    assert "3 lists of 2–3 answers; 1 bad records skipped" in shown.out
    assert "skipped: " in shown.err
    assert "record 'r2'" in shown.err
    assert log(project)[-1]["step"] == 3


def test_where_no_image_can_be_read_there_is_nothing_to_leave_out(project: Path, capsys: Shown) -> None:
    for image in project.glob("*.png"):
        damage(image)
    assert cli.main(command(project, "--skip_bad", "true")) == 1
    assert "record 'r0': image '" in capsys.readouterr().err


def test_what_a_worker_cannot_encode_is_one_line(tmp_path: Path) -> None:
    """Here found too late: only the command looks at all images first."""
    first, *rest = tiny_runs.records()
    first.image.save(tmp_path / "a.png")
    damage(tmp_path / "a.png")
    bad = ListRecord("bad", "a.png", first.prompt, responses=first.responses, rewards=first.rewards)
    options = {"reference": "none", "prefix_sharing": "off", "dataloader_num_workers": 1, "max_steps": 4}
    runner = tiny_runs.trainer("llava", tmp_path / "out", data=[*rest, bad], image_root=str(tmp_path), **options)
    with pytest.raises(ValueError, match=r"^record 'bad': image '.*a.png' cannot be [^\n]*$"):
        runner.train()


def test_running_out_of_memory_says_what_takes_less(project: Path, capsys: Shown, monkeypatch: Any) -> None:
    def train(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(PerPOTrainer, "train", train)
    assert cli.main(command(project)) == 1
    error = capsys.readouterr().err
    assert "perpo train: CUDA out of memory" in error
    for setting in ("--gradient_checkpointing", "--max_candidates", "max_pixels", "--per_device_train_batch_size"):
        assert setting in error
    assert "Traceback" not in error


def test_a_folder_with_checkpoints_is_refused_before_anything_is_read(
    project: Path, capsys: Shown, monkeypatch: Any
) -> None:
    saving = ["--save_steps", "1"]
    assert cli.main(command(project, *saving)) == 0
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(train_command, "usable_records", no_model)
        assert cli.main(command(project, *saving)) == 1
        assert "out holds checkpoints; resume from them with resume_from_checkpoint=true" in capsys.readouterr().err
    resume = ["--resume_from_checkpoint", "true"]
    assert cli.main(command(project, *saving, *resume, "--learning_rate", "1e-4")) == 1
    assert (
        "holds checkpoints that this run cannot take as its own; different: learning_rate (5e-06 there, 0.0001 now)"
        in capsys.readouterr().err
    )
    assert cli.main(command(project, *saving, *resume, "--max_steps", "3")) == 0
    assert log(project)[-1]["step"] == 3


def test_the_reference_model_is_loaded_as_the_model_is(project: Path, monkeypatch: Any) -> None:
    loaded = []

    def load(name: str, **options: Any) -> Any:
        loaded.append((Path(name).name, {k: v for k, v in options.items() if k != "revision"}))
        return real(name, **options)

    real = loading.load_model
    monkeypatch.setattr(loading, "load_model", load)
    (project / "other").symlink_to(project / "model")
    options = ["--reference", "model", "--ref_model_name_or_path", str(project / "other")]
    options += ["--attn_implementation", "eager", "--dtype", "float32", "--prefix_sharing", "off"]
    assert cli.main(command(project, *options)) == 0
    (first, given), (second, theirs) = loaded
    assert (first, second) == ("model", "other")
    assert given == theirs == {"dtype": "float32", "attn_implementation": "eager", "trust_remote_code": False}
