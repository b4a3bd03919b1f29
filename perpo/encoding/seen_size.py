"""The size of a picture as the model sees it, which boxes in pixels are measured in."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from PIL import Image

Size = tuple[int, int]  # width, height


def seen_sizes(processor: Any) -> Callable[[Size], Size]:
    """A function from a picture's size to its size after resizing, for models that keep its shape (the Qwen-VL family:
    image_grid_thw patches); for all others the size as it is. It goes by the size alone, and remembers those it saw."""
    images: Any = getattr(processor, "image_processor", None)
    patch = getattr(images, "patch_size", None)

    @lru_cache(maxsize=65536)
    def seen(size: Size) -> Size:
        if not isinstance(patch, int):
            return size
        grid = images(images=[Image.new("RGB", size)], return_tensors="pt").get("image_grid_thw")
        return size if grid is None else (int(grid[0, 2]) * patch, int(grid[0, 1]) * patch)

    return seen
