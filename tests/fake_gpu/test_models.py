"""A training step and a reference pass of every verified architecture, with image and shared prompt, on fake CUDA."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from torch import nn

from perpo.encoding.batch import ListBatch
from perpo.model import sharing
from perpo.model.language_head import accept_rows, perpo_output, sequence_log_probs
from perpo.model.trainable import language_lora
from perpo.training.metrics import ListMetrics
from perpo.training.trainer import PerPOTrainer
from tests.fake_gpu.device import fake_gpu, move
from tests.fake_gpu.known import KnowingGpu
from tests.perpo import tiny_models, tiny_runs
from tests.perpo.model.test_sharing import FAMILIES, batches

CHECK = "_local_scalar_dense in import_utils.py: torch_compilable_check"  # image tokens are as many as features

# Where transformers 5.17 waits for the device in a training step with images. Nothing of ours does.
WAITS: dict[str, set[str]] = {
    "llava": {CHECK},
    "llava_onevision": {
        CHECK,
        "_local_scalar_dense in modeling_llava_onevision.py: get_anyres_image_grid_shape",
        "_local_scalar_dense in modeling_llava_onevision.py: get_image_features",
        "_local_scalar_dense in modeling_llava_onevision.py: image_size_to_num_patches",
        "_local_scalar_dense in modeling_llava_onevision.py: unpad_image",
    },
    "llava_next": {
        CHECK,
        "_local_scalar_dense in modeling_llava_next.py: get_anyres_image_grid_shape",
        "_local_scalar_dense in modeling_llava_next.py: image_size_to_num_patches",
        "_local_scalar_dense in modeling_llava_next.py: unpad_image",
    },
    "qwen2_vl": {CHECK},  # what towers compute from sizes of images comes with the batch: perpo/encoding/vision.py
    "qwen2_5_vl": {CHECK},
    "qwen3_vl": {
        CHECK,
        "index by a mask in modeling_qwen3_vl.py: _deepstack_process",
        "index_put_ by a mask in modeling_qwen3_vl.py: _deepstack_process",
        "index by a mask in the backward pass",
        "index_put by a mask in the backward pass",
    },
    "idefics3": {
        "index by a mask in modeling_idefics3.py: forward",
        "index by a mask in modeling_idefics3.py: get_image_features",
        "index_put_ by a mask in modeling_idefics3.py: forward",
    },
    "smolvlm": {
        CHECK,
        "index by a mask in modeling_smolvlm.py: forward",
        "index by a mask in modeling_smolvlm.py: get_image_features",
        "index by a mask in modeling_smolvlm.py: inputs_merger",
        "index by a mask in the backward pass",
        "index_put_ by a mask in modeling_smolvlm.py: forward",
        "index_put_ by a mask in modeling_smolvlm.py: inputs_merger",
    },
    "internvl": {CHECK},
    "mistral3": {
        CHECK,
        "_local_scalar_dense in modeling_mistral3.py: forward",
        "_local_scalar_dense in modeling_mistral3.py: get_image_features",
        "_local_scalar_dense in modeling_pixtral.py: forward",
    },
    "glm4v": {
        CHECK,
        "_local_scalar_dense in modeling_glm4v.py: forward",
        "_local_scalar_dense in modeling_glm4v.py: get_image_features",
        "_local_scalar_dense in vision_utils.py: get_vision_position_ids",
        "repeat_interleave in vision_utils.py: get_vision_cu_seqlens",
    },
    "gemma3": {CHECK},
    "paligemma": {CHECK},
    "lfm2_vl": {
        CHECK,
        "_local_scalar_dense in modeling_lfm2_vl.py: get_image_features",
        "_local_scalar_dense in modeling_siglip2.py: resize_positional_embeddings",
    },
    "qwen3_5": {CHECK},
    "qwen3_5_moe": {CHECK},
}
# Copies that wait, and operators that take an index from the CPU: none but these, of transformers.
COPIES = {"llava_onevision": 1, "llava_next": 1, "glm4v": 1}
# Parts of flash attention that the two layers call, forward. Tokens of an image see each other in Gemma 3, which has a
# window in one layer: heads of 8 are too small there for FlexAttention, so that masks are made.
FLASH = {
    "gemma3": 10,
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "lfm2_vl", *tiny_models.OWN), 3),
}  # one layer carries a state
FLEX = {"mistral", "gemma2", "gemma3_text"}  # windows and soft caps


def on_gpu(family: str) -> tuple[nn.Module, ListBatch]:
    """The model in bf16, to be moved to the GPU, and its batch on the CPU."""
    with patch.object(tiny_models, "HEADS", 2 if family in FLEX else tiny_models.HEADS):  # heads of 16
        model, processor = tiny_models.build(family)
    if family == "gemma2":
        model.set_attn_implementation("eager")
    packed, _ = batches(model, processor, text_only=family in tiny_models.TEXT_FAMILIES)
    packed.rewards = torch.linspace(0, 1, len(packed.rewards))
    packed.inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in packed.inputs.items()}
    sharing.prepare(model, "on", "cuda")
    accept_rows(model)
    return model, packed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_and_a_reference_pass(family: str) -> None:
    model, packed = on_gpu(family)
    with fake_gpu(KnowingGpu()) as gpu:
        move(model, dtype=torch.bfloat16)
        batch = packed.to("cuda", non_blocking=True)
        batch.ref_log_probs = sequence_log_probs(model, batch)
        assert batch.ref_log_probs.device.type == "cuda"
        gpu.clear()
        output = model(**batch.keywords, head_call=lambda hidden, head: perpo_output(hidden, head, batch))
        output.loss.backward()
        ListMetrics().add(batch, output)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.device.type == "cuda" for gradient in gradients)
    assert gpu.kernels()["list_loss_kernel"] == 1
    assert not [wait for wait in gpu.waits if " perpo" in wait]  # a path: ours
    if transformers.__version__.startswith("5.17."):
        assert set(gpu.waits) == WAITS.get(family, set())
        assert len(gpu.blocking) == COPIES.get(family, 0)
        assert not gpu.mixed
    if family in FLEX:
        assert gpu.others["flex_attention"] == gpu.others["flex_attention_backward"] == 2
    else:
        assert gpu.others["_flash_attention_forward"] == FLASH.get(family, 6)
        assert gpu.others["_flash_attention_backward"] == FLASH.get(family, 6)


# ------------------------------------------------------------------------------------------------ the trainer


def trainer_on_gpu(family: str, folder: Path) -> PerPOTrainer:
    """Made on the CPU, where it looks at numbers, then told that its device is a GPU."""
    model, processor = tiny_models.build(family, dtype=torch.bfloat16)
    adapters = language_lora(model, r=4, alpha=8)
    config = tiny_runs.config(folder, reference="adapter_off")
    trainer = PerPOTrainer(model, config, tiny_runs.records(), processor, peft_config=adapters)
    trainer.check_sharing(trainer.model)
    trainer.args.__dict__["_setup_devices"] = torch.device("cuda", 0)
    trainer.compute_loss_context_manager = lambda: torch.autocast("cuda", dtype=torch.bfloat16)
    return trainer


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_the_trainer_with_adapters_that_are_off_in_the_reference(
    family: str, checkpointing: bool, tmp_path: Path
) -> None:
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
