"""Another flash attention in PyTorch's place: what is right passes, what is wrong is refused, before anything trains.

The kernels for CUDA are imitated on the CPU, as in `test_attention`; what is active is an imitation beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import attention as switch

from perpo.model import sharing
from perpo.prefix import attention, flash_attention, flash_impl
from tests.perpo.model.test_sharing import batches, built
from tests.perpo.prefix.test_attention import layout_of, tensors, varlen_backward, varlen_forward

Kernel = Callable[..., Any]


class Active:
    """PyTorch's switch, with one flash attention to be switched to."""

    def __init__(self, monkeypatch: Any, forward: Kernel = varlen_forward, backward: Kernel = varlen_backward) -> None:
        self.name: str | None = "FA4"
        self.calls = 0

        def pick(theirs: Kernel, own: Kernel) -> Kernel:
            def run(*args: Any, **kwargs: Any) -> Any:
                self.calls += self.name is not None
                return (own if self.name is None else theirs)(*args, **kwargs)

            return run

        monkeypatch.setattr(flash_attention, "_CUDA_FORWARD", pick(forward, varlen_forward))
        monkeypatch.setattr(flash_attention, "_CUDA_BACKWARD", pick(backward, varlen_backward))
        monkeypatch.setattr(flash_attention, "kernels_for", lambda query: flash_attention._Cuda())
        monkeypatch.setattr(switch, "current_flash_attention_impl", lambda: self.name)
        monkeypatch.setattr(switch, "restore_flash_attention_impl", lambda: setattr(self, "name", None))
        monkeypatch.setattr(switch, "activate_flash_attention_impl", lambda name: setattr(self, "name", name))


def in_bf16() -> tuple[Any, ...]:
    layout = layout_of([(5, [3, 2]), (7, [1, 4])])
    return layout, *(x.bfloat16() for x in tensors(layout, dim=16))


def base_two(*args: Any, **kwargs: Any) -> Any:
    out, lse, *rest = varlen_forward(*args, **kwargs)
    return out, lse / 0.6931, *rest


def tokens_first(*args: Any, **kwargs: Any) -> Any:
    out, lse, *rest = varlen_forward(*args, **kwargs)
    return out, lse.T.contiguous().view_as(lse), *rest


def unscaled(*args: Any, **kwargs: Any) -> Any:
    d_query, d_key, d_value = varlen_backward(*args, **kwargs)
    return d_query, d_key * 1.1, d_value


def of_old(*args: Any, **kwargs: Any) -> Any:
    raise ValueError("too many values to unpack (expected 2)")


def test_what_computes_the_same_passes_and_is_active_afterwards(monkeypatch: Any) -> None:
    active = Active(monkeypatch)
    layout, query, key, value = in_bf16()
    comparison = flash_impl.Comparison()
    state = torch.get_rng_state()
    with attention.flash_calls(comparison), torch.no_grad():
        for _ in range(3):
            attention.prefix_attention(query, key, value, layout)
    assert len(comparison.seen) == 1
    assert active.name == "FA4"
    assert active.calls == 3 * len(layout.parts) + 2 * len(layout.parts)  # forward of each, and one comparison
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("forward", "backward", "match"),
    [
        (base_two, varlen_backward, "the output is not what PyTorch's own kernel gives"),
        (tokens_first, varlen_backward, "the output is not what PyTorch's own kernel gives"),
        (varlen_forward, unscaled, "d key is not what PyTorch's own kernel gives"),
        (of_old, varlen_backward, "does not compute attention of .*ValueError: too many values to unpack"),
    ],
)
def test_what_computes_something_else_is_refused(
    forward: Kernel, backward: Kernel, match: str, monkeypatch: Any
) -> None:
    Active(monkeypatch, forward, backward)
    layout, query, key, value = in_bf16()
    with (
        attention.flash_calls(flash_impl.Comparison()),
        pytest.raises(ValueError, match=f"flash_attention_impl='FA4': .*{match}"),
    ):
        attention.prefix_attention(query, key, value, layout)
    assert attention._before_flash is None


def test_a_model_is_compared_with_separate_rows_on_pytorchs_own_kernels(monkeypatch: Any) -> None:
    model, processor, _ = built("llava")
    model.to(torch.bfloat16)
    sharing.prepare(model, "on")
    packed, separate = batches(model, processor)
    active = Active(monkeypatch)
    names: list[str | None] = []
    model.lm_head.register_forward_hook(lambda *_: names.append(active.name))
    sharing.check_exact(model, packed, separate)
    assert names == [None, "FA4"]
    assert active.calls
    active.calls, active.name = 0, None
    sharing.check_exact(model, packed, separate)
    assert not active.calls


def test_a_model_that_takes_no_flash_kernel_says_so(monkeypatch: Any, caplog: Any) -> None:
    model, processor, _ = built("llava")
    sharing.prepare(model, "on")
    packed, separate = batches(model, processor)
    Active(monkeypatch)
    monkeypatch.setattr(flash_attention, "supports", lambda query: False)
    monkeypatch.setattr(sharing.logger, "propagate", True)
    sharing.check_exact(model, packed, separate)
    assert "FA4 is the active flash attention, but LlavaForConditionalGeneration takes none" in caplog.text


def test_it_is_for_shared_prompts_on_a_gpu() -> None:
    with pytest.raises(ValueError, match="on a CUDA device, and this is a 'cpu' device; leave it out"):
        flash_impl.activate("FA4", torch.device("cpu"), shared=True)
    with pytest.raises(ValueError, match="on a CUDA device, and prompts are not shared here; leave it out"):
        flash_impl.activate("FA4", torch.device("cuda"), shared=False)
    with pytest.raises(ValueError, match=r"flash_attention_impl='FA5': .* Available implementations"):
        flash_impl.activate("FA5", torch.device("cuda"), shared=True)
    assert flash_impl.active() is None
