"""What of a picture a model sees: its size after resizing, and whether the processor shows it the whole of it.

Boxes and rewards are measured in the picture. A processor that crops (LLaVA-1.5 as it is on the hub) or pads shows the
model another frame: an object at the edge may not change a single pixel.
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


def frame_problem(images: Any, size: Size) -> str | None:
    """Why the model does not see a picture of this size as it is, and the setting that helps; None: it does.

    Found by trying: some processors (LLaVA-NeXT) are set to crop, and show the whole picture all the same.
    """
    pads = getattr(images, "do_pad", None) and hasattr(images, "pad_to_square") and size[0] != size[1]
    if pads and torch.equal(*(_first_view(images, Image.new("RGB", size, c))[..., 0, 0] for c in ("black", "white"))):
        return f"{_words(images, size, 'pads', 'to a square')}, and the model sees another frame; {_advice(images)}"
    if not getattr(images, "do_center_crop", None):
        return None
    blank, (right, bottom) = Image.new("RGB", size), (size[0] - 1, size[1] - 1)
    before = _first_view(images, blank)
    for corner in ((right, 0), (0, bottom)):  # upper and lower edge, left and right edge
        edges = blank.copy()
        for start, end in (((0, 0), corner), ((right, bottom), (right - corner[0], bottom - corner[1]))):
            ImageDraw.Draw(edges).line((*start, *end), "white", max(1, max(size) // 100))
        if torch.equal(before, _first_view(images, edges)):
            return (
                f"{_words(images, size, 'crops', 'to its centre')}, and the model does not see its edges; "
                f"{_advice(images)}"
            )
    return None


def _first_view(images: Any, image: Image.Image) -> Tensor:
    return images(images=[image], return_tensors="pt")["pixel_values"][0]


def _words(images: Any, size: Size, verb: str, how: str) -> str:
    return f"{type(images).__name__} {verb} a picture of {size[0]}×{size[1]} {how}"


def _advice(images: Any) -> str:
    """The settings that resize a picture to the shape that the model takes, whatever its own."""
    shape = dict(getattr(images, "crop_size", None) or getattr(images, "size", None) or {})
    square = {name: shape.get(name) for name in ("height", "width")}
    setting: dict[str, Any] = {"do_center_crop": False, "size": square}
    if getattr(images, "do_pad", None):
        setting["do_pad"] = False
    return f"processor_options {json.dumps(setting)} shows all of it, resized to the shape that the model takes"
