"""Real handwritten digits on a small square of paper: what the demo's pictures are made of.

The digits are the 1797 of scikit-learn's `load_digits`, 8 × 8 pixels each, written by people. Every digit of a picture
is stretched to its own cell and drawn with its own ink, dark on paper with a grain. Its exact box is read off its ink.

Splits are apart by *digit*: no scribble of the validation or test split is ever seen in training.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CANVAS = 48  # pixels a side
NOISE = 0.08  # standard deviation of the paper's grain, as a share of full ink
INK_THRESHOLD = 0.25  # share of a digit's strongest ink from which a pixel belongs to the digit
PART = 512  # pictures drawn at a time


@dataclass(frozen=True)
class Pictures:
    """Pictures with all that is known of the digits in them. Where there are fewer than D, digits is −1, the rest 0."""

    pixels: Tensor  # uint8 [N, CANVAS, CANVAS], 255 the paper
    digits: Tensor  # int64 [N, D] classes
    boxes: Tensor  # [N, D, 4] x1, y1, x2, y2 in fractions of the picture, tight around each digit's ink
    ink: Tensor  # [N, D] how dark each digit is written, in 0–1

    def __len__(self) -> int:
        return len(self.digits)


@cache
def digit_bank(split: str) -> tuple[Tensor, Tensor]:
    """Images [M, 8, 8] in 0–1 and classes [M] of a split's digits: seven tenths train, one validation, two test."""
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    digits = load_digits()
    tenth = np.arange(len(digits.target)) % 10
    chosen = {"train": tenth < 7, "validation": tenth == 7, "test": tenth > 7}[split]
    images = torch.from_numpy(digits.images[chosen] / 16.0).float()
    return images, torch.from_numpy(digits.target[chosen]).long()


def draw(
    digits: Tensor,  # int64 [N, D], −1 for none
    cells: Tensor,  # [N, D, 4] left, top, width, height in pixels
    ink: Tensor,  # [N, D]
    split: str,
    generator: torch.Generator,
) -> Pictures:
    """Pictures of a random scribble of every digit, stretched into its cell."""
    parts = [
        _draw(digits[i : i + PART], cells[i : i + PART], ink[i : i + PART], split, generator)
        for i in range(0, len(digits), PART)
    ]
    return Pictures(torch.cat([pixels for pixels, _ in parts]), digits, torch.cat([boxes for _, boxes in parts]), ink)


def _draw(digits: Tensor, cells: Tensor, ink: Tensor, split: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    layers = _layers(_scribbles(digits, split, generator), cells)  # [N, D, C, C]
    there = (digits >= 0)[:, :, None]
    grain = NOISE * torch.randn(len(digits), CANVAS, CANVAS, generator=generator)
    dark = (layers * (ink * there.squeeze(2))[:, :, None, None]).amax(1) + grain
    boxes = tight_boxes(layers.flatten(0, 1)).view(*digits.shape, 4) * there
    return (255 * (1 - dark.clamp(0, 1))).round().byte(), boxes


def _scribbles(digits: Tensor, split: str, generator: torch.Generator) -> Tensor:
    """A random member [N, D, 8, 8] of every digit's class; of class 0 where there is none."""
    bank, classes = digit_bank(split)
    members = classes.argsort(stable=True)  # the members of a class lie side by side, from `starts` on
    sizes = torch.bincount(classes, minlength=10)
    starts = sizes.cumsum(0) - sizes
    wanted = digits.clamp(min=0)
    pick = (torch.rand(wanted.shape, generator=generator) * sizes[wanted]).long()
    return bank[members[starts[wanted] + pick]]


def _layers(scribbles: Tensor, cells: Tensor) -> Tensor:
    """Each digit alone on its canvas [N, D, C, C]."""
    flat = cells.flatten(0, 1)
    # Where each canvas pixel falls in its digit's cell, from −1 to 1; outside that, grid_sample reads no ink.
    pixel = torch.arange(CANVAS) + 0.5
    u = 2 * (pixel - flat[:, 0:1]) / flat[:, 2:3] - 1  # [N·D, C]
    v = 2 * (pixel - flat[:, 1:2]) / flat[:, 3:4] - 1
    grid = torch.stack((u[:, None, :].expand(-1, CANVAS, -1), v[:, :, None].expand(-1, -1, CANVAS)), dim=-1)
    layers = F.grid_sample(scribbles.flatten(0, 1).unsqueeze(1), grid, align_corners=False)
    return layers.view(*cells.shape[:2], CANVAS, CANVAS)


def tight_boxes(layers: Tensor) -> Tensor:
    """The smallest boxes [N, 4] that hold all pixels of a digit's ink, from layers [N, C, C]."""
    ink = layers > INK_THRESHOLD * layers.amax((1, 2), keepdim=True)
    columns, rows = ink.any(1).float(), ink.any(2).float()  # [N, C]
    low = torch.stack((columns.argmax(1), rows.argmax(1)), dim=1)
    high = CANVAS - torch.stack((columns.flip(1).argmax(1), rows.flip(1).argmax(1)), dim=1)
    return torch.cat((low, high), dim=1) / CANVAS


def uniform(shape: tuple[int, ...], bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(shape, generator=generator)
