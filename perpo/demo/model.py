"""A tiny vision-language model of a real `transformers` class, and what the demo does with it.

LLaVA: a CLIP vision tower, a two-layer projector and a Llama, a million parameters in all, with random weights to
begin with. An image is 36 patches of 8 × 8 pixels. The prefix (image and question) is encoded once; all k answers to
it then continue from its key-value cache, in sampling as in training, so an answer costs 4 tokens and not 45.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.cache_utils import DynamicCache

from perpo.demo import vocabulary
from perpo.demo.scenes import CANVAS, Scenes

SHIPPED = Path(__file__).with_name("sft.safetensors")
MEAN, DEVIATION = 0.11, 0.19  # of the pixels of scenes
PATCH = 8
PATCHES = (CANVAS // PATCH) ** 2


class ConvolutionalStem(nn.Sequential):
    """Patches [N, H, 6, 6] of an image, by a few strided convolutions in place of CLIP's one large one.

    A tower this small learns to tell digits apart several times sooner so (Xiao et al., "Early Convolutions Help
    Transformers See Better", 2021).
    """

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Conv2d(1, 24, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(48, 96, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(96, width, 3, padding=1),
        )

    @property
    def weight(self) -> Tensor:
        """CLIP asks its patch embedding for the type of its weight."""
        weight = self[0].weight
        assert isinstance(weight, Tensor)
        return weight


def build_model(
    seed: int = 0, width: int = 128, vision_layers: int = 2, text_layers: int = 3
) -> LlavaForConditionalGeneration:
    """The model with random weights."""
    torch.manual_seed(seed)
    common = dict(hidden_size=width, intermediate_size=2 * width, num_attention_heads=4)
    vision = CLIPVisionConfig(
        **common,
        num_hidden_layers=vision_layers,
        image_size=CANVAS,
        patch_size=PATCH,
        num_channels=1,
        projection_dim=width,
        initializer_factor=2.0,
    )
    text = LlamaConfig(
        **common,
        num_hidden_layers=text_layers,
        vocab_size=len(vocabulary.TOKENS),
        max_position_embeddings=64,
        initializer_range=0.06,  # about width ** -0.5, as for the default's widths
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=vocabulary.IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.embeddings.patch_embedding = ConvolutionalStem(width)
    for layer in model.model.language_model.layers:
        # A query and a key of like content agree from the start (Trockman & Kolter, "Mimetic Initialization", 2023):
        # the model need not first find out, over most of its training, that the 7 asked for is the 7 seen.
        layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight.data)
    return model


def load_model(path: Path = SHIPPED) -> LlavaForConditionalGeneration:
    """The model with the weights of a file; every weight of the one must be in the other."""
    model = build_model()
    model.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
    return model


def normalised(images: Tensor) -> Tensor:
    """Images [N, 1, CANVAS, CANVAS] with pixels of about mean 0 and deviation 1, as the vision tower takes them."""
    return (images - MEAN) / DEVIATION


def encode_prefix(
    model: LlavaForConditionalGeneration,
    images: Tensor,  # [N, 1, CANVAS, CANVAS]
    text: Tensor,  # [N, P] tokens after the image; P may be 0
) -> tuple[Tensor, DynamicCache]:
    """The state [N, H] after the prefix, which predicts the next token, and the key-value cache up to there."""
    ids = torch.cat((torch.full((len(images), PATCHES), vocabulary.IMAGE), text), dim=1)
    out = model.model(input_ids=ids, pixel_values=normalised(images), use_cache=True)
    return out.last_hidden_state[:, -1], out.past_key_values


def continuation_states(
    model: LlavaForConditionalGeneration,
    images: Tensor,  # [N, 1, CANVAS, CANVAS]
    text: Tensor,  # [N, P]
    continuations: Tensor,  # [N, k, R] tokens: k ways to go on from each prefix
) -> Tensor:
    """The states [N, k, R, H] that predict each token of the continuations; each prefix is encoded once."""
    count, k, length = continuations.shape
    first, cache = encode_prefix(model, images, text)
    cache.batch_repeat_interleave(k)
    out = model.model(input_ids=continuations.flatten(0, 1)[:, :-1], past_key_values=cache, use_cache=True)
    rest = out.last_hidden_state.view(count, k, length - 1, -1)
    return torch.cat((first[:, None, None].expand(-1, k, -1, -1), rest), dim=2)


@torch.no_grad()
def sample_answers(
    model: LlavaForConditionalGeneration, scenes: Scenes, k: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Answers [N, k, 4] at temperature 1 (without a generator: greedy), and the states [N, k, 4, H] that gave them."""
    first, cache = encode_prefix(model, scenes.images, vocabulary.question_ids(scenes.asked))
    cache.batch_repeat_interleave(k)
    tokens: list[Tensor] = []
    states = [first.repeat_interleave(k, dim=0)]
    while True:
        logits = model.lm_head(states[-1])
        if generator is None:
            tokens.append(logits.argmax(-1))
        else:
            tokens.append(torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1))
        if len(tokens) == vocabulary.ANSWER_TOKENS:
            shape = (len(scenes), k, len(tokens))
            return torch.stack(tokens, dim=1).view(shape), torch.stack(states, dim=1).view(*shape, -1)
        out = model.model(input_ids=tokens[-1][:, None], past_key_values=cache, use_cache=True)
        states.append(out.last_hidden_state[:, -1])
