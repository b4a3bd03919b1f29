"""What a training step costs before it is run: tokens, operations and memory of one list, from a model's config.

Memory is the sum of

    weights       parameters × bytes
    gradients     trained parameters × bytes
    optimizer     trained parameters × 8: AdamW's two moments in fp32
    activations   what is kept for the backward pass: counted on one and two of the model's own layers, of every type,
                  in the mixed precision of the trainer (`perpo.training.activations`), and U [n k R, H] of the loss in
                  fp32
    momentary     what is added at the highest of three points: inside the last layer of the forward pass (counted), the
                  loss (one chunk of logits, and the response states), the backward pass of a layer (counted; with
                  gradient checkpointing also what the layer keeps when it is run again)

and operations (multiply and add count as two) of one list are

    language model   2 T N forward, 2 T N backward, 2 T n for the gradients of n trained of its N linear weights
    attention        4 D pairs forward, 10 D pairs backward, a head and a layer
    head             2 R k V H forward and as much backward
    vision tower     2 N_v a patch, forward; it is frozen

with T = P + k R tokens and P²/2 + k R P + k R²/2 pairs where the prompt is shared, k (P + R) tokens and k (P + R)²/2
pairs where it is not. Gradient checkpointing adds the forward pass of the layers once more. Memory is that of a GPU,
where no attention keeps its scores; but what linear attention keeps is counted as PyTorch computes it, and
flash-linear-attention keeps less. Left out: attention inside the tower, that a sliding window has fewer pairs, and what
linear attention computes beside its linear layers.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig

from perpo.model.language_head import causal_lm
from perpo.model.trainable import freeze, keep_in_fp32, language_lora
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
    """How a model is trained. lora_r 0: the language model itself, with vision tower, projector and head frozen."""

    lora_r: int = 128
    gradient_checkpointing: bool = False
    dtype: torch.dtype = torch.bfloat16
    max_chunk_bytes: int = 1 << 30
    shards: int = 1  # devices that weights, gradients and optimizer are spread over (FSDP, ZeRO-3)


class Planner:
    """The cost of training one model, by its config."""

    def __init__(self, config: PreTrainedConfig, training: Training) -> None:
        self.config, self.training = config, training
        model = _model(config, training)
        core = causal_lm(model)
        text = config.get_text_config()
        head = core.get_output_embeddings()
        language = core.get_decoder()
        self.vision_parameters = _count(core.get_encoder(modality="image")) if text is not config else 0
        self.parameters = _count(model)
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.trained_bytes = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        self.weight_bytes = sum(p.nbytes for p in model.parameters())
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
        activations = passes.kept - states + derivative
        peak = max(passes.forward, passes.held + derivative + logits, passes.backward - states + derivative)
        return {
            "weights": self.weight_bytes / training.shards,
            "gradients": self.trained_bytes / training.shards,
            "optimizer": MOMENTS * self.trained / training.shards,
            "activations": activations,
            "momentary": peak - activations,
        }

    def fitting(self, lists: ListShape, capacity: float) -> int:
        """The most lists in one forward pass that fit into `capacity` bytes; 0: not even one does."""
        fixed = {"weights", "gradients", "optimizer"}
        parts = self.memory(lists)
        rest = capacity - sum(parts[name] for name in fixed)
        each = sum(value for name, value in parts.items() if name not in fixed) / lists.n
        return max(0, int(rest / each))

    def _patches(self, lists: ListShape) -> float:
        """Of an image that takes up the whole prompt."""
        return lists.prompt_tokens * patches_per_token(self.config)

    def _passes(self, lists: ListShape, kinds: list[str]) -> Passes:
        """Of a language model of layers of these kinds."""
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        text.num_hidden_layers = len(kinds)
        if getattr(text, "layer_types", None):
            text.layer_types = kinds
        model = _model(config, self.training)
        if self.training.gradient_checkpointing:
            causal_lm(model).gradient_checkpointing_enable({"use_reentrant": False})
        return count(model, lists.layout, lists.responses, self.training.dtype)


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


def _model(config: PreTrainedConfig, training: Training) -> nn.Module:
    """On the meta device: shapes without memory."""
    with torch.device("meta"):
        try:
            model = AutoModelForImageTextToText.from_config(config, dtype=training.dtype)
        except ValueError:  # no vision-language model
            model = AutoModelForCausalLM.from_config(config, dtype=training.dtype)
        if training.lora_r:
            model = get_peft_model(model, language_lora(model, r=training.lora_r, alpha=2 * training.lora_r))
        else:
            freeze(model)
        keep_in_fp32(model)
        return model


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
