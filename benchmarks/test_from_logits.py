"""For a trainer that already holds the logits: how close is the list loss to reading them once?

Hypothesis. Forward is one read of the logits; forward and backward are two reads and one write (into the logits
themselves with `inplace_backward`). Nothing but memory bandwidth shows; sums over sequences and the list loss are a few
kilobytes.

What is timed is what a user does: log-probs of tokens, their sum for each sequence, the list loss and, for
forward+backward, the gradient of the logits. Ours are `token_log_probs` and `perpo_loss`; a peer's log-probs are
followed by the list loss in vectorised PyTorch.

Floor. Bytes over the bandwidth of a copy of the same buffer, measured in the same round: a copy reads and writes
2 · T · V · itemsize, so forward's floor is half of a copy and forward + backward's is one and a half. It is timed
as such: copying half the rows, or one and a half times them.

Shapes. As test_linear_loss, logits [T, V]; on the CPU fp32, where the exponentials and not the bytes are the limit, so
that the floor is further away. The logits are drawn anew before every sample: some peers write their gradient over
them. On a GPU, ours and plain PyTorch are also replayed from a CUDA graph at the smallest T, where launches are most of
what a caller waits for.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import perpo_kernels as pk
from benchmarks import peers
from benchmarks.harness import FLOOR, OURS, Case
from benchmarks.problems import HeadShape, ListShape, Setting, shapes

ListLoss = Callable[[Tensor, Tensor], Tensor]


def composed(fn: Callable[..., Tensor], list_loss: Callable[..., Tensor], lists: ListShape, device: str) -> ListLoss:
    """loss(logits, labels): sums of `fn`'s log-probs over sequences, then the list loss."""
    rewards = torch.rand(lists.n_lists, lists.k, device=device)
    ref = -lists.n_response * (10 + torch.rand(lists.n_lists, lists.k, device=device))

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        sequences = fn(logits, labels).view(lists.n_lists, lists.k, -1).sum(-1, dtype=torch.float32)
        return list_loss(sequences, rewards, ref)

    return loss


def timed(loss: ListLoss, logits: Tensor, labels: Tensor, backward: bool) -> Callable[[], object]:
    def run() -> object:
        if not backward:
            with torch.no_grad():
                return loss(logits, labels)
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf, labels), leaf)

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
def test_from_logits(
    benchmark: Any, compare: Any, setting: Setting, head: HeadShape, lists: ListShape, backward: bool
) -> None:
    logits = torch.empty(lists.n_tokens, head.n_vocab, device=setting.device, dtype=setting.dtype)
    labels = torch.randint(head.n_vocab, (lists.n_tokens,), device=setting.device)
    fresh = logits.normal_

    def case(name: str, fn: Callable[..., Tensor], list_loss: Callable[..., Tensor], **options: Any) -> Case:
        loss = composed(fn, list_loss, lists, setting.device)
        return Case(name, timed(loss, logits, labels, backward), prepare=fresh, **options)

    def inplace(logits: Tensor, labels: Tensor) -> Tensor:
        return pk.token_log_probs(logits, labels, inplace_backward=True)

    cases = [case(OURS, pk.token_log_probs, pk.perpo_loss)]
    if backward:
        cases.append(case(f"{OURS} in place", inplace, pk.perpo_loss))
    cases.append(Case(FLOOR, copy_of(logits, 1.5 if backward else 0.5), prepare=fresh))
    if setting.device == "cuda" and lists == setting.lists[0]:
        cases.append(case(f"{OURS}, graph", pk.token_log_probs, pk.perpo_loss, graph=True))
        cases.append(
            case("plain PyTorch, graph", peers.plain_token_log_probs, peers.plain_list_loss, graph=True),
        )
    chosen = setting.heads[len(setting.heads) // 2], setting.lists[len(setting.lists) // 2]
    measured = f"measured at {chosen[0].name} T{chosen[1].n_tokens}"
    for peer in peers.for_task("token_log_probs"):
        if peer.name.endswith("in place") and not backward:
            continue
        fn, reason = peers.load(peer, setting.device)
        reason = reason or peers.compiles_elsewhere(peer, setting.size, (head, lists) == chosen, measured)
        remarks = peers.remarks_on(peer, setting.device)
        if fn is None or reason:
            cases.append(Case(peer.name, lambda: None, problem=reason, extra=remarks))
        else:
            cases.append(case(peer.name, fn, peers.plain_list_loss, risky=peer.risky, extra=remarks))
    what = "forward+backward" if backward else "forward"
    compare("from_logits", f"{what} {head.name} T{lists.n_tokens}", cases, shapes(head, lists))
