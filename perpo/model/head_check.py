"""The language head as `language_head` takes it apart, compared once with the model's own logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from perpo.model.language_head import LanguageHead, accept_rows, causal_lm, through_head


def check_language_head(model: nn.Module, inputs: Mapping[str, Any] | None = None, rows: Tensor | None = None) -> None:
    """Compare what is done here with the model's own logits, at some positions of a batch or on four tokens of text.

    Catches any model that does something to its hidden states or logits that is not known here; on a batch with
    pictures, also one whose body does not take them. Everything goes through the outermost module, so that all ranks
    of a sharded model take part. Nothing is compiled for it.

    Args:
        inputs: keywords of the forward pass. rows: positions [n] in its flattened [B · L]; a few are enough.

    Raises:
        ValueError: they differ.
    """
    accept_rows(model)
    core = causal_lm(model)
    if inputs is None or rows is None:
        ids = torch.arange(5, 9, device=next(core.parameters()).device).unsqueeze(0)
        inputs, rows = {"input_ids": ids}, torch.arange(ids.shape[1], device=ids.device)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            logits = model(**inputs, response_rows=rows, head_call=None, own_logits=True)
            ours = through_head(model, _plain_logits, **inputs, response_rows=rows)
    finally:
        for module, mode in training.items():
            module.training = mode
    error = (ours.float() - logits.float()).abs().max()
    allowed = 16 * _rounding(logits) * logits.float().abs().max().clamp(min=1)
    if not bool(error <= allowed):
        raise ValueError(
            f"model: {type(core).__name__} maps hidden states to logits in a way that is not known here (its logits "
            f"and those of its language head differ by {error:.2g}); please report the model class, and meanwhile take "
            "its logits: pk.token_log_probs and pk.perpo_loss"
        )


@torch.compiler.disable  # within a compiled training step
def check_once(model: nn.Module, inputs: Mapping[str, Any], rows: Tensor) -> None:
    """`check_language_head` on the first batch that a model is given, and on the first with its adapters off."""
    accept_rows(model)
    core = causal_lm(model)
    head = core.get_output_embeddings()
    state = type(head), getattr(head, "disable_adapters", None), tuple(getattr(head, "active_adapters", ()))
    if state not in core._perpo_known_heads:
        check_language_head(model, inputs, rows[:4])
        core._perpo_known_heads.add(state)


def _plain_logits(hidden: Tensor, head: LanguageHead) -> Tensor:
    if head.group is not None:
        hidden = DTensor.from_local(hidden, head.group, [Replicate()])
    logits = nn.functional.linear(hidden, head.weight, head.bias) * head.logit_scale
    if isinstance(logits, DTensor):
        logits = logits.full_tensor()
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _rounding(x: Tensor) -> float:
    """Of products in the dtype of x; TF32 has ten bits."""
    is_tf32 = x.dtype == torch.float32 and x.is_cuda and torch.get_float32_matmul_precision() != "highest"
    return 2.0**-10 if is_tf32 else torch.finfo(x.dtype).eps
