"""Vision-language models of two shapes, random weights, and prompts for them, made in code.

    model, prompt = small_models.build("llava", "cpu", n_prompt=576)

LLaVA: a fixed square picture, CLIP's tower, a projector, Llama. Qwen2.5-VL: patches of a picture of any size, a
windowed tower, three positions a token. Pictures are as large as the prompt has room for, and real input: pixels
through the tower. Only the layers of the language model are trained; tower, projector, embeddings and head are frozen.

On the CPU the language model has half a million parameters in 2 layers, on a GPU 0.8 billion in 16.
"""

from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from benchmarks.problems import Prefix, Setting
from perpo.model.trainable import freeze

WORDS = 12  # the least number of text tokens in a prompt
IMAGE, VIDEO, VISION_START, VISION_END, FIRST_WORD = 1, 2, 3, 4, 8  # token ids


class Shape(NamedTuple):
    n_vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    tower_hidden: int
    tower_layers: int
    patch: int

    @property
    def parameters(self) -> int:
        """Of the layers of the language model."""
        attention = self.hidden * self.hidden * (2 + 2 * self.key_heads // self.heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)


SHAPES = {
    "tiny": Shape(64, 32, 48, 2, 4, 2, 16, 2, 2),
    "cpu": Shape(4096, 128, 344, 2, 4, 2, 64, 2, 14),
    "gpu": Shape(32000, 2048, 5632, 16, 16, 4, 1024, 12, 14),
}
FAMILIES = ("llava", "qwen2_5_vl")


def measured(family: str, setting: Setting, prefix: Prefix) -> bool:
    """Grounding and the page are enough for the second family."""
    return family == FAMILIES[0] or len(setting.prefixes) <= 2 or prefix in setting.prefixes[::2]


def build(
    family: str, size: str, n_prompt: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, dict[str, Tensor]]:
    """(model in train mode, encoded prompt of `n_prompt` tokens as a processor would make it: a batch of one)."""
    shape = SHAPES[size]
    side = isqrt(n_prompt - WORDS)  # the picture takes side² tokens
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        model, prompt = _llava(shape, side) if family == "llava" else _qwen(shape, side)
    model = model.to(dtype).train()
    freeze(model)
    model.get_input_embeddings().requires_grad_(False)
    image_ids = [IMAGE] * side**2
    framed = image_ids if family == "llava" else [VISION_START, *image_ids, VISION_END]
    words = torch.arange(FIRST_WORD, FIRST_WORD + n_prompt - len(framed)) % shape.n_vocab
    ids = torch.tensor([[*framed, *words.clamp_min(FIRST_WORD).tolist()]])
    prompt |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family != "llava":
        prompt["mm_token_type_ids"] = (ids == IMAGE).to(ids.dtype)
    return model, {name: x.to(dtype) if x.is_floating_point() else x for name, x in prompt.items()}


def _text(shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": shape.n_vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def _llava(shape: Shape, side: int) -> tuple[Any, dict[str, Tensor]]:
    size = side * shape.patch
    config = LlavaConfig(
        text_config={"model_type": "llama", **_text(shape)},
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": shape.tower_hidden,
            "intermediate_size": 4 * shape.tower_hidden,
            "num_hidden_layers": shape.tower_layers,
            "num_attention_heads": max(2, shape.tower_hidden // 64),
            "image_size": size,
            "patch_size": shape.patch,
        },
        image_token_index=IMAGE,
        image_seq_length=side**2,
        vision_feature_layer=-2,
    )
    return LlavaForConditionalGeneration(config), {"pixel_values": torch.rand(1, 3, size, size).cpu()}


def _qwen(shape: Shape, side: int) -> tuple[Any, dict[str, Tensor]]:
    head_size = shape.hidden // shape.heads
    thirds = [head_size // 4, head_size // 8, head_size // 8]  # of the rotated half: time, height, width
    config = Qwen2_5_VLConfig(
        text_config={
            **_text(shape),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": thirds},
        },
        vision_config={
            "hidden_size": shape.tower_hidden,
            "intermediate_size": 4 * shape.tower_hidden,
            "out_hidden_size": shape.hidden,
            "depth": shape.tower_layers,
            "num_heads": max(2, shape.tower_hidden // 64),
            "patch_size": shape.patch,
            "spatial_merge_size": 2,
            "window_size": 8 * shape.patch,
            "fullatt_block_indexes": [shape.tower_layers - 1],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    grid = torch.tensor([[1, 2 * side, 2 * side]]).cpu()
    pixels = torch.rand(4 * side * side, 3 * 2 * shape.patch**2).cpu()
    return Qwen2_5_VLForConditionalGeneration(config), {"pixel_values": pixels, "image_grid_thw": grid}
