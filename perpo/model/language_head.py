"""From a model to what the loss needs: hidden states of response tokens and the language head, never the logits.

`accept_rows` teaches the forward pass of a Hugging Face model three more keywords:

    model(**inputs, response_rows=rows)                  -> hidden states [T, H]
    model(**inputs, response_rows=rows, head_call=f)     -> f(hidden [T, H], head)
    model(…, prefix_layout=layout)                          for a packed row, see `perpo.encoding.packed`

Everything goes through the outermost module (DDP, FSDP, PeftModel, a compiled model), so that gradients are
synchronised and sharded weights gathered as in any forward pass; and `f` runs as the forward pass of the head module
itself, so that whatever watches over its weights (sharding hooks, DDP's search for unused parameters) sees them used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from perpo.encoding.batch import ListBatch
from perpo.prefix.attention import packed_forward
from perpo.prefix.layout import PrefixLayout
from perpo_kernels import linear_perpo_loss, linear_token_log_probs


class LanguageHead(NamedTuple):
    """logits = softcap · tanh(logit_scale · (hidden weightᵀ + bias) / softcap)."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None = None
    logit_scale: float = 1.0


HeadCall = Callable[[Tensor, LanguageHead], Any]  # (hidden [T, H], head) -> anything made of tensors


def causal_lm(model: nn.Module) -> Any:
    """The Hugging Face model (`PreTrainedModel`) with the language head inside DDP, FSDP, torch.compile, PeftModel."""
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner


def accept_rows(model: nn.Module) -> None:
    """Let `model(…)` and whatever wraps it accept `response_rows` and `head_call`. Other calls are left as they are.

    Raises:
        ValueError: a model without a language head or without a separate body.
    """
    core = causal_lm(model)
    if hasattr(core, "_perpo_plain_forward"):
        return
    if core.get_output_embeddings() is None or core.base_model is core:
        raise ValueError(
            f"model: {type(core).__name__} has no language head that get_output_embeddings() finds above a body; load "
            "it with AutoModelForImageTextToText or AutoModelForCausalLM"
        )
    # Bound methods that hold no model themselves: copy.deepcopy then binds them to the copy.
    core._perpo_plain_forward = core.forward
    core.forward = MethodType(_forward_like(core.forward), core)


def response_hidden_states(model: nn.Module, batch: ListBatch) -> Tensor:  # [T, H]
    """Last hidden states at the positions that predict response tokens."""
    accept_rows(model)
    return model(**batch.keywords)


def token_log_probs(model: nn.Module, batch: ListBatch) -> Tensor:  # [T] fp32
    """log π(y_t) of every response token."""
    accept_rows(model)

    def call(hidden: Tensor, head: LanguageHead) -> Tensor:
        weight, bias, softcap, logit_scale = head
        return linear_token_log_probs(hidden, weight, batch.labels, bias, softcap=softcap, logit_scale=logit_scale)

    return model(**batch.keywords, head_call=call)


def sequence_log_probs(model: nn.Module, batch: ListBatch) -> Tensor:  # [S] fp32
    """Σ_t log π(y_t) of every response, detached; by the very operations of the loss, so that a model scored against
    itself has scores of exactly 0."""
    accept_rows(model)

    def call(hidden: Tensor, head: LanguageHead) -> Tensor:
        return perpo_output(hidden, head, plain).log_probs

    plain = replace(batch, ref_log_probs=None, flip_probs=None, pair_weights=None, list_weights=None)
    with torch.no_grad():
        return model(**batch.keywords, head_call=call)


def check_language_head(model: nn.Module) -> None:
    """Compare the head that was found with the model's own logits on four tokens of text.

    Catches any model that does something to its logits that is not known here.

    Raises:
        ValueError: they differ.
    """
    accept_rows(model)
    core = causal_lm(model)
    ids = torch.arange(5, 9, device=next(core.parameters()).device).unsqueeze(0)
    rows = torch.arange(ids.shape[1], device=ids.device)
    was_training = core.training
    core.eval()
    try:
        with torch.no_grad():
            logits = core(input_ids=ids, use_cache=False).logits[0]
            ours = core(input_ids=ids, response_rows=rows, head_call=_plain_logits)
    finally:
        core.train(was_training)
    error = (ours.float() - logits.float()).abs().max()
    allowed = 16 * torch.finfo(logits.dtype).eps * logits.float().abs().max().clamp(min=1)
    if not bool(error <= allowed):
        raise ValueError(
            f"model: {type(core).__name__} maps hidden states to logits in a way that is not known here (its logits "
            f"and those of its language head differ by {error:.2g}); please report the model class"
        )


# ----------------------------------------------------------------------------------------------------------- details


