"""What a vision tower computes from the sizes of its images, computed with the batch, where nothing has to wait.

Towers that take images of any size (Qwen-VL) are given `image_grid_thw` [images, 3] and compute from it, in every
forward pass, where patches lie and which of them see each other. On a device they would read it back, in each of their
layers. transformers takes what they compute as keywords (`transformers.vision_utils`, under the prefix image_).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import vision_utils


@dataclass(frozen=True)
class HostInputs:
    """Keywords of a forward pass that stay on the CPU. No container, so that DDP does not look for tensors in it."""

    keywords: dict[str, Tensor]


@dataclass(frozen=True)
class VisionTower:
    """What is to be known of a tower, without its weights."""

    merge_size: int
    window: tuple[int, int] | None  # window size and patch size, where attention is windowed
    interpolation: dict[str, Any] | None  # of learned positions
    varlen: bool  # its attention takes the bounds of images on the device

    @staticmethod
    def of(core: Any) -> VisionTower | None:
        """None: a tower that is not known to take these keywords."""
        known = vars(sys.modules[type(core).__module__])
        if "accepts_precomputed_kwargs" not in known or "get_vision_attention_seqlens" not in known:
            return None
        tower = core.get_encoder(modality="image")
        if tower is core:  # a language model alone, in the file of one with a tower
            return None
        if hasattr(tower, "embeddings"):  # GLM-4V places its learned positions by sizes and bounds on the device
            return None
        window = interpolation = None
        if "get_vision_window_index" in known:
            window = (tower.window_size, tower.patch_size)
        if "get_vision_interpolation_indices_and_weights" in known:
            interpolation = {
                "num_grid_per_side": tower.num_grid_per_side,
                "mode": tower.interpolation_mode,
                "align_corners": tower.interpolation_align_corners,
            }
        varlen = tower.config._attn_implementation not in ("sdpa", "eager")
        return VisionTower(tower.spatial_merge_size, window, interpolation, varlen)

    def keywords(self, grid: Tensor) -> tuple[dict[str, Tensor], HostInputs]:
        """Of images of these sizes, int64 [images, 3] on the CPU: those for the device, and those that stay."""
        bounds = {"image_cu_seqlens": vision_utils.get_vision_cu_seqlens(grid)}
        places = {"image_position_ids": vision_utils.get_vision_position_ids(grid, self.merge_size)}
        if self.window is not None:
            places["image_window_index"], bounds["image_cu_window_seqlens"] = vision_utils.get_vision_window_index(
                grid, self.merge_size, *self.window
            )
        if self.interpolation is not None:
            found = vision_utils.get_vision_interpolation_indices_and_weights(
                grid, spatial_merge_size=self.merge_size, **self.interpolation
            )
            places["image_interp_indices"], places["image_interp_weights"] = found
        if self.varlen:
            return {**places, **bounds}, HostInputs({"image_grid_thw": grid})
        return places, HostInputs({"image_grid_thw": grid, **bounds})
