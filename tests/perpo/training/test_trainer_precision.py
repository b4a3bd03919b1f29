"""A checkpoint in 16 bits: what is trained is kept in fp32, so that small steps are not rounded away."""

from pathlib import Path
from typing import Any

import pytest
import torch

from perpo.model.load import load_model
from perpo.model.trainable import freeze
from perpo.training.trainer import PerPOTrainer

from .. import tiny_models, tiny_runs


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def trainer(
    family: str, folder: Path, *, dtype: torch.dtype = torch.bfloat16, lora: Any = None, **options: Any
) -> PerPOTrainer:
    """Of a tiny model in 16 bits; without adapters the language model is trained, and with "head" its head."""
    model, processor = tiny_models.build(family)
    model = model.to(dtype)
    peft_config = None if lora is None else tiny_runs.language_lora(model, r=4, **lora)
    if lora is None:
        freeze(model, head=not options.pop("head", False))
    settings = tiny_runs.config(folder, **{"learning_rate": 5e-6, "max_steps": 4, "reference": "none"} | options)
    return PerPOTrainer(model, settings, tiny_runs.records(), processor, peft_config=peft_config)


def share_changed(runner: PerPOTrainer, part: str) -> float:
    """Of the trained numbers of a part, by training."""
    before = tiny_runs.trained(runner.model)
    runner.train()
    changed = [(p != before[name]).flatten() for name, p in tiny_runs.trained(runner.model).items() if part in name]
    return torch.cat(changed).float().mean().item()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_at_a_small_rate_nearly_all_weights_move(family: str, tmp_path: Path) -> None:
    runner = trainer(family, tmp_path)
    assert share_changed(runner, ".layers.") > 0.95  # in bf16 it is less than one in a hundred
    for parameter in runner.model.parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)


def test_so_does_a_projector_beside_adapters(tmp_path: Path) -> None:
    runner = trainer("llava", tmp_path, lora={"train_projector": True}, reference="adapter_off")
    assert share_changed(runner, "multi_modal_projector.modules_to_save") > 0.95


def test_products_are_in_the_types_of_the_weights(tmp_path: Path) -> None:
    runner = trainer("llava", tmp_path)
    seen = {}
    for name in ("self_attn.q_proj", "mlp"):
        module = runner.model.get_submodule(f"model.language_model.layers.1.{name}")
        module.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output.dtype}))
    runner.train()
    assert runner.args.bf16
    assert set(seen.values()) == {torch.bfloat16}


def test_float16_asks_for_a_scaled_loss(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights are float16, whose gradients need a scaled loss; set fp16=True"):
        trainer("llava", tmp_path, dtype=torch.float16)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"prefix_sharing": "off"}])
def test_the_loss_is_near_that_of_fp32(options: dict[str, Any], head: bool, tmp_path: Path) -> None:
    losses = [
        trainer("llava", tmp_path, dtype=dtype, head=head, learning_rate=1e-3, **options).train().training_loss
        for dtype in (torch.bfloat16, torch.float32)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


def test_a_run_goes_on_from_its_fp32_weights_and_ends_in_a_model_of_the_type_that_it_had(tmp_path: Path) -> None:
    whole = trainer("llava", tmp_path / "whole")
    whole.train()
    save = {"save_strategy": "steps", "save_steps": 2}
    trainer("llava", tmp_path / "broken", max_steps=2, **save).train()
    resumed = trainer("llava", tmp_path / "broken", **save)
    resumed.train(resume_from_checkpoint=True)
    expected = tiny_runs.trained(whole.model)
    for name, value in tiny_runs.trained(resumed.model).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-8, msg=name)
    resumed.save_model(str(tmp_path / "model"))
    assert {p.dtype for p in load_model(str(tmp_path / "model")).parameters()} == {torch.bfloat16}
