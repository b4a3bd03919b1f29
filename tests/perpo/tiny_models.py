"""Tiny random-weight vision-language models with their processors, made in code: no download, no torchvision.

    model, processor = tiny_models.build("qwen2_5_vl")

The tokenizer is byte-level with no merges, so any text is representable and every id is predictable. Chat templates
are shortened copies of what each family ships with.
"""

from __future__ import annotations

import importlib
import sys
from functools import partial
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, BaseImageProcessor, PreTrainedTokenizerFast
from transformers.processing_utils import ImagesKwargs

FAMILIES = ("llava", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "internvl")
MORE_FAMILIES = ("llava_next", "mistral3", "glm4v", "gemma3", "paligemma", "qwen3_5", "qwen3_5_moe")
TEXT_FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "qwen3_5_text", "qwen3_next", "lfm2")
STAND_IN_FAMILIES = ("lfm2_vl",)  # their own image processors need torchvision; a stand-in gives the like
EXPERT_FAMILIES = ("qwen3_5_moe", "qwen3_next")

HIDDEN, LAYERS, HEADS = 32, 2, 4
TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
LINEAR = {  # of families with linear attention
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
OWN = {  # what text families have of their own
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR | EXPERTS,
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_bias": True},
}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}

SPECIAL = {
    "pad": "<|pad|>",
    "bos": "<|bos|>",
    "end": "<|im_end|>",
    "start": "<|im_start|>",
    "end_of_text": "<|endoftext|>",
    "image": "<image>",
    "video": "<video>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}
IDEFICS_TOKENS = (
    "<fake_token_around_image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)),
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_TEMPLATE = (
    "<|bos|>{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}"
    "{% endif %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% if message['role'] == 'assistant' %}<|im_end|>{% else %} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def tokenizer(extra: tuple[str, ...] = (), **attributes: str) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer: ids 0..255 are bytes, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([*SPECIAL.values(), *extra])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=SPECIAL["pad"],
        bos_token=SPECIAL["bos"],
        eos_token=SPECIAL["end"],
        clean_up_tokenization_spaces=False,
        extra_special_tokens=attributes,
    )


def picture(size: tuple[int, int] = (40, 28), seed: int = 0) -> Image.Image:
    """A small picture of random blocks, (width, height)."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(blocks.numpy()).resize(size, Image.Resampling.NEAREST)


def _load(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{module}"), name)


def _without_video(processor_class: type) -> type:
    """The processor class, but content with no video processor: those exist only together with torchvision."""

    def check(self: Any, name: str, argument: Any) -> Any:
        return (
            None if name == "video_processor" else super(relaxed, self).check_argument_for_proper_class(name, argument)
        )

    relaxed = type(processor_class.__name__, (processor_class,), {"check_argument_for_proper_class": check})
    return relaxed


def _mrope_section() -> list[int]:
    """Halves of a head's dimensions that turn with time, height and width."""
    half = HIDDEN // HEADS // 2
    return [half - 2 * (half // 4), half // 4, half // 4]


def _llava() -> tuple[Any, Any, Any]:
    tok = tokenizer()
    config = _load("llava", "LlavaConfig")(
        text_config={"model_type": "llama", "vocab_size": len(tok), **TEXT},
        vision_config={"model_type": "clip_vision_model", **VISION, "image_size": 28, "patch_size": 7},
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-2,
    )
    images = _load("clip.image_processing_pil_clip", "CLIPImageProcessorPil")(
        size={"height": 28, "width": 28},
        do_center_crop=False,  # as on the hub it would crop, which Encoder refuses
    )
    processor = _load("llava", "LlavaProcessor")(
        images,
        tok,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return _load("llava", "LlavaForConditionalGeneration"), config, processor


def _llava_onevision() -> tuple[Any, Any, Any]:
    tok = tokenizer()
    grid = [[28, 28], [28, 56], [56, 28], [56, 56]]
    config = _load("llava_onevision", "LlavaOnevisionConfig")(
        text_config={"model_type": "qwen2", "vocab_size": len(tok), **TEXT},
        vision_config={
            "model_type": "siglip_vision_model",
            **VISION,
            "image_size": 28,
            "patch_size": 7,
            "vision_use_head": False,
        },
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        video_token_index=tok.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grid,
    )
    images = _load("llava_onevision.image_processing_pil_llava_onevision", "LlavaOnevisionImageProcessorPil")(
        size={"height": 28, "width": 28}, image_grid_pinpoints=grid
    )
    processor = _without_video(_load("llava_onevision", "LlavaOnevisionProcessor"))(
        images,
        tok,
        None,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHATML.replace("IMAGE", "<image>\n"),
    )
    return _load("llava_onevision", "LlavaOnevisionForConditionalGeneration"), config, processor


def _qwen(family: str, prefix: str) -> tuple[Any, Any, Any]:
    tok = tokenizer(
        image_token=SPECIAL["image"],
        video_token=SPECIAL["video"],
        vision_start_token=SPECIAL["vision_start"],
        vision_end_token=SPECIAL["vision_end"],
    )
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 7, "spatial_merge_size": 2}
    if family == "qwen2_vl":
        vision |= {"embed_dim": 16, "hidden_size": HIDDEN, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": HIDDEN}
    if family == "qwen2_5_vl":
        vision |= {"window_size": 28, "fullatt_block_indexes": [1]}
    if family == "qwen3_vl":
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    if family.startswith("qwen3_5"):
        vision |= {"num_position_embeddings": 16}
    text: dict[str, Any] = {
        "vocab_size": len(tok),
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
        **TEXT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": _mrope_section()},
    }
    if family.startswith("qwen3"):
        text |= {"head_dim": HIDDEN // HEADS}
        text["rope_parameters"]["mrope_interleaved"] = True
    if family.startswith("qwen3_5"):
        text |= LINEAR | (EXPERTS if family == "qwen3_5_moe" else {})
        text["rope_parameters"]["partial_rotary_factor"] = 1.0
    config = _load(family, f"{prefix}Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        video_token_id=tok.convert_tokens_to_ids("<video>"),
        vision_start_token_id=tok.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tok.convert_tokens_to_ids("<|vision_end|>"),
    )
    images = _load("qwen2_vl.image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil")(
        patch_size=7, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 14 * 14, "longest_edge": 42 * 42}
    )
    kind, name = ("qwen3_vl", "Qwen3VL") if family.startswith("qwen3_5") else (family, prefix)
    processor_name = "Qwen2_5_VLProcessor" if family == "qwen2_5_vl" else f"{name}Processor"
    processor = _without_video(_load(kind, processor_name))(
        images, tok, None, chat_template=CHATML.replace("IMAGE", "<|vision_start|><image><|vision_end|>")
    )
    return _load(family, f"{prefix}ForConditionalGeneration"), config, processor


def _idefics(family: str, prefix: str) -> tuple[Any, Any, Any]:
    tok = tokenizer(IDEFICS_TOKENS)
    tok.eos_token = "<end_of_utterance>"
    config = _load(family, f"{prefix}Config")(
        text_config={"model_type": "llama", "vocab_size": len(tok), **TEXT, "pad_token_id": tok.pad_token_id},
        vision_config={**VISION, "image_size": 28, "patch_size": 7},
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tok.pad_token_id,
    )
    images = _load(f"{family}.image_processing_pil_{family}", f"{prefix}ImageProcessorPil")(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 28}
    )
    module = importlib.import_module(f"transformers.models.{family}.processing_{family}")
    rest: tuple[Any, ...] = ()
    if family == "smolvlm":
        module.num2words = module.num2words or str  # only spells out numbers of video frames
        rest = (None,)
    processor = _without_video(getattr(module, f"{prefix}Processor"))(
        images, tok, *rest, image_seq_len=4, chat_template=IDEFICS_TEMPLATE
    )
    if family == "smolvlm":  # its apply_chat_template reads the defaults of the video processor
        processor.video_processor = type("NoVideo", (), {"num_frames": 0, "fps": 0})()
    return _load(family, f"{prefix}ForConditionalGeneration"), config, processor


def _internvl() -> tuple[Any, Any, Any]:
    tok = tokenizer(
        ("<img>", "</img>"),
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token=SPECIAL["image"],
        video_token=SPECIAL["video"],
    )
    config = _load("internvl", "InternVLConfig")(
        text_config={"model_type": "qwen2", "vocab_size": len(tok), **TEXT},
        vision_config={**VISION, "image_size": [28, 28], "patch_size": [7, 7]},
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    images = _load("got_ocr2.image_processing_pil_got_ocr2", "GotOcr2ImageProcessorPil")(
        size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    processor = _without_video(_load("internvl", "InternVLProcessor"))(
        images, tok, None, image_seq_length=4, chat_template=CHATML.replace("IMAGE", "<image>\n")
    )
    return _load("internvl", "InternVLForConditionalGeneration"), config, processor


def _llava_next() -> tuple[Any, Any, Any]:
    tok = tokenizer()
    grid = [[28, 56], [56, 28], [56, 56]]
    config = _load("llava_next", "LlavaNextConfig")(
        text_config={"model_type": "llama", "vocab_size": len(tok), **TEXT},
        vision_config={"model_type": "clip_vision_model", **VISION, "image_size": 28, "patch_size": 7},
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-2,
        image_grid_pinpoints=grid,
    )
    images = _load("llava_next.image_processing_pil_llava_next", "LlavaNextImageProcessorPil")(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=grid
    )
    processor = _load("llava_next", "LlavaNextProcessor")(
        images,
        tok,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    return _load("llava_next", "LlavaNextForConditionalGeneration"), config, processor


def _mistral3() -> tuple[Any, Any, Any]:
    tok = tokenizer(("[IMG_BREAK]", "[IMG_END]"))
    config = _load("mistral3", "Mistral3Config")(
        text_config={"model_type": "mistral", "vocab_size": len(tok), **TEXT, "head_dim": 8, "sliding_window": None},
        vision_config={"model_type": "pixtral", **VISION, "image_size": 56, "patch_size": 7, "head_dim": 8},
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    images = _load("pixtral.image_processing_pil_pixtral", "PixtralImageProcessorPil")(
        size={"longest_edge": 56}, patch_size={"height": 7, "width": 7}
    )
    absent = dict.fromkeys(("torchvision", "torchvision.transforms", "torchvision.transforms.v2"), MagicMock())
    with patch.dict(sys.modules, absent):  # its module imports torchvision for an image processor not used here
        pixtral_processor = _load("pixtral.processing_pixtral", "PixtralProcessor")
    processor = pixtral_processor(
        images,
        tok,
        patch_size=7,
        spatial_merge_size=2,
        image_token="<image>",
        chat_template=CHATML.replace("IMAGE", "<image>"),
    )
    return _load("mistral3", "Mistral3ForConditionalGeneration"), config, processor


def _glm4v() -> tuple[Any, Any, Any]:
    tok = tokenizer(image_token=SPECIAL["image"], video_token=SPECIAL["video"])
    config = _load("glm4v", "Glm4vConfig")(
        text_config={
            "vocab_size": len(tok),
            **TEXT,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": _mrope_section(),
                "partial_rotary_factor": 1.0,
            },
        },
        vision_config={
            "depth": 2,
            "num_heads": 2,
            "patch_size": 7,
            "spatial_merge_size": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": HIDDEN,
            "image_size": 28,
        },
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        video_token_id=tok.convert_tokens_to_ids("<video>"),
        image_start_token_id=tok.convert_tokens_to_ids("<|vision_start|>"),
        image_end_token_id=tok.convert_tokens_to_ids("<|vision_end|>"),
    )
    images = _load("glm4v.image_processing_pil_glm4v", "Glm4vImageProcessorPil")(
        patch_size=7,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 14 * 14 * 2, "longest_edge": 42 * 42 * 2},
    )
    processor = _without_video(_load("glm4v", "Glm4vProcessor"))(
        images, tok, None, chat_template=CHATML.replace("IMAGE", "<|vision_start|><image><|vision_end|>")
    )
    return _load("glm4v", "Glm4vForConditionalGeneration"), config, processor


def _gemma3() -> tuple[Any, Any, Any]:
    tok = tokenizer(image_token=SPECIAL["image"], boi_token=SPECIAL["vision_start"], eoi_token=SPECIAL["vision_end"])
    config = _load("gemma3", "Gemma3Config")(
        text_config={"vocab_size": len(tok), **TEXT, "head_dim": 8, "sliding_window": 16, "sliding_window_pattern": 2},
        vision_config={**VISION, "image_size": 28, "patch_size": 7, "vision_use_head": False},
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        boi_token_index=tok.convert_tokens_to_ids("<|vision_start|>"),
        eoi_token_index=tok.convert_tokens_to_ids("<|vision_end|>"),
        mm_tokens_per_image=4,
    )
    images = _load("gemma3.image_processing_pil_gemma3", "Gemma3ImageProcessorPil")(size={"height": 28, "width": 28})
    processor = _load("gemma3", "Gemma3Processor")(
        images, tok, image_seq_length=4, chat_template=CHATML.replace("IMAGE", "<|vision_start|>")
    )
    return _load("gemma3", "Gemma3ForConditionalGeneration"), config, processor


def _paligemma() -> tuple[Any, Any, Any]:
    tok = tokenizer(image_token=SPECIAL["image"])
    images = _load("siglip.image_processing_pil_siglip", "SiglipImageProcessorPil")(size={"height": 28, "width": 28})
    images.image_seq_length = 16
    processor = _load("paligemma", "PaliGemmaProcessor")(images, tok)
    config = _load("paligemma", "PaliGemmaConfig")(
        text_config={"model_type": "gemma", "vocab_size": len(tok), **TEXT, "head_dim": 8},
        vision_config={**VISION, "image_size": 28, "patch_size": 7, "projection_dim": HIDDEN, "vision_use_head": False},
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        projection_dim=HIDDEN,
        hidden_size=HIDDEN,
    )
    return _load("paligemma", "PaliGemmaForConditionalGeneration"), config, processor


class _TileKwargs(ImagesKwargs, total=False):
    return_row_col_info: bool | None


class _Tile(BaseImageProcessor):
    """An image as one tile: its patches, padded to 16, how they lie, and what LFM2-VL's processor reads."""

    valid_kwargs = _TileKwargs
    tile_size, downsample_factor, encoder_patch_size, use_thumbnail = 28, 2, 7, False

    def __call__(self, images: Any, **kwargs: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for image in (image for of_text in images for image in of_text):
            width, height = (14 if side < 35 else 28 for side in image.size)
            pixels = torch.frombuffer(bytearray(image.resize((width, height)).tobytes()), dtype=torch.uint8)
            pixels = pixels.view(height, width, 3) / 255
            patches = pixels.unfold(0, 7, 7).unfold(1, 7, 7).permute(0, 1, 3, 4, 2).reshape(-1, 7 * 7 * 3)
            n = len(patches)
            found.setdefault("pixel_values", []).append(torch.cat((patches, torch.zeros(16 - n, 147))))
            found.setdefault("pixel_attention_mask", []).append(torch.tensor([1] * n + [0] * (16 - n)))
            found.setdefault("spatial_shapes", []).append(torch.tensor([height // 7, width // 7]))
            found.setdefault("image_sizes", []).append([height, width])
        stacked = {
            name: torch.stack(found[name]) for name in ("pixel_values", "pixel_attention_mask", "spatial_shapes")
        }
        ones = [1] * len(found["image_sizes"])
        return {**found, **stacked, "image_rows": ones, "image_cols": ones}


def _lfm2_vl() -> tuple[Any, Any, Any]:
    tok = tokenizer(("<|image_start|>", "<|image_end|>"))
    config = _load("lfm2_vl", "Lfm2VlConfig")(
        text_config={"model_type": "lfm2", "vocab_size": len(tok), **TEXT, **OWN["lfm2"]},
        vision_config={**VISION, "model_type": "siglip2_vision_model", "patch_size": 7, "num_patches": 16},
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        projector_hidden_size=24,
        tie_word_embeddings=False,
    )
    kind = _load("lfm2_vl.processing_lfm2_vl", "Lfm2VlProcessor")
    relaxed = type(
        kind.__name__, (kind,), {"check_argument_for_proper_class": lambda self, name, argument: type(argument)}
    )
    processor = relaxed(_Tile(), tok, chat_template=CHATML.replace("IMAGE", "<image>"))
    return _load("lfm2_vl", "Lfm2VlForConditionalGeneration"), config, processor


def _text(family: str) -> tuple[Any, Any, Any]:
    tok = tokenizer()
    tok.chat_template = CHATML
    config = AutoConfig.for_model(family, vocab_size=len(tok), **{**TEXT, **OWN.get(family, {})})
    config.head_dim = HIDDEN // HEADS
    if getattr(config, "sliding_window", None) and family != "gemma2":  # its eager attention makes NaN of padding then
        config.sliding_window = 16
    return AutoModelForCausalLM.from_config, config, tok


def build(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model, processor) of a family: about 50k parameters, weights fixed by the seed, in train mode."""
    parts = {
        "llava": _llava,
        "llava_onevision": _llava_onevision,
        "qwen2_vl": lambda: _qwen("qwen2_vl", "Qwen2VL"),
        "qwen2_5_vl": lambda: _qwen("qwen2_5_vl", "Qwen2_5_VL"),
        "qwen3_vl": lambda: _qwen("qwen3_vl", "Qwen3VL"),
        "qwen3_5": lambda: _qwen("qwen3_5", "Qwen3_5"),
        "qwen3_5_moe": lambda: _qwen("qwen3_5_moe", "Qwen3_5Moe"),
        "idefics3": lambda: _idefics("idefics3", "Idefics3"),
        "smolvlm": lambda: _idefics("smolvlm", "SmolVLM"),
        "internvl": _internvl,
        "llava_next": _llava_next,
        "mistral3": _mistral3,
        "glm4v": _glm4v,
        "gemma3": _gemma3,
        "paligemma": _paligemma,
        "lfm2_vl": _lfm2_vl,
        **{name: partial(_text, name) for name in TEXT_FAMILIES},
    }
    model_class, config, processor = parts[family]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).to(dtype)
        with torch.no_grad():  # larger than the usual initialisation, so that pictures and words matter to the answer
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.2)
                elif "norm" not in name:
                    parameter.uniform_(-0.1, 0.1)
    tok = getattr(processor, "tokenizer", processor)
    model.generation_config.eos_token_id = [tok.eos_token_id, tok.convert_tokens_to_ids("<|endoftext|>")]
    model.generation_config.pad_token_id = tok.pad_token_id
    return model.train(), processor
