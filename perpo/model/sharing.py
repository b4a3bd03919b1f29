"""Whether a model is fed one row for all candidates of a list, and the proof on its own weights that it may be.

What is shared is image and prompt (`perpo.encoding.packed`), through attention that knows who sees whom
(`perpo.prefix.attention`). An architecture whose tokens interact outside attention would give wrong numbers. So
only architectures that the tests find exact are shared by default, others only on request, and in both cases lists of
the data are compared with a row for each candidate before anything is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from perpo.encoding.batch import ListBatch
from perpo.encoding.positions import PromptPositions
from perpo.model.language_head import causal_lm, token_log_probs
from perpo.prefix import attention, flash_impl, flex_attention, states

logger = logging.get_logger(__name__)

SHARING = ("auto", "on", "off")

# config.model_type of the architectures that tests/perpo/model/test_sharing.py finds exact, …
VERIFIED = (
    "gemma2",
    "gemma3",
    "gemma3_text",
    "glm4v",
    "idefics3",
    "internvl",
    "lfm2",
    "lfm2_vl",
    "llama",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral",
    "mistral3",
    "paligemma",
    "qwen2",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_text",
    "qwen3_next",
    "qwen3_vl",
    "smolvlm",
)
# … and of the language models inside them: many of them can hold any.
VERIFIED_TEXT = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4v_text",
    "lfm2",
    "llama",
    "mistral",
    "qwen2",
    "qwen2_5_vl_text",
    "qwen2_vl_text",
    "qwen3",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
    "qwen3_vl_text",
)

# Types of layers that see other tokens than attention does, in ways that `perpo.prefix.states` does not know.
_STATEFUL = {"hybrid", "hybrid_sliding"}
_TOKEN_BY_TOKEN = {"moe", "mlp", "sparse", "dense"}

# Allowed rms difference of token log-probs. Rounding stays below it; a wrong position or mask gives 1 and more.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.15, torch.float16: 0.05}


class SharingNotExact(ValueError):
    """Shared and separate rows give different log-probs."""


def prepare(model: nn.Module, setting: str, device: torch.device | str | None = None) -> PromptPositions | None:
    """Install shared attention if the setting and the architecture say so: what the collator needs, or None.

    Args:
        setting: "auto": architectures known to be exact and not slower for it; "on": any without a known obstacle;
            "off".
        device: that the model will run on; None: the one that it is on.

    Raises:
        ValueError: "on" for an architecture that cannot be shared, with the reason.
    """
    core = causal_lm(model)
    if setting == "off":
        return None
    reason = obstacle(core)
    if reason is not None and setting == "on":
        raise ValueError(f"prefix_sharing='on': {type(core).__name__} {reason}; use prefix_sharing='off'")
    if reason is None and setting == "auto":
        reason = _unverified(core) or _no_gain(core, torch.device(device or core.device))
    if reason is not None:
        logger.warning(
            f"prefix_sharing: {type(core).__name__} {reason}. Image and prompt are encoded once for every candidate "
            "instead of once a list: with prompts of P tokens and k answers of R, k(P + R) tokens instead of P + kR"
        )
        return None
    attention.register_attention(core)
    return PromptPositions(core)


def obstacle(core: Any) -> str | None:
    """What keeps an architecture from sharing prompts, as the rest of a sentence; None if nothing is known to."""
    text = core.config.get_text_config()
    known = {"full_attention", "sliding_attention", *states.MODULES, *_TOKEN_BY_TOKEN}
    kinds = set(getattr(text, "layer_types", None) or ()) - known
    if stateful := sorted(kinds & _STATEFUL):
        return f"has layers of type {', '.join(stateful)}, which carry a state from token to token"
    if kinds:
        return f"has layers of type {', '.join(sorted(kinds))}, which attention over shared prompts does not know"
    if getattr(text, "attention_dropout", 0.0):
        return f"has attention_dropout={text.attention_dropout}, which attention over shared prompts does not know"
    if core.config.is_encoder_decoder:
        return "is an encoder–decoder"
    if reason := states.obstacle(core):
        return reason
    # Some, Qwen3.5 among them, do not say so, and transformers finds it in their source.
    if not (getattr(core, "_supports_attention_backend", False) or core.get_decoder()._can_set_attn_implementation()):
        return "does not let its attention be replaced"
    if any(name.endswith(".sinks") for name, _ in core.named_parameters()):
        return "has attention sinks, which attention over shared prompts does not know"
    chosen = text._attn_implementation
    if _softcap(core) and chosen not in ("eager", attention.OVER_EAGER):
        return (
            f"soft-caps its attention logits (attn_logit_softcapping), which attn_implementation={chosen!r} leaves "
            "out; load it with attn_implementation='eager'"
        )
    return None


def _unverified(core: Any) -> str | None:
    kind, text = core.config.model_type, core.config.get_text_config().model_type
    advice = "; prefix_sharing='on' tries it and checks"
    if kind not in VERIFIED:
        return f"is not among the architectures that sharing was verified on{advice}"
    if text not in VERIFIED_TEXT:
        return f"holds a language model of type {text!r}, which sharing was not verified on{advice}"
    return None


def _no_gain(core: Any, device: torch.device) -> str | None:
    if _softcap(core) and not flex_attention.available(device):
        return (
            f"soft-caps its attention logits, for which {device.type!r} has no FlexAttention: all logits of a list "
            "would be kept, which can cost more than sharing saves; prefix_sharing='on' shares nevertheless"
        )
    return None


def _softcap(core: Any) -> float | None:
    return getattr(core.config.get_text_config(), "attn_logit_softcapping", None)


def check_exact(model: nn.Module, packed: ListBatch, separate: ListBatch) -> None:
    """Compare the token log-probs of the same lists in one packed row and in a row for each candidate.

    Every rank has to call it, with batches on its device. Without gradients, in evaluation mode. Separate rows run on
    PyTorch's own flash attention; if another is active (`perpo.prefix.flash_impl`), it is compared too.

    Raises:
        SharingNotExact: they differ by more than rounding.
        ValueError: the flash attention that is active gives other numbers than PyTorch's own.
    """
    core = causal_lm(model)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            with flash_impl.own_kernels():
                expected = token_log_probs(model, separate)
            with _compared(core):
                ours = token_log_probs(model, packed)
    finally:
        model.train(was_training)
    error = _rms(ours - expected)
    allowed = TOLERANCE[_coarsest(core.dtype, ours.device)]
    if not error <= allowed:
        raise SharingNotExact(
            f"prefix_sharing: {type(core).__name__} gives other log-probs when image and prompt are shared between "
            f"candidates (rms difference {error:.2g}, allowed {allowed:g}); use prefix_sharing='off' and please report "
            "the model class"
        )


@contextmanager
def _compared(core: Any) -> Iterator[None]:
    """Inside, attention over shared prompts compares the flash attention that is active, if any, with PyTorch's own."""
    name = flash_impl.active()
    if name is None:
        yield
        return
    comparison = flash_impl.Comparison()
    with attention.flash_calls(comparison):
        yield
    if not comparison.seen:
        logger.warning(
            f"{name} is the active flash attention, but {type(core).__name__} takes none in its attention over shared "
            "prompts (docs/shared_prefix.md says what does)"
        )


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def _coarsest(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type that products are computed in."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype
