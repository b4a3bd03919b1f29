"""The demo's model: a LLaVA of a million parameters, made of stock `transformers` parts only.

A CLIP vision tower, a two-layer projector and a Llama, with random weights to begin with. A picture is 36 patches of
8 × 8 pixels. `SHIPPED` is the folder that `perpo.demo.train_sft` made; every command takes it as it takes any model.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from perpo.demo.digits import CANVAS
from perpo.demo.vocabulary import END, IMAGE, PAD, PATCH, PATCHES, TOKENS, build_processor

SHIPPED = Path(__file__).with_name("sft")
WEIGHTS = "model.safetensors"


def build_model(
    seed: int = 0, width: int = 128, vision_layers: int = 3, text_layers: int = 3
) -> LlavaForConditionalGeneration:
    """The model with random weights."""
    torch.manual_seed(seed)
    common = dict(hidden_size=width, intermediate_size=2 * width, num_attention_heads=4)
    vision = CLIPVisionConfig(
        **common,
        num_hidden_layers=vision_layers,
        image_size=CANVAS,
        patch_size=PATCH,
        projection_dim=width,
        initializer_factor=2.0,
    )
    end, pad = TOKENS.index(END), TOKENS.index(PAD)
    text = LlamaConfig(
        **common,
        num_hidden_layers=text_layers,
        vocab_size=len(TOKENS),
        max_position_embeddings=128,
        initializer_range=0.06,  # about width ** -0.5, as for the default's widths
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    config = LlavaConfig(
        eos_token_id=end,
        pad_token_id=pad,
        vision_config=vision,
        text_config=text,
        image_token_index=TOKENS.index(IMAGE),
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    for layer in (*model.model.language_model.layers, *model.model.vision_tower.encoder.layers):
        # A query and a key of like content agree from the start (Trockman & Kolter, "Mimetic Initialization", 2023):
        # the model need not first find out, over most of its training, that the 7 asked for is the 7 seen.
        layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight.data)
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = pad
    return model


def save_model(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """The model and its processor as a folder that every command takes.

    Weights are stored in half precision, 2 bytes each, and loaded in single: the configuration says float32.
    """
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    weights = load_file(folder / WEIGHTS)
    half = {name: weight.half().contiguous() for name, weight in weights.items()}
    save_file(half, folder / WEIGHTS, metadata={"format": "pt"})
