"""A step of `PerPOTrainer` as it is on a GPU: bf16, adapters, the reference with adapters off, gradient, optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from perpo.model.trainable import language_lora
from perpo.training.trainer import PerPOTrainer
from tests.fake_gpu.device import fake_gpu, move
from tests.fake_gpu.known import KnowingGpu
from tests.fake_gpu.test_models import CHECK
from tests.perpo import tiny_models, tiny_runs


def trainer_on_gpu(family: str, folder: Path) -> PerPOTrainer:
    """Made on the CPU, where it looks at numbers, then told that its device is a GPU."""
    model, processor = tiny_models.build(family, dtype=torch.bfloat16)
    adapters: LoraConfig = language_lora(model, r=4, alpha=8)
    config = tiny_runs.config(folder, reference="adapter_off")
    trainer = PerPOTrainer(model, config, tiny_runs.records(), processor, peft_config=adapters)
    trainer._check_sharing(trainer.model)
    trainer.args.__dict__["_setup_devices"] = torch.device("cuda", 0)
    trainer.compute_loss_context_manager = lambda: torch.autocast("cuda", dtype=torch.bfloat16)  # type: ignore[method-assign]
    return trainer


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_waits_for_nothing_of_ours(family: str, checkpointing: bool, tmp_path: Path) -> None:
    trainer = trainer_on_gpu(family, tmp_path)
    model: Any = trainer.model
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = trainer.data_collator(trainer.train_dataset[:2])
    with fake_gpu(KnowingGpu()) as gpu:
        move(model)
        loss = trainer.training_step(model, batch, num_items_in_batch=2)
        assert loss.device.type == "cuda"
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.dtype == torch.float32 and p.grad is not None for p in trained)
        torch.optim.AdamW(trained, fused=True).step()
    assert set(gpu.waits) == {CHECK}
    assert not gpu.blocking
    assert not gpu.mixed
    assert len(gpu.launches) == 2 + 2  # log-probs and lists, of the reference and of the step
    assert gpu.others["_flash_attention_forward"] == 2 * 3 * (3 if checkpointing else 2)
