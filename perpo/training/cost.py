"""What a training step costs before it is run: tokens, operations and memory of one list, from a model's config.

Memory is the sum of

    weights       parameters × bytes
    gradients     trained parameters × bytes
    optimizer     trained parameters × 8: AdamW's two moments in fp32
    reference     parameters × bytes of a second model that is run at every step
    gathered      of weights spread over devices: those of two layers (one runs, one comes) and all outside of layers
    activations   what is kept for the backward pass: counted on one and two of the model's own layers, of every type,
                  in the mixed precision of the trainer (`perpo.training.activations`), and U [n k R, H] of the loss in
                  fp32
    momentary     what is added at the highest of three points: inside the last layer of the forward pass (counted), the
                  loss (one chunk of logits, and the response states), the backward pass of a layer (counted; with
                  gradient checkpointing also what the layer keeps when it is run again)

Several reference models are run once, before there are gradients, moments and activations. Then there are the weights
of the model, those of one reference, and what a pass of one list holds without gradients.

Operations (multiply and add count as two) of one list, without those of a reference, are

    language model   2 T N forward, 2 T N backward, 2 T n for the gradients of n trained of its N linear weights
    attention        4 D pairs forward, 10 D pairs backward, a head and a layer
    head             2 R k V H forward and as much backward
    vision tower     2 N_v a patch, forward; it is frozen

with T = P + k R tokens and P²/2 + k R P + k R²/2 pairs where the prompt is shared, k (P + R) tokens and k (P + R)²/2
pairs where it is not. Gradient checkpointing adds the forward pass of the layers once more. Memory is that of a GPU,
where no attention keeps its scores; but what linear attention keeps is counted as PyTorch computes it, and
flash-linear-attention keeps less. A degree head of D levels (`perpo.training.degree`) has D (H + 1) parameters, keeps
the means [n k, H] in fp32 and adds the response states [n k R, H] in fp32, twice, for a moment. Left out: attention
inside the tower, what a trained projector keeps, that a sliding window has fewer pairs, and what linear attention
computes beside its linear layers.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from perpo.model.language_head import causal_lm
from perpo.model.trainable import TrainableConfig, keep_in_fp32, projectors
from perpo.prefix.layout import PrefixLayout, prefix_layout
from perpo.prefix.states import MODULES
from perpo.training.activations import Passes, count

MOMENTS = 8  # bytes a trained parameter


@dataclass(frozen=True)
class ListShape:
    """What a forward pass is fed: `n` lists of `k` answers of R tokens to a prompt of P tokens, image included."""

    prompt_tokens: int
    response_tokens: int
    k: int
    n: int = 1
    shared: bool = True

    @property
    def layout(self) -> PrefixLayout:
        rows = 1 if self.shared else self.k
        answers = [self.response_tokens] * (self.k // rows)
        return prefix_layout([self.prompt_tokens] * (self.n * rows), [answers] * (self.n * rows))

    @property
    def responses(self) -> int:
        """Response tokens."""
        return self.n * self.k * self.response_tokens

    @property
    def pairs(self) -> float:
        """Of a query and a key that it sees."""
        p, r = self.prompt_tokens, self.response_tokens
        if self.shared:
            return self.n * (p * p / 2 + self.k * (r * p + r * r / 2))
        return self.n * self.k * (p + r) ** 2 / 2


@dataclass(frozen=True)
class Training:
    """How a model is trained."""

    trainable: TrainableConfig = field(default_factory=TrainableConfig)
    gradient_checkpointing: bool = False
    dtype: torch.dtype = torch.bfloat16
    max_chunk_bytes: int = 1 << 30
    shards: int = 1  # devices that weights, gradients and optimizer are spread over (FSDP, ZeRO-3)
    degree_levels: int = 0  # of a degree head; 0: there is none
    references: Sequence[PreTrainedConfig] = ()  # of models beside the trained one


class Planner:
    """The cost of training one model, by its config.

    Raises:
        ValueError: what is trained lies in the vision tower or the head, whose activations are not counted.
    """

    def __init__(self, config: PreTrainedConfig, training: Training) -> None:
        self.config, self.training = config, training
        self._counted: dict[tuple[ListShape | str, ...], Passes] = {}
        model = _trained_model(config, training)
        core = causal_lm(model)
        text = config.get_text_config()
        head = core.get_output_embeddings()
        _check_counted(core)
        language = core.get_decoder()
        self.vision_parameters = _count(core.get_encoder(modality="image")) if text is not config else 0
        self.parameters = _count(model)
        degrees = training.degree_levels * (text.hidden_size + 1)
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad) + degrees
        self.trained_bytes = sum(p.nbytes for p in model.parameters() if p.requires_grad) + 4 * degrees
        self.weight_bytes = _bytes(model) + 4 * degrees
        self.gathered_bytes = _gathered(core) * training.dtype.itemsize
        self.reference_bytes = [_bytes(_model(one, training.dtype)) for one in training.references]
        linear = [module for module in language.modules() if isinstance(module, nn.Linear) and module is not head]
        self.linear_parameters = sum(module.weight.numel() for module in linear)
        self.linear_trained = sum(module.weight.numel() for module in linear if module.weight.requires_grad)
        self.vocabulary, self.hidden = head.weight.shape
        self.kinds = list(getattr(text, "layer_types", None) or [""] * text.num_hidden_layers)
        self.attention_layers = sum(kind not in MODULES for kind in self.kinds)
        self.heads = text.num_attention_heads
        self.head_dim = getattr(text, "head_dim", None) or text.hidden_size // self.heads

    def operations(self, lists: ListShape) -> float:
        """Floating-point operations of one forward and backward pass."""
        tokens = lists.layout.n_tokens
        forward = 2 * tokens * self.linear_parameters
        attention_forward = 4 * self.attention_layers * self.heads * self.head_dim * lists.pairs
        total = 2 * forward + 2 * tokens * self.linear_trained + 3.5 * attention_forward
        if self.training.gradient_checkpointing:
            total += forward + attention_forward
        total += 4 * lists.responses * self.vocabulary * self.hidden
        images = lists.n * (1 if lists.shared else lists.k)
        return total + 2 * images * self._patches(lists) * self.vision_parameters

    def memory(self, lists: ListShape) -> dict[str, float]:
        """Bytes on each device, by what they are for."""
        training = self.training
        first = min(
            self.kinds, key=lambda kind: kind in MODULES
        )  # with attention, whose rotary tables all layers share
        more = [(self._passes(lists, [first, kind]), n - (kind == first)) for kind, n in Counter(self.kinds).items()]
        passes = self._passes(lists, [first]).of_layers(more)
        size, responses = training.dtype.itemsize, lists.responses
        states = responses * self.hidden * size  # let go when the loss is there
        derivative = 4 * responses * self.hidden  # of log-probs by states
        logits = min(training.max_chunk_bytes, responses * self.vocabulary * size)
        means = of_degrees = 0
        if training.degree_levels:  # after the loss of the list, which has let go of its logits
            means = 4 * lists.n * lists.k * self.hidden
            of_degrees = 2 * derivative + 2 * means
        activations = passes.kept - states + derivative + means
        peak = max(
            passes.forward, passes.held + derivative + max(logits, of_degrees), passes.backward - states + derivative
        )
        parts = {
            "weights": self.weight_bytes / training.shards,
            "gradients": self.trained_bytes / training.shards,
            "optimizer": MOMENTS * self.trained / training.shards,
            "activations": activations,
            "momentary": max(0, peak - activations),
        }
        if training.shards > 1:
            parts["gathered"] = self.gathered_bytes
        if len(self.reference_bytes) == 1:
            parts["reference"] = self.reference_bytes[0]  # whole on each device
        return parts

    def before_training(self, lists: ListShape) -> float:
        """Bytes on each device while several reference models are run, one after another; 0 without them."""
        if len(self.reference_bytes) < 2:
            return 0
        lists, training = dataclasses.replace(lists, n=1), self.training
        states = lists.responses * self.hidden * training.dtype.itemsize
        logits = min(training.max_chunk_bytes, lists.responses * self.vocabulary * training.dtype.itemsize)
        model = _model(self._shorter(self.kinds[:1]), training.dtype).requires_grad_(False)
        momentary = max(count(model, lists.layout, lists.responses, training.dtype).forward, states + logits)
        return self.weight_bytes + max(self.reference_bytes) + momentary

    def fitting(self, lists: ListShape, capacity: float) -> int:
        """The most lists in one forward pass that fit into `capacity` bytes; 0: not even one does."""
        if self.before_training(lists) > capacity:
            return 0
        fixed = {"weights", "gradients", "optimizer", "gathered", "reference"}
        parts = self.memory(lists)
        rest = capacity - sum(value for name, value in parts.items() if name in fixed)
        each = sum(value for name, value in parts.items() if name not in fixed) / lists.n
        return max(0, int(rest / each))

    def _patches(self, lists: ListShape) -> float:
        """Of an image that takes up the whole prompt."""
        return lists.prompt_tokens * patches_per_token(self.config)

    def _passes(self, lists: ListShape, kinds: list[str]) -> Passes:
        """Of a language model of layers of these kinds."""
        if (lists, *kinds) not in self._counted:
            model = _trained_model(self._shorter(kinds), self.training)
            if self.training.gradient_checkpointing:
                causal_lm(model).gradient_checkpointing_enable({"use_reentrant": False})
            self._counted[lists, *kinds] = count(model, lists.layout, lists.responses, self.training.dtype)
        return self._counted[lists, *kinds]

    def _shorter(self, kinds: list[str]) -> PreTrainedConfig:
        """The config of a model with layers of these kinds, and one in its vision tower, which is not run."""
        config = copy.deepcopy(self.config)
        text, vision = config.get_text_config(), getattr(config, "vision_config", None)
        for name in ("num_hidden_layers", "depth"):
            if hasattr(vision, name):
                setattr(vision, name, 1)
        text.num_hidden_layers = len(kinds)
        if getattr(text, "layer_types", None):
            text.layer_types = kinds
        return config


def patches_per_token(config: PreTrainedConfig) -> float:
    """Patches of an image that become one token of the language model; each family has its own name for this."""
    vision = getattr(config, "vision_config", None)
    for owner, name in ((vision, "spatial_merge_size"), (config, "spatial_merge_size"), (config, "scale_factor")):
        if isinstance(merged := getattr(owner, name, None), int):  # of a square
            return merged**2
    if ratio := getattr(config, "downsample_ratio", None):
        return ratio**-2
    if tokens := getattr(config, "mm_tokens_per_image", None):
        assert vision is not None
        return (vision.image_size // vision.patch_size) ** 2 / tokens
    return 1.0


def _model(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """On the meta device: shapes without memory."""
    with torch.device("meta"):
        try:
            return AutoModelForImageTextToText.from_config(config, dtype=dtype)
        except ValueError:  # no vision-language model
            return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _trained_model(config: PreTrainedConfig, training: Training) -> nn.Module:
    model = _model(config, training.dtype)
    with torch.device("meta"):
        prepared = training.trainable.apply(model)
        if prepared.peft_config is not None:
            model = get_peft_model(model, prepared.peft_config)
        keep_in_fp32(model)
    return model


def _gathered(core: Any) -> int:
    """Parameters that are whole on a device at once where accelerate and FSDP2 spread a model: those of two of its
    blocks, and those outside of all blocks."""
    names = set(core._no_split_modules or ())
    blocks = [module for module in core.modules() if type(module).__name__ in names]
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = sum(p.numel() for p in core.parameters() if id(p) not in inside)
    return outside + 2 * max(map(_count, blocks), default=0)


def _check_counted(core: Any) -> None:
    tower, head = core.get_encoder(modality="image"), core.get_output_embeddings()
    joins = {id(p) for module in projectors(core) for p in module.parameters()}
    for name, module in (("vision tower", tower), ("language head", head)):
        if module is not core and any(p.requires_grad and id(p) not in joins for p in module.parameters()):
            raise ValueError(f"a trained {name} has activations that are not counted here; plan without it")


def _bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
