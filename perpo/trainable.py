"""Which parameters are trained: LoRA on the language model, or the model itself without what stays frozen."""

from __future__ import annotations

import contextlib
import re
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from perpo.language_head import causal_lm


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


def adapt(model: nn.Module, config: LoraConfig) -> PeftModel:
    """The model with fresh adapters."""
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted
