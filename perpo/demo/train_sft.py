"""How the demo's SFT model is made: first its vision tower is trained, then it learns to answer from cheap annotation.

    python -m perpo.demo.train_sft

Every step sees fresh pictures of training digits, boxes as cheap annotation draws them and transcripts made in a hurry.
Some 13 minutes of one core; the shipped weights were made with OMP_NUM_THREADS=1.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from perpo.demo.digits import Pictures
from perpo.demo.model import SHIPPED, build_model, save_model
from perpo.demo.pages import QUESTION, hasty_transcripts, make_pages
from perpo.demo.scenes import box_text, coarse_boxes, make_scenes, question
from perpo.demo.vocabulary import (
    DEVIATION,
    END,
    FIRST_DIGIT,
    FIRST_STEPS,
    IMAGE,
    MEAN,
    PATCHES,
    STEPS,
    TOKENS,
    build_tokenizer,
)

EYE_STEPS, STEPS_OF_ANSWERS = 1600, 700
BATCH = 32  # scenes per step, and the same number of pages
EYE_LEARNING_RATE, LEARNING_RATE = 2e-3, 1e-3
EYE_SEED, SEED = 10_000_000, 20_000_000  # of the pictures; far from the seeds that the comparison uses
TURN = "ASSISTANT:"


class PatchWords(nn.Module):
    """What a patch's embedding says in the model's own words: which digit it shows, and where that digit's box is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.shift = nn.Parameter(torch.tensor(-5.0))
        self.corners = nn.Linear(width, 4 * width)

    def digits(self, model: LlavaForConditionalGeneration, patches: Tensor) -> Tensor:
        """Logits [N, P, 10] of "this patch [N, P, H] shows this digit": a scaled and shifted cosine, as in SigLIP."""
        words = model.get_input_embeddings().weight[FIRST_DIGIT : FIRST_DIGIT + 10]
        return self.scale * (F.normalize(patches, dim=-1) @ F.normalize(words, dim=-1).T) + self.shift

    def coordinates(self, model: LlavaForConditionalGeneration, patches: Tensor) -> Tensor:
        """Logits [M, 4, 101] of the box around the digit that patches [M, H] show."""
        corners = self.corners(patches).view(len(patches), 4, -1).unbind(1)
        words = [model.lm_head.weight[first : first + len(STEPS)] for first in FIRST_STEPS]
        return torch.stack([corner @ word.T for corner, word in zip(corners, words, strict=True)], dim=1)


def normalised(pictures: Pictures) -> Tensor:
    """Pixels [N, 3, CANVAS, CANVAS] exactly as the processor gives them."""
    return ((pictures.pixels.float() / 255 - MEAN) / DEVIATION).unsqueeze(1).expand(-1, 3, -1, -1)


def vision_loss(model: LlavaForConditionalGeneration, words: PatchWords, pictures: Pictures, seed: int) -> Tensor:
    """Cross-entropy of each patch's digit (binary, the target being the share of the patch in the box) and box."""
    boxes = coarse_boxes(pictures.boxes, seed)  # [N, D, 4]
    there = pictures.digits >= 0
    patches = torch.stack(list(model.model.get_image_features(normalised(pictures)).pooler_output))  # [N, P, H]
    cover = (patch_cover(boxes) * there.unsqueeze(2)).transpose(1, 2)  # [N, P, D]
    target = torch.zeros(len(pictures), PATCHES, 10)
    target.scatter_reduce_(2, pictures.digits.clamp(min=0).unsqueeze(1).expand_as(cover), cover, "amax")
    digit_loss = F.binary_cross_entropy_with_logits(words.digits(model, patches), target)
    scene, patch = (cover.amax(2) > 0.5).nonzero(as_tuple=True)
    owner = cover[scene, patch].argmax(1)
    coordinates = (100 * boxes[scene, owner]).round().long()  # [M, 4]
    logits = words.coordinates(model, patches[scene, patch])
    return 10 * digit_loss + F.cross_entropy(logits.flatten(0, 1), coordinates.flatten())


def answer_loss(
    model: LlavaForConditionalGeneration, pictures: Pictures, turns: Sequence[Sequence[tuple[str, str]]]
) -> Tensor:
    """Mean negative log-likelihood of the answers' tokens, for D questions with answers to each picture.

    The picture alone is the prefix, questions and answers the continuations: D questions for one picture's price.
    """
    ids = torch.tensor([[TOKENS.index("USER:"), *[TOKENS.index(IMAGE)] * PATCHES]]).expand(len(pictures), -1)
    prefix = model.model(input_ids=ids, pixel_values=normalised(pictures), use_cache=True)
    cache = prefix.past_key_values
    cache.batch_repeat_interleave(len(turns[0]))
    tokens, labels = _continuations([turn for several in turns for turn in several])
    hidden = model.model(input_ids=tokens[:, :-1], past_key_values=cache, use_cache=True).last_hidden_state
    wanted = labels[:, 1:]
    return F.cross_entropy(model.lm_head(hidden[wanted >= 0]), wanted[wanted >= 0])