def _forward_like(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`_forward` with the signature of a model's own: `generate` and `Trainer` read off it what a model takes.

    Not functools.wraps: accelerate follows `__wrapped__` when it takes its own wrappers off, and would take this too.
    """
    signature = inspect.signature(plain)
    named = list(signature.parameters.values())
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, *args, **kwargs)

    forward.__signature__ = signature.replace(parameters=[this, *named])  # type: ignore[attr-defined]
    return forward


def _forward(
    self: Any,
    *args: Any,
    response_rows: Tensor | None = None,
    prefix_layout: PrefixLayout | None = None,
    head_call: HeadCall | None = None,
    **kwargs: Any,
) -> Any:
    if response_rows is None:
        return self._perpo_plain_forward(*args, **kwargs)
    given = {name: x for name, x in kwargs.items() if x is not None}  # PeftModel passes every keyword it knows
    if prefix_layout is None:
        states = self.base_model(*args, **given, use_cache=False)[0]  # [B, L, H]
    else:
        with packed_forward(self):
            states = self.base_model(*args, **given, prefix_layout=prefix_layout, use_cache=False)[0]  # [1, T, H]
    hidden = states.reshape(-1, states.shape[-1])[response_rows]
    return hidden if head_call is None else _call_head(self, hidden, head_call)


@torch.compiler.disable  # a compiler does not follow a module whose forward pass is swapped; the loss is fused anyway
def _call_head(core: Any, hidden: Tensor, head_call: HeadCall) -> Any:
    """Run `head_call` as the forward pass of the head module, with the hooks that the module has."""
    outer = core.get_output_embeddings()
    module = _head_module(outer)
    softcap, logit_scale = _logit_map(core)

    def forward(x: Tensor) -> Any:
        x, weight, bias = _linear_map(module, x)
        return head_call(x, LanguageHead(weight, bias, softcap, logit_scale))

    previous = module.__dict__.get("forward")
    module.forward = forward
    try:
        return module(hidden)
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous


def _head_module(module: nn.Module) -> nn.Module:
    """The trained copy if peft keeps one (modules_to_save), or the original while adapters are off."""
    if isinstance(module, ModulesToSaveWrapper):
        if module.disable_adapters or not module.active_adapters:
            return module.original_module
        return module.modules_to_save[module.active_adapters[0]]
    if isinstance(module, AuxiliaryTrainingWrapper):
        raise ValueError(
            f"language head: {type(module).__name__} around it is not supported; train it whole with "
            "modules_to_save=['lm_head'], or leave it frozen"
        )
    return module


def _linear_map(module: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden [T, H'], weight [V, H'], bias [V] of a linear head.

    LoRA adds B A x to W x: the same as the weight [W | B] on the states [x | A x], which keeps lora_dropout exact too.
    """
    if not isinstance(module, BaseTunerLayer):
        return _as_weight_dtype(hidden, module), _weight(module), getattr(module, "bias", None)
    if not isinstance(module, lora.Linear) or module.lora_variant:
        raise ValueError(
            f"language head: an adapter of type {type(module).__name__} on it is not supported; leave the head out of "
            "target_modules, or train it whole with modules_to_save=['lm_head']"
        )
    base = module.get_base_layer()
    weights, states = [_weight(base)], [_as_weight_dtype(hidden, base)]
    adapters = () if module.disable_adapters or module.merged else module.active_adapters
    for name in adapters:
        if name not in module.lora_A:
            continue
        if module.lora_B[name].bias is not None:
            raise ValueError("language head: lora_bias=True on it is not supported; leave lora_bias off")
        down = module.lora_A[name]
        inner = down(module.lora_dropout[name](hidden.to(down.weight.dtype))) * module.scaling[name]
        states.append(inner.to(states[0].dtype))
        weights.append(module.lora_B[name].weight.to(weights[0].dtype))
    if len(weights) == 1:
        return states[0], weights[0], base.bias
    return torch.cat(states, 1), torch.cat(weights, 1), base.bias


def _weight(module: nn.Module) -> Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"language head: expected a linear layer with a floating-point weight [V, H], got {type(module).__name__}; "
            "keep a quantized model's head in 16 bits (llm_int8_skip_modules=['lm_head'])"
        )
    return weight


def _as_weight_dtype(hidden: Tensor, module: nn.Module) -> Tensor:
    if torch.is_autocast_enabled(hidden.device.type):
        return hidden  # the loss casts both
    return hidden.to(_weight(module).dtype)


def _logit_map(core: Any) -> tuple[float | None, float]:
    """Soft-capping (Gemma) and scale (Cohere multiplies by logit_scale, Granite divides by logits_scaling)."""
    config = core.config.get_text_config()
    scale = 1.0
    if getattr(config, "logit_scale", None) is not None:
        scale = float(config.logit_scale)
    elif getattr(config, "logits_scaling", None) is not None:
        factor = float(config.logits_scaling)
        scale = factor if config.model_type.startswith("hyperclovax") else 1 / factor
    return getattr(config, "final_logit_softcapping", None), scale


def _plain_logits(hidden: Tensor, head: LanguageHead) -> Tensor:
    logits = nn.functional.linear(hidden, head.weight, head.bias) * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def perpo_output(hidden: Tensor, head: LanguageHead, batch: ListBatch, **options: Any) -> Any:
    """`linear_perpo_loss` of a batch: loss, log_probs [S] and statistics."""
    return linear_perpo_loss(
        hidden,
        head.weight,
        batch.labels,
        batch.rewards,
        cu_seqlens=batch.cu_seqlens,
        cu_lists=batch.cu_lists,
        ref_log_probs=batch.ref_log_probs,
        pair_weights=batch.pair_weights,
        flip_probs=batch.flip_probs,
        list_weights=batch.list_weights,
        bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        **options,
    )
