"""What of a picture a model sees: its size after resizing, and whether the processor shows it the whole of it.

Boxes and rewards are measured in the picture. A processor that crops (LLaVA-1.5 as it is on the hub) shows the model a
part of it: an object at the edge may not change a single pixel. One that pads shows all of it, in another frame.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

Size = tuple[int, int]  # width, height


def seen_size(images: Any, size: Size) -> Size:
    """The size of a picture as the model sees it.

    After resizing for models that keep its shape (the Qwen-VL family: image_grid_thw patches); for all others the size
    as it is. Only the size matters.

    Args:
        images: the image processor, or None for a model that sees no pictures.
    """
    patch = getattr(images, "patch_size", None)
    if not isinstance(patch, int):
        return size
    grid = images(images=[Image.new("RGB", size)], return_tensors="pt").get("image_grid_thw")
    return size if grid is None else (int(grid[0, 2]) * patch, int(grid[0, 1]) * patch)


def cropped(images: Any, size: Size) -> str | None:
    """Which part of a picture of this size the model does not see, and the setting that helps; None: it sees all.

    Found by trying: some processors (LLaVA-NeXT) are set to crop and still show the whole picture.
    """
    if not getattr(images, "do_center_crop", None):
        return None
    blank, (right, bottom) = Image.new("RGB", size), (size[0] - 1, size[1] - 1)
    before = _first_view(images, blank)
    for corner in ((right, 0), (0, bottom)):  # upper and lower edge, left and right edge
        edges = blank.copy()
        for start, end in (((0, 0), corner), ((right, bottom), (right - corner[0], bottom - corner[1]))):
            ImageDraw.Draw(edges).line((*start, *end), "white", max(1, max(size) // 100))
        if torch.equal(before, _first_view(images, edges)):
            shape = dict(getattr(images, "crop_size", None) or {})
            setting = {"do_center_crop": False, "size": {name: shape.get(name) for name in ("height", "width")}}
            return (
                f"{type(images).__name__} crops a picture of {size[0]}×{size[1]} to its centre, and the model does not "
                f"see its edges; processor_options {json.dumps(setting)} shows all of it, resized to the shape that "
                "the model takes"
            )
    return None


def pads_to_square(images: Any, size: Size) -> bool:
    """Whether a picture of this size is seen as the middle of a square (LLaVA-1.5 as its authors run it)."""
    if size[0] == size[1] or not (getattr(images, "do_pad", None) and hasattr(images, "pad_to_square")):
        return False
    black, white = (_first_view(images, Image.new("RGB", size, colour)) for colour in ("black", "white"))
    return torch.equal(black[..., 0, 0], white[..., 0, 0])


def _first_view(images: Any, image: Image.Image) -> Tensor:
    return images(images=[image], return_tensors="pt")["pixel_values"][0]
