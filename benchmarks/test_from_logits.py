"""For a trainer that already holds the logits: how close are token log-probs to reading them once?

Hypothesis. Forward is one read of the logits; forward and backward are two reads and one write (into the logits
themselves with `inplace_backward`). Nothing but memory bandwidth shows.

Floor. Bytes over the bandwidth of a copy of the same buffer, measured in the same round: a copy reads and writes
2 · T · V · itemsize, so forward's floor is half of a copy and forward + backward's is one and a half. It is timed
as such: copying half the rows, or one and a half times them.

Shapes. As test_linear_loss, logits [T, V]; on the CPU fp32, where the exponentials and not the bytes are the
limit, so that the floor is further away. The logits are drawn anew before every sample: some peers write their
gradient over them.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import perpo_kernels as pk
from benchmarks import peers
from benchmarks.harness import FLOOR, OURS, Case
from benchmarks.problems import Head, Lists, Setting, shapes


def timed(
    fn: Callable[..., Tensor], logits: Tensor, labels: Tensor, weights: Tensor, backward: bool
) -> Callable[[], object]:
    """The log-probs, and for `backward` the gradient of Σ weights · log-probs, as a list loss asks for."""

    def run() -> object:
        if not backward:
            with torch.no_grad():
                return fn(logits, labels)
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad((fn(leaf, labels) * weights).sum(), leaf)

    return run


def copy_of(logits: Tensor, share: float) -> Callable[[], object]:
    """A copy of `share` of the rows, into a buffer that is there already."""
    whole, rest = int(share), round((share - int(share)) * logits.shape[0])
    target = torch.empty_like(logits if whole else logits[:rest])

    def run() -> None:
        for _ in range(whole):
            target.copy_(logits)
        if rest:
            target[:rest].copy_(logits[:rest])

    return run


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_from_logits(benchmark: Any, compare: Any, setting: Setting, head: Head, lists: Lists, backward: bool) -> None:
    logits = torch.empty(lists.n_tokens, head.n_vocab, device=setting.device, dtype=setting.dtype)
    labels = torch.randint(head.n_vocab, (lists.n_tokens,), device=setting.device)
    weights = torch.randn(lists.n_tokens, device=setting.device)

    def case(name: str, fn: Callable[..., Tensor]) -> Case:
        return Case(name, timed(fn, logits, labels, weights, backward), prepare=logits.normal_)

    def inplace(logits: Tensor, labels: Tensor) -> Tensor:
        return pk.token_log_probs(logits, labels, inplace_backward=True)

    cases = [case(OURS, pk.token_log_probs)]
    if backward:
        cases.append(case(f"{OURS} in place", inplace))
    cases.append(Case(FLOOR, copy_of(logits, 1.5 if backward else 0.5), prepare=logits.normal_))
    compiles_here = setting.size != "tiny" and lists == setting.lists[len(setting.lists) // 2]
    for peer in peers.for_task("token_log_probs"):
        if peer.slow_start and not compiles_here:
            continue
        fn, reason = peers.load(peer, setting.device)
        cases.append(case(peer.name, fn) if fn else Case(peer.name, lambda: None, problem=reason))
    what = "forward+backward" if backward else "forward"
    compare("from_logits", f"{what} {head.name} T{lists.n_tokens}", cases, shapes(head, lists))
