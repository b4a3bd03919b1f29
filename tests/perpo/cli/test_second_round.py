"""`perpo train` on a folder that it wrote: nothing that the first round learnt is lost."""

from pathlib import Path

import pytest
import torch

from perpo.cli.main import main
from perpo.model.load import load_model

from .. import tiny_runs

Shown = pytest.CaptureFixture[str]
INPUTS = {"input_ids": torch.arange(5, 15).unsqueeze(0)}


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(str(folder), dtype=torch.float32).eval()(**INPUTS).logits


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first round of two steps, far enough for its adapter to matter."""
    folder = tiny_runs.save_run(tmp_path_factory.mktemp("rounds"), learning_rate=0.1)
    assert main(["train", "--config", str(folder / "run.yaml")]) == 0
    assert (logits(folder / "out") - logits(folder / "model")).abs().max() > 0.1
    return folder


def second(folder: Path, name: str, *options: str, steps: int = 1) -> Path:
    model = ["--model_name_or_path", str(folder / "out"), "--output_dir", str(folder / name)]
    still = ["--learning_rate", "0", "--max_steps", str(steps)]  # what is saved is what was begun with
    config = (folder / "run.yaml").read_text().replace("lora_r: 4\n", "")
    (folder / "again.yaml").write_text(config)
    assert main(["train", "--config", str(folder / "again.yaml"), *model, *still, *options]) == 0
    return folder / name


def test_it_trains_the_adapter_further(rounds: Path, capsys: Shown) -> None:
    out = second(rounds, "further")
    torch.testing.assert_close(logits(out), logits(rounds / "out"), atol=1e-4, rtol=1e-4)
    shown = capsys.readouterr().out
    assert "training continues with the adapters that the model comes with, r=4" in shown
    assert "trained: " in shown
    moved = second(rounds, "moved", "--learning_rate", "0.1")
    assert not torch.allclose(logits(moved), logits(rounds / "out"), atol=1e-3)


def test_with_other_layers_the_adapter_is_merged_first(rounds: Path, capsys: Shown) -> None:
    out = second(rounds, "other", "--lora_target_modules", "q_proj", "--save_strategy", "steps", "--save_steps", "1")
    torch.testing.assert_close(logits(out), logits(rounds / "out"), atol=1e-4, rtol=1e-4)
    assert f"merged into its weights, saved in {out / 'base'}" in capsys.readouterr().out
    again = ["--lora_target_modules", "q_proj", "--save_strategy", "steps", "--save_steps", "1"]
    second(rounds, "other", *again, "--resume_from_checkpoint", "true", steps=2)
    torch.testing.assert_close(logits(out), logits(rounds / "out"), atol=1e-4, rtol=1e-4)


def test_without_adapters_the_merged_model_is_trained(rounds: Path, capsys: Shown) -> None:
    out = second(rounds, "whole", "--lora", "false")
    torch.testing.assert_close(logits(out), logits(rounds / "out"), atol=1e-4, rtol=1e-4)
    assert not (out / "adapter_config.json").exists()
    assert "the adapters that the model comes with are merged into its weights" in capsys.readouterr().out
