"""OCR: pages with a number of five to eight digits in two lines, and the request "read the digits".

Digits differ in size, spacing, height on the line and ink. The transcripts of supervised training are made in a hurry:
the fainter a digit, the more often it is left out, and some are taken for another.
"""

import torch
from torch import Tensor

from perpo.demo.digits import CANVAS, Pictures, draw, uniform

QUESTION = "read the digits"
DIGITS = (5, 8)  # of a number, at least and at most
LINES, LINE = 2, 4  # lines of a page, digits of a line at most
WIDTH, HEIGHT = (8.5, 11.5), (11.0, 18.0)  # of a digit's cell, pixels
INK = (0.3, 1.0)
FAINT, SLOPE, PASSED_OVER = 0.6, 0.08, 0.75  # ink that is passed over half as often as the faintest, which is 3 of 4
MISTAKEN = 0.05  # share of digits taken for another


def make_pages(count: int, split: str, seed: int) -> Pictures:
    """`count` pages from the digits of a split (`train`, `validation` or `test`); the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(DIGITS[0], DIGITS[1] + 1, (count, 1), generator=generator)
    place = torch.arange(LINES * LINE)
    line, column = place // LINE, place % LINE
    upper = (length + 1) // 2  # digits of the upper line
    there = column < torch.where(line == 0, upper, length - upper)  # [N, 8]
    digits = torch.randint(0, 10, there.shape, generator=generator).masked_fill(~there, -1)
    ink = uniform(there.shape, INK, generator) * there
    pictures = draw(digits, _layout(there, generator), ink, split, generator)
    # The digits to the front, in the order of reading.
    order = (~there).long().argsort(dim=1, stable=True)[:, : DIGITS[1]]
    boxes = pictures.boxes.gather(1, order[:, :, None].expand(-1, -1, 4))
    return Pictures(pictures.pixels, digits.gather(1, order), boxes, ink.gather(1, order))


def transcripts(pages: Pictures) -> list[str]:
    """What is written, line after line."""
    return ["".join(str(digit) for digit in row if digit >= 0) for row in pages.digits.tolist()]


def hasty_transcripts(pages: Pictures, seed: int) -> list[str]:
    """What somebody in a hurry takes down of it."""
    generator = torch.Generator().manual_seed(seed)
    shape = pages.digits.shape
    skipped = torch.rand(shape, generator=generator) < PASSED_OVER * torch.sigmoid((FAINT - pages.ink) / SLOPE)
    other = (pages.digits + torch.randint(1, 10, shape, generator=generator)) % 10
    mistaken = torch.rand(shape, generator=generator) < MISTAKEN
    kept = torch.where(mistaken, other, pages.digits).masked_fill(skipped | (pages.digits < 0), -1)
    return ["".join(str(digit) for digit in row if digit >= 0) for row in kept.tolist()]


def _layout(there: Tensor, generator: torch.Generator) -> Tensor:
    """Cells [N, LINES · LINE, 4]: each line's digits from left to right, the room left over shared out at random."""
    count = len(there)
    there = there.view(count, LINES, LINE)
    width = uniform(there.shape, WIDTH, generator) * there
    height = uniform(there.shape, HEIGHT, generator)
    gaps = torch.rand(count, LINES, LINE + 1, generator=generator) + 0.2
    gaps[:, :, :-1] *= there
    gaps = gaps / gaps.sum(2, keepdim=True) * (CANVAS - width.sum(2, keepdim=True))
    left = (gaps[:, :, :-1] + width).cumsum(2) - width
    band = CANVAS / LINES
    top = band * torch.arange(LINES)[:, None] + torch.rand(there.shape, generator=generator) * (band - height)
    return torch.stack((left, top, width.clamp(min=1), height), dim=-1).flatten(1, 2)
