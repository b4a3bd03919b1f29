"""What a forward and backward pass of a language model holds in memory, counted without any.

The model's own layers run on the meta device, where tensors have shapes and no numbers, and every storage is counted
while it lives. Autocast does not know the meta device: `_Autocast` casts what it would cast there, the linear layers.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perpo.model.language_head import causal_lm
from perpo.prefix import attention
from perpo.prefix.layout import PrefixLayout

BLOCK = 512  # bytes; PyTorch's allocator rounds up to a multiple


class LiveStorages:
    """Bytes in storages that are in use, now and at their peak."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        self.now = self.peak = 0
        self._known = [x.untyped_storage() for x in known]  # held, so that no address is used again
        self._sizes = {storage._cdata: 0 for storage in self._known}

    def add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = -(-storage.nbytes() // BLOCK) * BLOCK
            self.now += self._sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class Passes(NamedTuple):
    """Bytes beside weights and their gradients."""

    held: int  # at the end of the forward pass, while autocast keeps the weights that it has cast
    kept: int  # from there to the backward pass
    forward: int  # at the peak of the forward pass
    backward: int  # at the peak of the backward pass

    def of_layers(self, one_more: Sequence[tuple[Passes, int]]) -> Passes:
        """Of more layers, where `self` is of one, and `one_more` of it with one more of a kind, and how many there are.

        What is kept grows, and the highest of the peaks rides on top.
        """
        held = self.held + sum(n * (two.held - self.held) for two, n in one_more)
        kept = self.kept + sum(n * (two.kept - self.kept) for two, n in one_more)
        forward = max(two.forward - two.held for two, _ in one_more)
        return Passes(held, kept, held + forward, kept + max(two.backward - two.kept for two, _ in one_more))


def count(model: nn.Module, layout: PrefixLayout, n_responses: int, dtype: torch.dtype) -> Passes:
    """Of the language model in `model`, which lies on the meta device, up to the states of response tokens; in mixed
    precision if `dtype` has 16 bits.

    Gradients are there already, as in all but the first pass of a step with accumulation. A model of which nothing is
    trained has no backward pass.
    """
    core = causal_lm(model).train()
    attention.register_attention(core)
    decoder = core.get_decoder()
    trained = [p for p in decoder.parameters() if p.requires_grad]
    in_decoder = {id(p) for p in decoder.parameters()}
    embeddings = core.get_input_embeddings().weight
    before = embeddings.requires_grad or any(p.requires_grad and id(p) not in in_decoder for p in model.parameters())
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    live = LiveStorages([*model.parameters(), *model.buffers(), *(p.grad for p in trained if p.grad is not None)])
    autocast = _Autocast(decoder, dtype)
    width = core.get_output_embeddings().weight.shape[1]
    with torch.device("meta"), _Counting(live):
        with attention.packed_forward(core):
            states = decoder(
                inputs_embeds=torch.empty(1, layout.n_tokens, width, dtype=dtype, requires_grad=before),
                position_ids=torch.zeros(1, layout.n_tokens, dtype=torch.int64),
                prefix_layout=layout,
                use_cache=False,
            )[0]
            hidden = states[0, torch.zeros(n_responses, dtype=torch.int64)]
            del states
        held, forward = live.now, live.peak
        if not hidden.requires_grad:
            return Passes(held, held, forward, forward)
        autocast.cached.clear()
        kept = live.peak = live.now
        autocast.caches = False
        with attention.packed_forward(core):  # checkpointing runs layers again
            hidden.backward(torch.empty_like(hidden))
    return Passes(held, kept, forward, live.peak)


class _Counting(TorchDispatchMode):
    def __init__(self, live: LiveStorages) -> None:
        super().__init__()
        self.live = live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.live.add(x)
        return out


class _Autocast:
    """fp32 inputs of a module's linear layers become `dtype`; those that are weights once, as long as `caches`."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.dtype, self.caches = dtype, True
        self.cached: dict[int, Tensor] = {}
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.forward = partial(self._linear, layer)  # type: ignore[method-assign]  # of this object alone

    def _linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        bias = None if layer.bias is None else self._cast(layer.bias)
        return nn.functional.linear(self._cast(x), self._cast(layer.weight), bias)

    def _cast(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or self.dtype == torch.float32:
            return x
        if not (self.caches and x.is_leaf and x.requires_grad):
            return x.to(self.dtype)
        if id(x) not in self.cached:
            self.cached[id(x)] = x.to(self.dtype)
        return self.cached[id(x)]
