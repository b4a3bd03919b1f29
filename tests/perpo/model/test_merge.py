"""Merging an adapter: the sum is exact, the folder is whole or absent, and what was done is said."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors import SafetensorError

from perpo.cli import main as cli
from perpo.model.adapters import merge_adapters
from perpo.model.load import load_model, load_processor
from perpo.model.merge import save_merged
from perpo.model.trainable import language_lora

from .. import tiny_models


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An adapter on a base model in bf16, with a projector that was trained in fp32, and the processor."""
    model, processor = tiny_models.build("llava", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "run")
    base = load_model(str(tmp_path / "model"), dtype=torch.float32)
    torch.manual_seed(0)
    config = language_lora(base, r=4, alpha=8, train_projector=True)
    config.init_lora_weights = False
    adapted = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1e-4 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def expected(run: Path) -> dict[str, torch.Tensor]:
    """W + BA·α/r in fp64, and the trained projector."""
    adapted: Any = PeftModel.from_pretrained(load_model(str(run.parent / "model"), dtype=torch.float64), run)
    return dict(adapted.double().merge_and_unload().named_parameters())


def same(folder: Path, weights: dict[str, torch.Tensor], dtype: torch.dtype, **tolerance: float) -> None:
    found = dict(load_model(str(folder)).named_parameters())
    assert found.keys() == weights.keys()
    for name, parameter in found.items():
        assert parameter.dtype == dtype
        torch.testing.assert_close(parameter.detach(), weights[name].detach().to(dtype), **tolerance)


def test_the_sum_is_in_fp32_and_is_rounded_once_to_the_base_s_type(run: Path, tmp_path: Path) -> None:
    weights = {name: p.float() for name, p in expected(run).items()}
    done = save_merged(run, tmp_path / "whole", "float32")
    assert (done.dtype, done.base, done.processor) == ("float32", str(tmp_path / "model"), str(run))
    assert done.layers == 7 * tiny_models.LAYERS
    assert any("projector" in name for name in done.whole)
    same(tmp_path / "whole", weights, torch.float32, rtol=1e-6, atol=1e-7)
    assert save_merged(run, tmp_path / "small").dtype == "bfloat16"
    in_fp32 = dict(load_model(str(tmp_path / "whole")).named_parameters())
    same(tmp_path / "small", in_fp32, torch.bfloat16, rtol=0, atol=0)


def test_the_command_says_what_it_did(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["merge", "--model", str(run), "--output", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    shown = capsys.readouterr().out
    assert f"adapters on {7 * tiny_models.LAYERS} layers added to {tmp_path / 'model'} in float32, and " in shown
    assert f"written to {tmp_path / 'merged'} in float32 (as asked for), with the processor of {run}" in shown
    assert load_processor(str(tmp_path / "merged")).chat_template == tiny_models.LLAVA_TEMPLATE
    assert (tmp_path / "merged" / "checksums.json").exists()
    assert cli.main(["merge", "--model", str(run), "--output", str(tmp_path / "merged")]) == 1
    assert f"output: {tmp_path / 'merged'} exists already" in capsys.readouterr().err
    assert cli.main(["merge", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "again")]) == 1
    assert "holds no adapters: there is nothing to merge" in capsys.readouterr().err


def test_the_folder_appears_whole_or_not_at_all(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "merged.unfinished").mkdir()
    (tmp_path / "merged.unfinished" / "model-00001-of-00009.safetensors").write_text("of a run that was killed")

    def full(*_: Any, **__: Any) -> None:
        assert not (tmp_path / "merged").exists()
        raise SafetensorError("I/O error: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", full)
        with pytest.raises(OSError, match="merged could not be written, the disk may be full"):
            save_merged(run, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "run"}
    save_merged(run, tmp_path / "merged")
    assert not (tmp_path / "merged" / "model-00001-of-00009.safetensors").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "run", "merged"}


def test_without_a_processor_of_its_own_the_base_s_is_taken(run: Path, tmp_path: Path) -> None:
    for file in run.iterdir():
        if not file.name.startswith("adapter"):
            file.unlink()
    assert save_merged(run, tmp_path / "merged").processor == str(tmp_path / "model")
    assert load_processor(str(tmp_path / "merged")).chat_template == tiny_models.LLAVA_TEMPLATE


def test_what_cannot_be_added_to_weights_is_refused() -> None:
    model, _ = tiny_models.build("llama")
    prompts = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="PROMPT_TUNING adapter changes no weights"):
        merge_adapters(prompts)
    model, _ = tiny_models.build("llama")
    model.lm_head.weight = model.get_input_embeddings().weight
    tied = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"embed_tokens.weight and .*lm_head.*weight are one weight"):
        merge_adapters(tied)
