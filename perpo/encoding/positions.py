"""Position ids of a prompt and of its answers, and which tokens of a prompt see each other."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from perpo.encoding.vision import HostInputs, VisionTower
from perpo.prefix.layout import Range

# Model types whose prompts are not purely causal: the value of token_type_ids whose runs see each other.
_SEE_EACH_OTHER = {"gemma3": 1, "paligemma": 0}


class PromptPositions:
    """Position ids of a model's prompts, and which of their tokens see each other.

    Can be sent to the workers of a data loader: it keeps the model's config and methods, not its weights.
    """

    def __init__(self, core: Any) -> None:
        self.model_type: str = core.config.model_type
        self.tower = VisionTower.of(core)
        self.body: Any = None  # of the Qwen-VL family: computes three positions per token
        if hasattr(core.base_model, "get_rope_index"):
            kind: Any = type(core.base_model)
            self.body = kind.__new__(kind)
            nn.Module.__init__(self.body)
            self.body.config = core.base_model.config
            self._arguments = tuple(inspect.signature(self.body.get_rope_index).parameters)

    def positions(self, prompt: dict[str, Tensor], longest: int) -> tuple[Tensor, Tensor]:
        """Of a prompt of P tokens and `longest` tokens after it: int64 [P] and [longest], or both with 3 rows."""
        n_prompt = prompt["input_ids"].shape[1]
        first = 1 if self.model_type == "paligemma" else 0
        if self.body is None:
            return torch.arange(first, first + n_prompt), torch.arange(first + n_prompt, first + n_prompt + longest)
        if any(name.endswith("grid_thw") for name in prompt):
            known = {name: prompt[name] for name in self._arguments if name in prompt}
            places = self.body.get_rope_index(**known)[0][:, 0]  # [3, P]
        else:
            places = torch.arange(n_prompt).expand(3, -1)
        following = places.max() + 1 + torch.arange(longest)  # not P: an image takes fewer positions than tokens
        return places, following.expand(3, -1)

    def without_waits(self, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], HostInputs | None]:
        """A packed row's inputs with what the vision tower would compute from the sizes of its images."""
        if self.tower is None or "image_grid_thw" not in inputs:
            return inputs, None
        places, host = self.tower.keywords(inputs["image_grid_thw"])
        return {**{name: x for name, x in inputs.items() if name != "image_grid_thw"}, **places}, host

    def blocks(self, prompt: dict[str, Tensor]) -> list[Range]:
        """Runs of tokens that all see each other."""
        value = _SEE_EACH_OTHER.get(self.model_type)
        if value is None or "token_type_ids" not in prompt:
            return []
        inside = [False, *(prompt["token_type_ids"][0] == value).tolist(), False]
        edges = [i for i, (a, b) in enumerate(pairwise(inside)) if a != b]
        return list(zip(edges[::2], edges[1::2], strict=True))
