"""From a model to what the loss needs: hidden states of response tokens and the language head, never the logits.

`accept_rows` teaches the forward pass of a Hugging Face model four more keywords:

    model(**inputs, response_rows=rows)                  -> hidden states [T, H]
    model(**inputs, response_rows=rows, head_call=f)     -> f(hidden [T, H], head)
    model(…, prefix_layout=layout)                          for a packed row, see `perpo.encoding.packed`
    model(…, host_inputs=host)                              keywords that stay on the CPU

Everything goes through the outermost module (DDP, FSDP, PeftModel, a compiled model), so that gradients are
synchronised and sharded weights gathered as in any forward pass; and `f` runs as the forward pass of the head module
itself, so that whatever watches over its weights (sharding hooks, DDP's search for unused parameters) sees them used.
`through_head` is such a call, and gives what `f` gave in the dtype in which it gave it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from perpo.encoding.batch import ListBatch
from perpo.encoding.vision import HostInputs
from perpo.prefix.attention import packed_forward
from perpo.prefix.layout import PrefixLayout
from perpo_kernels import linear_perpo_loss, linear_token_log_probs


class LanguageHead(NamedTuple):
    """logits = softcap · tanh(logit_scale · (hidden weightᵀ + bias) / softcap).

    Within the forward pass of the head, where this is made, FSDP2 has put its shards together. What is still a DTensor
    there is split by tensor parallelism, over ranks with the same hidden states.
    """

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None = None
    logit_scale: float = 1.0

    @property
    def group(self) -> DeviceMesh | None:
        """The ranks that share the vocabulary; None where the head is whole."""
        return self.weight.device_mesh if isinstance(self.weight, DTensor) else None


HeadCall = Callable[[Tensor, LanguageHead], Any]  # (hidden [T, H], head) -> anything made of tensors


def causal_lm(model: nn.Module) -> Any:
    """The Hugging Face model (`PreTrainedModel`) with the language head inside DDP, FSDP, torch.compile, PeftModel."""
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner


def accept_rows(model: nn.Module) -> None:
    """Let `model(…)` and whatever wraps it accept `response_rows` and `head_call`. Other calls are left as they are.

    Raises:
        ValueError: a model without a language head or without a separate body, or of which the rows are not those of
            its input.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    core = causal_lm(model)
    if _takes_rows(core.forward):
        return
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "model: nn.DataParallel cuts a batch into pieces, and lists with it; use one process a GPU "
            "(DistributedDataParallel, torchrun), or hide the other GPUs with CUDA_VISIBLE_DEVICES"
        )
    if getattr(getattr(core, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"model: {type(core).__name__} is an encoder with a decoder, and answers are no continuation of its input; "
            "call pk.linear_perpo_loss with the decoder's states"
        )
    head = getattr(core, "get_output_embeddings", None)
    if head is None or head() is None or core.base_model is core:
        raise ValueError(
            f"model: {type(core).__name__} has no language head that get_output_embeddings() finds above a body; load "
            "it with AutoModelForImageTextToText or AutoModelForCausalLM"
        )
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    if isinstance(inner, PeftModel) and inner.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"model: {inner.active_peft_config.peft_type.value} puts rows of its own before those of the input; use "
            "LoRA (perpo.language_lora)"
        )
    # A bound method that holds no model itself: copy.deepcopy then binds it to the copy.
    core.forward = MethodType(_forward_like(core.forward, core), core)
    core._perpo_autocast = None  # see `_own_logits`
    core._perpo_known_heads = set()  # that `check_once` has compared


def through_head(model: nn.Module, call: HeadCall, **keywords: Any) -> Any:
    """`call(hidden [T, H], head)` within the forward pass of `model`, and what it returns.

    Its numbers keep their dtype. FSDP2 with `output_dtype`, which accelerate sets under mixed precision, turns
    everything that a forward pass returns into 16 bits, and a log-prob of −300 would be off by one. Its hooks are on
    the tensors from before that, which are returned here.

    Args:
        keywords: of the model's forward pass, and `response_rows`.
    """
    accept_rows(model)
    kept: list[Any] = []

    def keeping(hidden: Tensor, head: LanguageHead) -> Any:
        kept.append(call(hidden, head))
        return kept[-1]

    output = model(**keywords, head_call=keeping)
    return output if _dtypes(output) == _dtypes(kept[0]) else kept[0]


def response_hidden_states(model: nn.Module, batch: ListBatch) -> Tensor:  # [T, H]
    """Last hidden states at the positions that predict response tokens."""
    accept_rows(model)
    return model(**batch.keywords)


def token_log_probs(model: nn.Module, batch: ListBatch) -> Tensor:  # [T] fp32
    """log π(y_t) of every response token."""

    def call(hidden: Tensor, head: LanguageHead) -> Tensor:
        return head_log_probs(hidden, head, batch.labels)

    return through_head(model, call, **batch.keywords)


def sequence_log_probs(model: nn.Module, batch: ListBatch) -> Tensor:  # [S] fp32
    """Σ_t log π(y_t) of every response, detached; by the very operations of the loss, so that a model scored against
    itself has scores of exactly 0."""

    def call(hidden: Tensor, head: LanguageHead) -> Tensor:
        return perpo_output(hidden, head, plain).log_probs

    plain = replace(batch, ref_log_probs=None, flip_probs=None, pair_weights=None, list_weights=None)
    with torch.no_grad():
        return through_head(model, call, **batch.keywords)


