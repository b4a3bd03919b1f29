"""A step on packed rows reads nothing back from the device. Told on a CPU, by the operations that would."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._library.custom_ops import _maybe_get_opdef
from torch.utils._python_dispatch import TorchDispatchMode

from perpo.model import sharing
from perpo.model.language_head import accept_rows, perpo_output
from perpo.prefix.layout import PrefixLayout
from perpo.training.metrics import ListMetrics
from perpo_kernels import checks
from tests.perpo import tiny_models
from tests.perpo.model.test_sharing import batches

ROOT = Path(__file__).parents[3]
OURS = (str(ROOT / "perpo"), str(ROOT / "perpo_kernels"), __file__)
FOR_A_CPU = str(ROOT / "perpo_kernels" / "backends" / "eager")  # on a GPU there is the Triton backend
TORCH = str(Path(torch.__file__).parent)

# Their result, or its size, is known only when the device has come so far.
WAITING = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
}


class Waits(TorchDispatchMode):
    """Notes what waits, if the innermost code that is not PyTorch's is ours: transformers' own checks are not."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        lengths = name == "repeat_interleave" and kwargs and kwargs.get("output_size") is not None
        if by_mask or (name in WAITING and not lengths):
            frame: Any = sys._getframe(1)
            while frame.f_back is not None and frame.f_code.co_filename.startswith((TORCH, "<")):
                frame = frame.f_back
            where = frame.f_code
            if where.co_filename.startswith(OURS) and not where.co_filename.startswith(FOR_A_CPU):
                self.found.append(f"{name} in {where.co_filename}:{frame.f_lineno} {where.co_name}")
        if func.namespace != "perpo_kernels":
            return func(*args, **(kwargs or {}))
        definition: Any = _maybe_get_opdef(func)
        with self:  # into operators of our own
            return definition._init_fn(*args, **(kwargs or {}))


@contextmanager
def waits() -> Iterator[list[str]]:
    with Waits() as mode:
        yield mode.found


@pytest.mark.parametrize("what", ["item", "nonzero", "mask", "lengths"])
def test_what_waits_is_found(what: str) -> None:
    x = torch.tensor([1, 0, 2])
    with waits() as found:
        if what == "item":
            x[0].item()
        elif what == "nonzero":
            x.nonzero()
        elif what == "mask":
            x[x > 0]
        else:
            x.repeat_interleave(x)
    assert found


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "gemma2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_waits_for_nothing_of_ours(family: str, checkpointing: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(checks, "values_are_checked", lambda x: False)  # as on a device: checks are for a CPU
    model, processor = tiny_models.build(family)
    if family == "gemma2":
        model.set_attn_implementation("eager")
    packed, _ = batches(model, processor, text_only=family == "gemma2")
    packed.rewards = torch.linspace(0, 1, len(packed.rewards))
    sharing.prepare(model, "on")
    accept_rows(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert isinstance(packed.layout, PrefixLayout)
    with waits() as found:
        output = model(**packed.keywords, head_call=lambda hidden, head: perpo_output(hidden, head, packed))
        output.loss.backward()
        ListMetrics().add(packed, output)
    assert not found, "\n".join(found)
