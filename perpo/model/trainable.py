"""Which parameters are trained, and in which type: LoRA on the language model, or the model itself without what stays
frozen; trained numbers in fp32, products in 16 bits where the model's weights are."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, logging

from perpo.model.language_head import causal_lm

logger = logging.get_logger(__name__)


def language_lora(
    model: nn.Module, *, r: int = 128, alpha: int = 256, dropout: float = 0.0, train_projector: bool = False
) -> LoraConfig:
    """LoRA on every linear layer of the language model: not on its head, the vision tower or the projector.

    Raises:
        ValueError: a model in which no linear layer of the language model can be told apart.
    """
    decoder = causal_lm(model).get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    head = causal_lm(model).get_output_embeddings()
    kinds = {
        name.rpartition(".")[2]
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    if not kinds:
        raise ValueError(
            f"model: no linear layer found in the language model of {type(model).__name__}; name the layers with "
            "lora_target_modules"
        )
    pattern = rf"{re.escape(prefix)}\.(?:.+\.)?(?:{'|'.join(sorted(kinds))})" if prefix else sorted(kinds)
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=pattern,
        modules_to_save=projector_names(model) if train_projector else None,
        task_type="CAUSAL_LM",
    )


def projector_names(model: nn.Module) -> list[str]:
    """Modules that are neither vision tower, language model nor head: what joins the first two.

    Raises:
        ValueError: there is none (the projector of Qwen-VL is part of its vision tower).
    """
    core = causal_lm(model)
    apart = [core.get_encoder(modality="image"), core.get_decoder(), core.get_output_embeddings()]
    names = [name for name, child in core.base_model.named_children() if all(child is not x for x in apart)]
    names = [name for name in names if any(True for _ in getattr(core.base_model, name).parameters())]
    if not names:
        raise ValueError(
            f"train_projector: {type(core).__name__} has no projector apart from its vision tower; use "
            "train_vision_tower"
        )
    return names


def freeze(model: nn.Module, *, vision_tower: bool = True, projector: bool = True, head: bool = True) -> None:
    """Take gradients off parts of a model that is trained without adapters. Tied embeddings freeze with their head."""
    core = causal_lm(model)
    parts: list[Any] = []
    encoder = core.get_encoder(modality="image")
    if vision_tower and encoder is not core:
        parts.append(encoder)
    if projector and encoder is not core:
        named = dict(core.base_model.named_children())
        with contextlib.suppress(ValueError):  # it is inside the vision tower
            parts += [named[name] for name in projector_names(model)]
    if head:
        parts.append(core.get_output_embeddings())
    for part in parts:
        part.requires_grad_(False)


def keep_in_fp32(model: nn.Module) -> None:
    """What is trained in fp32 (peft does so for adapters), what is frozen as it is.

    A bf16 number has 8 bits: a step of less than 1/512 of a weight is rounded away, and at a learning rate of 5e-6
    nearly all steps are. States stay of the type that the model computes them in: some models (SmolVLM) cannot put
    an image's 16-bit states among a text's of 32.
    """
    embeddings = causal_lm(model).get_input_embeddings()
    of_states = embeddings.weight.dtype
    if of_states != torch.float32 and embeddings.weight.requires_grad:
        embeddings.register_forward_hook(lambda module, args, output: output.to(of_states))
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def set_precision(model: nn.Module, args: TrainingArguments) -> None:
    """A model with 16-bit weights is trained in mixed precision, also if `args` do not ask for it.

    Without it fp32 weights would meet 16-bit activations. DeepSpeed sees to it by itself.

    Raises:
        ValueError: the model's type does not go with this device or without a scaled loss; says what to set.
    """
    types = {parameter.dtype for parameter in model.parameters()}
    if args.mixed_precision != "no" or args.deepspeed_plugin is not None:
        return
    if torch.bfloat16 in types:
        if args.device.type == "cuda" and not is_torch_bf16_gpu_available():
            raise ValueError("model: its weights are bfloat16, which this GPU cannot do; set dtype='float32'")
        args.bf16, args.mixed_precision = True, "bf16"
        logger.info("bf16=True, since the model's weights are bfloat16; dtype='float32' trains in fp32")
    elif torch.float16 in types:
        raise ValueError(
            "model: its weights are float16, whose gradients need a scaled loss; set fp16=True, or load it with "
            "dtype='bfloat16' or 'float32'"
        )
