"""Device memory of a training step, counted: every storage on CUDA while it lives, as large as the allocator makes it.

Not counted is what no tensor shows: workspaces inside operators (flash attention, cuBLAS), the CUDA context, and
memory lost between blocks.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.fake_gpu.device import FakeGpu

BLOCK = 512  # bytes; sizes are rounded up to a multiple


class StorageCount(FakeGpu):
    """Bytes in storages on CUDA, now and at their peak since `reset`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def reset(self) -> None:
        self.peak = self.now

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.device.type == "cuda":
                self._add(x.untyped_storage())

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._sizes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
