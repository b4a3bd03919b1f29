"""Scenes of real handwritten digits, each with a question ("where is the 7?") and the exact box that answers it.

The digits are the 1797 of scikit-learn's `load_digits`, 8 × 8 pixels each, written by people. A scene is a 48 × 48
canvas with three digits of different classes, each stretched to its own width and height and put in its own place,
with its own ink, over a background of noise. One of them is asked for; the others distract. The exact box is read off
the asked digit's own ink.

Splits are apart by *digit*: no scribble of the validation or test split is ever seen in training.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CANVAS = 48  # pixels a side
DIGITS_PER_SCENE = 3
SIZE = (12, 22)  # height of a digit's 8 × 8 cell on the canvas, pixels
ASPECT = (0.8, 1.25)  # width of the cell / height
INK = (0.6, 1.0)
NOISE = 0.08  # standard deviation of the background
INK_THRESHOLD = 0.25  # share of a digit's strongest ink from which a pixel belongs to the digit
LOOSENESS, SLIP = 0.4, 0.05  # of coarse boxes, as shares of the box's size
LAYOUTS_TRIED = 8  # random layouts a scene, of which the one with the least overlap is taken


@dataclass(frozen=True)
class Scenes:
    images: Tensor  # [N, 1, CANVAS, CANVAS] in 0–1
    digits: Tensor  # [N, D] int64, the digits of each scene, all different
    all_boxes: Tensor  # [N, D, 4] x1, y1, x2, y2 in fractions of the canvas, tight around each digit's ink

    @property
    def asked(self) -> Tensor:
        """The digit [N] that the question asks for."""
        return self.digits[:, 0]

    @property
    def boxes(self) -> Tensor:
        """The exact box [N, 4] of the digit that the question asks for."""
        return self.all_boxes[:, 0]

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: slice | Tensor) -> "Scenes":
        return Scenes(self.images[index], self.digits[index], self.all_boxes[index])


def make_scenes(count: int, split: str, seed: int) -> Scenes:
    """`count` scenes from the digits of a split (`train`, `validation` or `test`); the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    parts = [_compose(min(1024, count - start), split, generator) for start in range(0, count, 1024)]
    return Scenes(*(torch.cat([getattr(part, name) for part in parts]) for name in ("images", "digits", "all_boxes")))


def coarse_boxes(boxes: Tensor, seed: int) -> Tensor:
    """Boxes [..., 4] as cheap annotation draws them: loose, by as much as the annotator happens to be, and unsteady.

    Each box is padded on all sides by a share u ~ U(0, LOOSENESS) of its size; each side then slips by N(0, SLIP).
    """
    generator = torch.Generator().manual_seed(seed)
    size = boxes[..., 2:] - boxes[..., :2]
    size = torch.cat((size, size), dim=-1)
    outward = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    padding = LOOSENESS * torch.rand(*boxes.shape[:-1], 1, generator=generator)
    slip = SLIP * torch.randn(boxes.shape, generator=generator)
    return (boxes + size * (padding * outward + slip)).clamp(0, 1)


@cache
def digit_bank(split: str) -> tuple[Tensor, Tensor]:
    """Images [M, 8, 8] in 0–1 and classes [M] of a split's digits: seven tenths train, one validation, two test."""
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    digits = load_digits()
    tenth = np.arange(len(digits.target)) % 10
    chosen = {"train": tenth < 7, "validation": tenth == 7, "test": tenth > 7}[split]
    images = torch.from_numpy(digits.images[chosen] / 16.0).float()
    return images, torch.from_numpy(digits.target[chosen]).long()


def _compose(count: int, split: str, generator: torch.Generator) -> Scenes:
    layers, classes = _digit_layers(count, split, generator)  # [N, D, C, C], [N, D]
    ink = _uniform((count, DIGITS_PER_SCENE, 1, 1), INK, generator)
    noise = NOISE * torch.randn(count, CANVAS, CANVAS, generator=generator)
    images = ((layers * ink).amax(1) + noise).clamp(0, 1).unsqueeze(1)
    boxes = tight_boxes(layers.flatten(0, 1)).view(count, DIGITS_PER_SCENE, 4)
    return Scenes(images, classes, boxes)


def _digit_layers(count: int, split: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each digit of each scene alone on its canvas [N, D, C, C], and its class [N, D]. The first is the asked one."""
    bank, bank_classes = digit_bank(split)
    classes = torch.rand(count, 10, generator=generator).argsort(1)[:, :DIGITS_PER_SCENE]
    # A random member of each class: the class's members lie side by side in `members`, from `starts` on.
    members = bank_classes.argsort(stable=True)
    sizes = torch.bincount(bank_classes, minlength=10)
    starts = sizes.cumsum(0) - sizes
    pick = (torch.rand(classes.shape, generator=generator) * sizes[classes]).long()
    sprites = bank[members[starts[classes] + pick]]  # [N, D, 8, 8]

    cells = _layout(count, generator)  # [N, D, 4] x, y, width, height in pixels
    flat = cells.flatten(0, 1)
    # Where each canvas pixel falls in its digit's cell, from −1 to 1; outside that, grid_sample reads no ink.
    pixel = torch.arange(CANVAS) + 0.5
    u = 2 * (pixel - flat[:, 0:1]) / flat[:, 2:3] - 1  # [N·D, C]
    v = 2 * (pixel - flat[:, 1:2]) / flat[:, 3:4] - 1
    grid = torch.stack((u[:, None, :].expand(-1, CANVAS, -1), v[:, :, None].expand(-1, -1, CANVAS)), dim=-1)
    layers = F.grid_sample(sprites.flatten(0, 1).unsqueeze(1), grid, align_corners=False)
    return layers.view(count, DIGITS_PER_SCENE, CANVAS, CANVAS), classes


def _layout(count: int, generator: torch.Generator) -> Tensor:
    """Cells [N, D, 4] inside the canvas: of a few random layouts, the one whose cells overlap least."""
    shape = (count, LAYOUTS_TRIED, DIGITS_PER_SCENE)
    height = _uniform(shape, SIZE, generator)
    width = height * _uniform(shape, ASPECT, generator)
    size = torch.stack((width, height), dim=-1)  # [N, L, D, 2]
    low = torch.rand(*shape, 2, generator=generator) * (CANVAS - size)
    high = low + size
    common = torch.minimum(high[:, :, :, None], high[:, :, None]) - torch.maximum(low[:, :, :, None], low[:, :, None])
    overlap = common.clamp(min=0).prod(-1).sum((2, 3)) - size.prod(-1).sum(2)  # [N, L], a cell's own area taken off
    best = overlap.argmin(1)
    return torch.cat((low, size), dim=-1)[torch.arange(count), best]


def tight_boxes(layers: Tensor) -> Tensor:
    """The smallest boxes [N, 4] that hold all pixels of a digit's ink, from layers [N, C, C]."""
    ink = layers > INK_THRESHOLD * layers.amax((1, 2), keepdim=True)
    columns, rows = ink.any(1).float(), ink.any(2).float()  # [N, C]
    low = torch.stack((columns.argmax(1), rows.argmax(1)), dim=1)
    high = CANVAS - torch.stack((columns.flip(1).argmax(1), rows.flip(1).argmax(1)), dim=1)
    return torch.cat((low, high), dim=1) / CANVAS


def _uniform(shape: tuple[int, ...], bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(shape, generator=generator)
