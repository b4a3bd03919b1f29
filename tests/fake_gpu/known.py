"""A fake GPU that knows what came from the host: a model with images runs to its end, and where it waits is noted.

What a model reads back from the device is which tokens are an image's and how large images are, which
came from the host. What is computed from that alone is computed beside the fake tensors, so that a wait gives what it
would give, and a note.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from tests.fake_gpu.device import FakeGpu

ROOT = Path(__file__).parents[2]
_SKIPPED = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")  # a wait is its caller's
# Their result, or its size, is known only when the device has come so far.
WAITING = {"_local_scalar_dense", "equal", "masked_select", "nonzero", "_unique2", "unique_consecutive", "unique_dim"}


def place() -> str:
    """File and function of the innermost code that is neither PyTorch's nor of these tests; of ours with its path."""
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_SKIPPED) or frame.f_code.co_name.startswith("<"):
        if frame.f_back is None:
            return "the backward pass"
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    ours = path.is_relative_to(ROOT / "perpo") or path.is_relative_to(ROOT / "perpo_kernels")
    return f"{path.relative_to(ROOT) if ours else path.name}: {frame.f_code.co_name}"


_UNKNOWN = ("empty", "new_empty", "rand")  # weights, above all


class KnowingGpu(FakeGpu):
    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []  # "what in file: function"
        self._known: Any = WeakIdKeyDictionary()  # fake tensors -> what they hold

    def clear(self) -> None:
        super().clear()
        self.waits.clear()

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func.overloadpacket.__name__
        wait = name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None)
        if name in ("index", "index_put", "index_put_"):
            masks = [i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]]
            if any(masks):
                self.waits.append(f"{name} by a mask in {place()}")
                args = (args[0], self._places(args[1]), *args[2:])
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = all(not isinstance(x, FakeTensor) or x in self._known for x in given)
        if not known or name.startswith(_UNKNOWN):
            return super()._run(func, args, kwargs)
        real_args, real_kwargs = tree_map_only(FakeTensor, self._known.__getitem__, (args, kwargs))
        with unset_fake_temporarily():
            real = func(*real_args, **{**real_kwargs, **({"device": "cpu"} if "device" in kwargs else {})})
        if wait:
            self.waits.append(f"{name} in {place()}")
            return tree_map_only(Tensor, self._on_device, real)
        out = super()._run(func, args, kwargs)
        for x, value in zip(tree_leaves(out), tree_leaves(real), strict=True):
            if isinstance(x, FakeTensor):
                self._known[x] = value
        return out

    def _on_device(self, real: Tensor) -> Tensor:
        with self.mode:
            out = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device="cuda")
        self._known[out] = real
        return out

    def _places(self, indices: Any) -> list[Any]:
        """Boolean indices as the integers that they stand for."""
        found: list[Any] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                found.append(index)
                continue
            real = self._known[index] if isinstance(index, FakeTensor) else index
            with unset_fake_temporarily():
                places = real.nonzero().unbind(1)
            found += [self._on_device(x) for x in places]
        return found
