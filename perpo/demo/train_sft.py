"""How the demo's SFT checkpoint is made: a vision tower taught first, then supervised training on coarse boxes.

    python -m perpo.demo.train_sft --output perpo/demo/sft.safetensors

Every step sees fresh scenes, and boxes as cheap annotation would draw them, never the exact ones.
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from perpo.demo.model import PATCHES, SHIPPED, build_model, continuation_states, normalised
from perpo.demo.scenes import Scenes, coarse_boxes, make_scenes
from perpo.demo.vocabulary import FIRST_COORDINATE, FIRST_DIGIT, box_ids, question_ids

VISION_STEPS, STEPS = 800, 600
VISION_BATCH, BATCH = 32, 32  # scenes a step
VISION_LEARNING_RATE, LEARNING_RATE = 2e-3, 2e-3
VISION_SEED, SEED = 10_000_000, 20_000_000  # of the scenes; far from the seeds that the comparison uses


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
        return self.corners(patches).view(len(patches), 4, -1) @ model.lm_head.weight[FIRST_COORDINATE:].T


def vision_loss(model: LlavaForConditionalGeneration, words: PatchWords, scenes: Scenes, seed: int) -> Tensor:
    """Cross-entropy of each patch's digit (binary, the target being the share of the patch in the box) and box."""
    boxes = coarse_boxes(scenes.all_boxes, seed)  # [N, D, 4]
    features = model.model.vision_tower(pixel_values=normalised(scenes.images)).last_hidden_state[:, 1:]
    patches = model.model.multi_modal_projector(features)  # [N, P, H]
    cover = patch_cover(boxes).transpose(1, 2)  # [N, P, D]
    target = torch.zeros(len(scenes), PATCHES, 10)
    target.scatter_(2, scenes.digits.unsqueeze(1).expand_as(cover), cover)
    digit_loss = F.binary_cross_entropy_with_logits(words.digits(model, patches), target)
    scene, patch = (cover.amax(2) > 0.5).nonzero(as_tuple=True)
    owner = cover[scene, patch].argmax(1)
    coordinates = box_ids(boxes)[scene, owner] - FIRST_COORDINATE  # [M, 4]
    logits = words.coordinates(model, patches[scene, patch])
    return 10 * digit_loss + F.cross_entropy(logits.flatten(0, 1), coordinates.flatten())  # about 1 and 2 at the end


def sft_loss(model: LlavaForConditionalGeneration, scenes: Scenes, seed: int) -> Tensor:
    """Mean negative log-likelihood of the coarse boxes' tokens, with every digit of a scene asked for in turn.

    The image alone is the prefix here, and question and answer the continuation: three questions for one image's price.
    """
    answers = box_ids(coarse_boxes(scenes.all_boxes, seed))  # [N, D, 4]
    turns = torch.cat((question_ids(scenes.digits), answers), dim=2)  # [N, D, 5 + 4]
    states = continuation_states(model, scenes.images, torch.empty(len(scenes), 0, dtype=torch.long), turns)
    logits = model.lm_head(states[:, :, -answers.shape[2] :])
    return F.cross_entropy(logits.flatten(0, 2), answers.flatten())


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


def train_sft(vision_steps: int = VISION_STEPS, steps: int = STEPS) -> LlavaForConditionalGeneration:
    """The supervised model, from random weights.

    Before the model learns to answer, its eyes learn the words for what they see, as the vision towers of grown-up
    models have: ten answers for each patch teach them much faster than four tokens for each question would. From then
    on they are frozen.
    """
    model = build_model().train()
    teach_eyes(model, vision_steps)
    teach_answers(model, steps)
    return model.eval()


def teach_eyes(model: LlavaForConditionalGeneration, steps: int) -> None:
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
    batches = Batches("teaching the eyes", steps, VISION_BATCH, VISION_SEED)
    _train(batches, lambda *batch: vision_loss(model, words, *batch), trained, VISION_LEARNING_RATE)


def teach_answers(model: LlavaForConditionalGeneration, steps: int) -> None:
    """Train all but the vision tower to answer with coarse boxes."""
    model.model.vision_tower.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batches = Batches("SFT on coarse boxes", steps, BATCH, SEED)
    _train(batches, lambda *batch: sft_loss(model, *batch), trained, LEARNING_RATE)


def save_model(model: LlavaForConditionalGeneration, path: Path) -> None:
    """Weights in half precision: 2 bytes each, and the checkpoint is a start for training, not a result."""
    save_file({name: weight.half().contiguous() for name, weight in model.state_dict().items()}, path)


@dataclass(frozen=True)
class Batches:
    name: str  # of the progress bar
    steps: int
    size: int
    seed: int  # of the first step's scenes; each step adds one


def _train(
    batches: Batches, loss_of: Callable[[Scenes, int], Tensor], trained: list[nn.Parameter], learning_rate: float
) -> None:
    optimizer = torch.optim.AdamW(trained, learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, batches.steps))
    with tqdm(range(batches.steps), desc=batches.name, unit="step", file=sys.stderr) as progress:
        for step in progress:
            seed = batches.seed + step
            loss = loss_of(make_scenes(batches.size, "train", seed), seed)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 20 == 0:
                progress.set_postfix(loss=f"{loss.item():.3f}")


def _warmup_cosine(step: int, steps: int) -> float:
    warmup = min(100, steps // 10 + 1)
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--vision-steps", type=int, default=VISION_STEPS, help=f"of {VISION_BATCH} scenes (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"supervised steps of {BATCH} scenes (%(default)s)")
    parser.add_argument("--output", type=Path, default=SHIPPED, help="the safetensors file to write")
    arguments = parser.parse_args()
    save_model(train_sft(arguments.vision_steps, arguments.steps), arguments.output)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
