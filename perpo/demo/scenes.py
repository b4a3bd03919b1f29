"""Grounding: scenes of three digits, and the question "where is the 7?".

The digits of a scene are all different, so the question has one answer: the exact box of that digit's ink. The boxes of
supervised training are cheap annotation, loose and unsteady.
"""

import torch
from torch import Tensor

from perpo.demo.digits import CANVAS, Pictures, draw, uniform

DIGITS = 3  # a scene; the question asks for the first of them
SIZE = (12, 22)  # height of a digit's cell, pixels
ASPECT = (0.8, 1.25)  # width of the cell / height
INK = (0.6, 1.0)
LOOSENESS, SLIP = 0.4, 0.05  # of coarse boxes, as shares of the box's size
LAYOUTS_TRIED = 8  # random layouts a scene, of which the one with the least overlap is taken


def make_scenes(count: int, split: str, seed: int) -> Pictures:
    """`count` scenes from the digits of a split (`train`, `validation` or `test`); the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    digits = torch.rand(count, 10, generator=generator).argsort(1)[:, :DIGITS]
    cells = _layout(count, generator)
    return draw(digits, cells, uniform((count, DIGITS), INK, generator), split, generator)


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


def question(digit: int) -> str:
    return f"where is the {digit}?"


def box_text(box: list[float]) -> str:
    """A box as LLaVA writes it, to hundredths: [0.12, 0.34, 0.56, 0.78]."""
    return "[" + ", ".join(f"{side:.2f}" for side in box) + "]"


def _layout(count: int, generator: torch.Generator) -> Tensor:
    """Cells [N, D, 4] inside the canvas: of a few random layouts, the one whose cells overlap least."""
    shape = (count, LAYOUTS_TRIED, DIGITS)
    height = uniform(shape, SIZE, generator)
    width = height * uniform(shape, ASPECT, generator)
    size = torch.stack((width, height), dim=-1)  # [N, L, D, 2]
    low = torch.rand(*shape, 2, generator=generator) * (CANVAS - size)
    high = low + size
    common = torch.minimum(high[:, :, :, None], high[:, :, None]) - torch.maximum(low[:, :, :, None], low[:, :, None])
    overlap = common.clamp(min=0).prod(-1).sum((2, 3)) - size.prod(-1).sum(2)  # [N, L], a cell's own area taken off
    best = overlap.argmin(1)
    return torch.cat((low, size), dim=-1)[torch.arange(count), best]
