"""Layers that carry a state from token to token, over a packed row: every answer begins with the state of its prompt.

Linear attention (gated delta rule) and short causal convolutions see a prompt only through the state that it leaves
behind: a matrix per head, the last inputs of a convolution. Of a row [prompts | answers], such a layer runs

    each prompt alone, which leaves its state s          the answers y_1 … y_k as a batch, each continuing from s

which is what it computes for separate rows, but for the order of sums. The prompt is computed once, and its state gets
the gradients of all answers. The answers of a prompt are padded to the longest of them, at the end, where causal layers
do not see it.

Both steps are calls of the layer's own module as transformers calls it, the second with a cache, as in generation that
continues with several tokens. The cache is transformers' own, made differentiable: it keeps tensors instead of copying
into buffers. So gated delta rules, convolutions and their kernels (flash-linear-attention, causal-conv1d) stay those
that the model has.

The layout comes to the module where its mask would: a packed row has none, and every such layer is given one, also in
architectures that hand it no other keywords.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionLayer

from perpo.prefix.layout import PrefixLayout

MODULES = {"linear_attention": "linear_attn", "conv": "conv"}  # type of layer: its module that carries the state
CACHES = ("cache", "cache_params", "past_key_values")  # what forward passes call their cache, newest transformers first


def obstacle(core: Any) -> str | None:
    """What keeps layers that carry a state from taking a packed row, as the rest of a sentence; None if nothing."""
    for kind, layer in _stateful(core):
        module = getattr(layer, MODULES[kind], None)
        if module is None:
            return (
                f"has layers of type {kind}, which carry a state from token to token, and {type(layer).__name__} has "
                f"no module {MODULES[kind]!r} that could be given one"
            )
        taken = inspect.signature(module.forward).parameters
        if not {"hidden_states", "attention_mask"} <= taken.keys() or _cache_name(module) is None:
            return (
                f"has layers of type {kind}, which carry a state from token to token, and "
                f"{type(module).__name__}.forward takes {', '.join(taken)}; expected hidden_states, attention_mask and "
                f"one of {', '.join(CACHES)}"
            )
        if not isinstance(getattr(module, "layer_idx", None), int):
            return (
                f"has layers of type {kind}, and {type(module).__name__} does not say its place in a cache (layer_idx)"
            )
    return None


def register_states(core: Any) -> None:
    """Let the layers of a Hugging Face model (`PreTrainedModel`) that carry a state take `prefix_layout`."""
    for kind, layer in _stateful(core):
        module = getattr(layer, MODULES[kind])
        if getattr(module.forward, "takes_layout", False):
            continue
        layer.register_forward_pre_hook(_layout_as_mask, with_kwargs=True)
        # A bound method that holds no module itself: copy.deepcopy then binds it to the copy.
        module.forward = MethodType(_forward_like(module.forward, _cache_name(module)), module)


def _stateful(core: Any) -> list[tuple[str, nn.Module]]:
    kinds = getattr(core.config.get_text_config(), "layer_types", None) or ()
    if not set(kinds) & MODULES.keys():
        return []
    return [(kind, layer) for kind, layer in zip(kinds, core.get_decoder().layers, strict=False) if kind in MODULES]


def _cache_name(module: nn.Module) -> str | None:
    taken = inspect.signature(module.forward).parameters
    return next((name for name in CACHES if name in taken), None)


def _layout_as_mask(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    layout = kwargs.get("prefix_layout")
    return None if layout is None else (args, {**kwargs, "attention_mask": layout})


def _forward_like(plain: Callable[..., Any], cache_name: Any) -> Callable[..., Any]:
    unbound = getattr(plain, "__func__", None) or (lambda self, *args, **kwargs: plain(*args, **kwargs))

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        layout = kwargs.get("attention_mask")
        if not isinstance(layout, PrefixLayout):
            return unbound(self, *args, **kwargs)

        def run(x: Tensor, states: States) -> Tensor:
            cache = Cache(layers=[states] * (self.layer_idx + 1))
            return unbound(self, hidden_states=x, **{cache_name: cache})

        return _over_row(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], layout, run)

    forward.__signature__ = inspect.signature(unbound)  # type: ignore[attr-defined]  # on a function
    forward.takes_layout = True  # type: ignore[attr-defined]  # on a function
    return forward


class States(LinearAttentionLayer):
    """The state that a layer leaves behind, with its gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.activate_past_recording()  # inputs of a convolution are kept, not copied; and one token runs as many do

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states

    def fork(self, n: int) -> None:
        """For n continuations."""
        self.crop(0)  # to the inputs that a convolution still sees
        for states in (self.conv_states, self.recurrent_states):
            states.update({i: x.expand(n, *x.shape[1:]) for i, x in states.items() if x is not None})


def _over_row(
    hidden: Tensor,  # [1, T, H]
    layout: PrefixLayout,
    run: Callable[[Tensor, States], Tensor],  # [n, L, H] and what came before it -> [n, L, H]
) -> Tensor:  # [1, T, H]
    if hidden.shape[:2] != (1, layout.n_tokens):
        raise ValueError(
            f"prefix_layout: made for one row of {layout.n_tokens} tokens, got hidden states {tuple(hidden.shape)} "
            "[rows, tokens, H]"
        )
    prompts, answers = [], []
    for (start, end), (tokens, places) in zip(layout.prompts, layout.batches(hidden.device), strict=True):
        states = States()
        prompts.append(run(hidden[:, start:end], states))
        if tokens.numel():
            states.fork(len(tokens))
            out = run(hidden[0].index_select(0, tokens.flatten()).unflatten(0, tokens.shape), states)
            answers.append(out.flatten(0, 1).index_select(0, places).unsqueeze(0))
    return torch.cat((*prompts, *answers), 1)