def _continuations(turns: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
    """Token ids of questions with answers [S, L], and the same with −1 wherever a token is not part of an answer."""
    tokenizer = build_tokenizer()
    asked = tokenizer([f"{question} {TURN}" for question, _ in turns]).input_ids
    answered = tokenizer([answer + END for _, answer in turns]).input_ids
    rows = [torch.tensor(a + b) for a, b in zip(asked, answered, strict=True)]
    labels = [torch.tensor([-1] * len(a) + b) for a, b in zip(asked, answered, strict=True)]
    pad = nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad(labels, batch_first=True, padding_value=-1)


def scene_turns(scenes: Pictures, seed: int) -> list[list[tuple[str, str]]]:
    """Every digit of a scene asked for in turn, answered with its coarse box."""
    boxes = coarse_boxes(scenes.boxes, seed).tolist()
    return [
        [(question(digit), box_text(box)) for digit, box in zip(digits, of, strict=True)]
        for digits, of in zip(scenes.digits.tolist(), boxes, strict=True)
    ]


def page_turns(pages: Pictures, seed: int) -> list[list[tuple[str, str]]]:
    return [[(QUESTION, text)] for text in hasty_transcripts(pages, seed)]


def patch_cover(boxes: Tensor) -> Tensor:
    """The share [..., PATCHES] of each patch of the image that lies in boxes [..., 4]."""
    side = math.isqrt(PATCHES)
    low = torch.arange(side) / side
    along = [
        (torch.minimum(boxes[..., end, None], low + 1 / side) - torch.maximum(boxes[..., start, None], low)).clamp(
            min=0
        )
        for start, end in ((0, 2), (1, 3))
    ]  # [..., side], across and down
    return (side * along[1].unsqueeze(-1) * side * along[0].unsqueeze(-2)).flatten(-2)


def train_sft(eye_steps: int = EYE_STEPS, steps: int = STEPS_OF_ANSWERS) -> LlavaForConditionalGeneration:
    """The supervised model, from random weights.

    Before the model learns to answer, its vision tower learns to match patches with words, as the pretrained towers of
    real models do: ten labels for each patch train it much faster than four tokens for each question would. From then
    on it is frozen.
    """
    model = build_model().train()
    train_vision(model, eye_steps)
    teach_answers(model, steps)
    return model.eval()


def train_vision(model: LlavaForConditionalGeneration, steps: int) -> None:
    """Train the vision tower and the projector to say each patch's digit and its box in the model's words."""
    words = PatchWords(model.config.text_config.hidden_size)
    parts = (
        model.model.vision_tower,
        model.model.multi_modal_projector,
        model.get_input_embeddings(),
        model.lm_head,
        words,
    )
    trained = [parameter for part in parts for parameter in part.parameters()]

    def loss(seed: int) -> Tensor:
        scenes, pages = _pictures(seed)
        return vision_loss(model, words, scenes, seed) + vision_loss(model, words, pages, seed)

    _train("vision tower", range(EYE_SEED, EYE_SEED + steps), loss, trained, EYE_LEARNING_RATE)


def teach_answers(model: LlavaForConditionalGeneration, steps: int) -> None:
    """Train all but the vision tower to answer with coarse boxes and hasty transcripts."""
    model.model.vision_tower.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss(seed: int) -> Tensor:
        scenes, pages = _pictures(seed)
        boxes = answer_loss(model, scenes, scene_turns(scenes, seed))
        return boxes + answer_loss(model, pages, page_turns(pages, seed))

    _train("SFT on cheap annotation", range(SEED, SEED + steps), loss, trained, LEARNING_RATE)


def _pictures(seed: int) -> tuple[Pictures, Pictures]:
    return make_scenes(BATCH, "train", seed), make_pages(BATCH, "train", seed)


def _train(
    name: str, seeds: range, loss_of: Callable[[int], Tensor], trained: list[nn.Parameter], learning_rate: float
) -> None:
    optimizer = torch.optim.AdamW(trained, learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, len(seeds)))
    with tqdm(seeds, desc=name, unit="step", file=sys.stderr) as progress:
        for seed in progress:
            loss = loss_of(seed)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if seed % 20 == 0:
                progress.set_postfix(loss=f"{loss.item():.3f}")


def _warmup_cosine(step: int, steps: int) -> float:
    warmup = min(100, steps // 10 + 1)
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eye-steps", type=int, default=EYE_STEPS, help="of the vision tower (%(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS_OF_ANSWERS, help="of answering (%(default)s)")
    parser.add_argument("--output", type=Path, default=SHIPPED, help="the model folder to write")
    arguments = parser.parse_args()
    save_model(train_sft(arguments.eye_steps, arguments.steps), arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