# ----------------------------------------------------------------------------------------------------------- details


def _takes_rows(forward: Any) -> bool:
    """Whether `_forward` is in it, also within what accelerate has put around it."""
    while forward is not None:
        if getattr(forward, "takes_response_rows", False):
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _forward_like(plain: Callable[..., Any], core: Any) -> Callable[..., Any]:
    """`_forward` with the signature of a model's own: `generate` and `Trainer` read off it what a model takes."""
    signature = inspect.signature(plain)
    named = list(signature.parameters.values())
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    unbound = getattr(plain, "__func__", None) or (lambda self, *args, **kwargs: plain(*args, **kwargs))

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, unbound, *args, **kwargs)

    forward.__signature__ = signature.replace(parameters=[this, *named])  # type: ignore[attr-defined]  # on a function
    forward.takes_response_rows = True  # type: ignore[attr-defined]  # on a function
    # accelerate follows __wrapped__ when it takes its own wrappers off. It must not take this off as well, if it is
    # within them; it cannot leave it on if it is around them.
    if "_original_forward" in core.__dict__:
        forward.__wrapped__ = unbound  # type: ignore[attr-defined]  # on a function
    return forward


def _forward(
    self: Any,
    plain: Callable[..., Any],  # the model's own, unbound
    *args: Any,
    response_rows: Tensor | None = None,
    prefix_layout: PrefixLayout | None = None,
    host_inputs: HostInputs | None = None,
    head_call: HeadCall | None = None,
    own_logits: bool = False,
    **kwargs: Any,
) -> Any:
    if response_rows is None:
        return plain(self, *args, **kwargs)
    given = {name: x for name, x in kwargs.items() if x is not None}  # PeftModel passes every keyword it knows
    if host_inputs is not None:
        given |= host_inputs.keywords
    if own_logits:
        return _own_logits(self, partial(plain, self, *args, **given, use_cache=False), response_rows)
    with _autocast_within(self):
        if prefix_layout is None:
            states = self.base_model(*args, **given, use_cache=False)[0]  # [B, L, H]
        else:
            with packed_forward(self):
                states = self.base_model(*args, **given, prefix_layout=prefix_layout, use_cache=False)[0]  # [1, T, H]
        hidden = states.reshape(-1, states.shape[-1])[response_rows]
        return hidden if head_call is None else _call_head(self, hidden, head_call)


def _own_logits(core: Any, run: Callable[[], Any], rows: Tensor) -> Tensor:  # [n, V]
    """Logits at some rows by the model's own forward pass, in which the head is given no other rows.

    Notes whether the model turns autocast on for its forward pass: accelerate writes that around the forward pass of
    the model that it prepares, and `_forward` is outside of it where it was installed later.
    """
    module = _head_module(core.get_output_embeddings())
    plain, device = module.forward, rows.device.type
    outside = torch.is_autocast_enabled(device)

    def forward(x: Tensor) -> Any:
        if torch.is_autocast_enabled(device) and not outside:
            core._perpo_autocast = device, torch.get_autocast_dtype(device)
        return plain(x.reshape(-1, x.shape[-1])[rows].unsqueeze(0))

    with _runs(module, forward):
        logits = run().logits
    return logits.reshape(-1, logits.shape[-1])


def _autocast_within(core: Any) -> contextlib.AbstractContextManager[Any]:
    """What `_own_logits` found."""
    return contextlib.nullcontext() if core._perpo_autocast is None else torch.autocast(*core._perpo_autocast)


@contextlib.contextmanager
def _runs(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the block, `forward` is the forward pass of `module`, with the hooks that it has."""
    previous = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous


@torch.compiler.disable  # a compiler does not follow a module whose forward pass is swapped; the loss is fused anyway
def _call_head(core: Any, hidden: Tensor, head_call: HeadCall) -> Any:
    """Run `head_call` as the forward pass of the head module, with the hooks that the module has."""
    outer = core.get_output_embeddings()
    module = _head_module(outer)
    softcap, logit_scale = _logit_map(core)

    def forward(x: Tensor) -> Any:
        x, weight, bias = _linear_map(module, x)
        return head_call(x, LanguageHead(weight, bias, softcap, logit_scale))

    with _runs(module, forward):
        return outer(hidden)


def _head_module(module: nn.Module) -> nn.Module:
    """The trained copy if peft keeps one (modules_to_save), or the original while adapters are off.

    Its forward pass is replaced, and the wrapper around it called: sharding hooks may be on either.
    """
    module = getattr(module, "_fsdp_wrapped_module", module)
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
    if isinstance(weights[0], DTensor):
        raise ValueError(
            "language head: an adapter on a head that tensor parallelism has split is not supported; leave the head "
            "out of target_modules, or out of the tp_plan"
        )
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


def _dtypes(output: Any) -> list[torch.dtype]:
    return [x.dtype for x in tree_leaves(output) if isinstance(x, Tensor)]


def head_log_probs(hidden: Tensor, head: LanguageHead, labels: Tensor, **options: Any) -> Tensor:  # [T]
    """`linear_token_log_probs` through a head."""
    weight, bias, softcap, logit_scale = head
    options |= {"softcap": softcap, "logit_scale": logit_scale, "group": head.group}
    return linear_token_log_probs(hidden, weight, labels, bias, **options)


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
        group=head.group,
        **options,
    )
