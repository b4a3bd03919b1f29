"""δ of BCO (arXiv 2404.04656): the mean of β·score over the best and the worst answers of all lists so far.

A step uses the mean of the steps before it, so every batch and rank of a step has the same δ, and nothing waits for it:
it is a tensor on the device from step to step.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

FILE = "reward_shift.json"


class RewardShift:
    """Attributes: value: fp32 [1], δ of the present step; 0 in the first, as the scores are of a new policy."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self, mean: float = 0.0, weight: float = 0.0) -> None:
        self.value = torch.full((1,), mean, dtype=torch.float32, device=self.device)
        self.weight = torch.full((1,), weight, dtype=torch.float32, device=self.device)  # of how many answers it is
        self.pending = torch.zeros(2, dtype=torch.float32, device=self.device)

    def add(self, rewards: Tensor, weight: Tensor) -> None:
        """Take in a batch: Σ β·score over `weight` answers."""
        self.pending = self.pending + torch.stack([rewards, weight])

    def update(self, accelerator: Accelerator) -> None:
        """Between two steps. Every rank must call it."""
        total, weight = accelerator.reduce(self.pending, "sum")
        self.pending = torch.zeros_like(self.pending)
        self.weight = self.weight + weight
        self.value = self.value + (total - weight * self.value) / self.weight.where(self.weight > 0, 1.0)

    def save(self, folder: Path) -> None:
        state = {"mean": self.value.item(), "weight": self.weight.item()}
        (folder / FILE).write_text(json.dumps(state), encoding="utf-8")

    def load(self, checkpoint: Path) -> None:
        """Raises:
        ValueError: the checkpoint holds none."""
        try:
            self.reset(**json.loads((checkpoint / FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"resume_from_checkpoint: {checkpoint / FILE}, the reward shift of this objective, cannot be read "
                f"({error}); resume from another checkpoint"
            ) from error
