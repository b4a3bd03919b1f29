"""Adapters that a model comes with: the folder that `perpo train` wrote holds them and names their base model.

They are trained further as they are, or merged into the base. Merging is done in fp32: a bf16 weight has 8 significant
bits, and much of what an adapter adds is smaller than the last of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.utils import logging
from transformers.utils.peft_utils import find_adapter_config_file

logger = logging.get_logger(__name__)


def base_of(name_or_path: str, revision: str | None = None) -> tuple[str, str | None] | None:
    """The base model of a folder or hub name that holds adapters, and its revision; None where there are none.

    Raises:
        ValueError: the adapters do not say which model they are for.
    """
    file = find_adapter_config_file(name_or_path, revision=revision)
    if file is None:
        return None
    config = json.loads(Path(file).read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"model: the adapters in {name_or_path} do not say which model they are for; write it into "
            "adapter_config.json as base_model_name_or_path"
        )
    return str(base), config.get("revision")


def has_trained_adapters(model: nn.Module) -> bool:
    """Whether it has adapters that an earlier run has trained; new ones change nothing yet: one factor of each is 0."""
    return any(bool(p.detach().any()) for name, p in model.named_parameters() if "lora_B" in name)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Layers with an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def merge_adapters(model: PeftModel, dtype: torch.dtype | str | None = None) -> nn.Module:
    """The base model with its adapters added to its weights, in fp32.

    Args:
        dtype: that the result is rounded to, with a warning of how much of the adapters' effect that costs. None,
            "auto" and "float32": fp32.

    Raises:
        ValueError: an adapter is on a weight that another module shares (a language head tied to the embeddings),
            which would change with it; adapters that change no weights.
    """
    _check_mergeable(model)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    model = model.float()
    rounded = isinstance(wanted, torch.dtype) and wanted != torch.float32
    lost = _rounding(model, wanted) if rounded else 0.0
    merged: Any = model.merge_and_unload().requires_grad_(True)  # as it was before there were adapters
    if rounded:
        merged = merged.to(wanted)
        logger.warning(
            f"the merged weights are rounded to {str(wanted).removeprefix('torch.')}, an error of {lost:.2g} times "
            "what the adapters add to them (rms); float32 keeps them"
        )
    merged.config.dtype = next(merged.parameters()).dtype
    return merged


def _check_mergeable(model: PeftModel) -> None:
    config: Any = model.active_peft_config
    if config.is_prompt_learning:
        raise ValueError(f"model: a {config.peft_type.value} adapter changes no weights, so it cannot be merged")
    sharing: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        sharing.setdefault(id(parameter), []).append(name)
    for layer in adapted_layers(model).values():
        names = sharing.get(id(getattr(layer.get_base_layer(), "weight", None)), [])
        if len(names) > 1:
            raise ValueError(
                f"model: {' and '.join(names)} are one weight, and the adapter is on one of them alone; merged, it "
                "would change both. Use the adapter as it is, or train one without that layer"
            )


def _rounding(model: nn.Module, dtype: Any) -> float:
    """‖round(W + Δ) − (W + Δ)‖ / ‖Δ‖ over all weights W with an adapter's Δ."""
    error = added = 0.0
    with torch.no_grad():
        for weight, delta in _deltas(model):
            whole = weight + delta
            error += (whole.to(dtype).to(whole.dtype) - whole).double().square().sum().item()
            added += delta.double().square().sum().item()
    return (error / added) ** 0.5 if added else 0.0


def _deltas(model: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for layer in adapted_layers(model).values():
        if isinstance(layer, lora.Linear) and not layer.merged:
            weight: Any = layer.get_base_layer().weight
            yield weight, sum(layer.get_delta_weight(name) for name in layer.active_adapters if name in layer.lora_A)
