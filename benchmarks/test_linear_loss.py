"""What does the list loss cost from hidden states, beyond the matrix products that nobody can avoid?

Hypothesis. ∂log p/∂logits does not depend on the loss, so a frozen head needs two GEMMs of T × V × H for forward
and backward together, a trainable head three, a reference pass (no_grad) one; the row kernel between them is
small beside the GEMMs. On the CPU: the frozen head within 1.10 of its two bare GEMMs and no slower than plain
PyTorch.

Floor. The one, two or three bare GEMMs, the whole batch at once (chunking is ours to pay for), into buffers that
are there already: Z = X Wᵀ, U = Z W, dW = Zᵀ X. Beside it the same products into new buffers: on a CPU the pages
of a new buffer cost a fault each, which every function that allocates pays.

Shapes. `benchmarks.problems`: LLaVA-1.5 (small vocabulary), Qwen2.5-VL (large), Gemma-3 (largest) and T from 500 (one
grounding list of 20) to 16000 (OCR pages), bf16; on the CPU T 1600, H 1024, V 32000, k 20, fp32.

Peers give log-probs of tokens; the list loss on top is plain PyTorch's. quack gives only a sum: its time is
without one.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import perpo_kernels as pk
from benchmarks import peers
from benchmarks.harness import FLOOR, OURS, Case
from benchmarks.problems import Head, Lists, Problem, Setting, problem, shapes


def ours(p: Problem, grad: bool) -> Callable[[], object]:
    wanted = [x for x in (p.hidden, p.weight) if x.requires_grad]

    def run() -> object:
        with torch.set_grad_enabled(grad):
            out = pk.linear_perpo_loss(
                p.hidden,
                p.weight,
                p.labels,
                p.rewards,
                cu_seqlens=p.cu_seqlens,
                cu_lists=p.cu_lists,
                ref_log_probs=p.ref_log_probs,
            )
            return torch.autograd.grad(out.loss, wanted) if grad else out

    return run


def theirs(peer: peers.Peer, p: Problem, grad: bool) -> Case:
    fn, reason = peers.load(peer, p.hidden.device.type)
    if fn is None:
        return Case(peer.name, run=lambda: None, problem=reason)
    wanted = [x for x in (p.hidden, p.weight) if x.requires_grad]

    def run() -> object:
        with torch.set_grad_enabled(grad):
            value = fn(p.hidden, p.weight, p.labels)
            loss = value if peer.sums else peers.list_loss_of_tokens(value, p)
            return torch.autograd.grad(loss, wanted) if grad else loss

    return Case(peer.name, run, extra={"note": "cross-entropy, no list loss"} if peer.sums else {})


def bare_gemms(p: Problem, n_gemms: int) -> list[Case]:
    """The floor, and the same products into buffers that are new each time, as any function has to make them."""
    x, w = p.hidden.detach(), p.weight.detach()
    z = x.new_empty(x.shape[0], w.shape[0])
    u, dw = torch.empty_like(x), torch.empty_like(w) if n_gemms > 2 else None

    def into_buffers() -> None:
        torch.mm(x, w.t(), out=z)
        if n_gemms > 1:
            torch.mm(z, w, out=u)
        if dw is not None:
            torch.mm(z.t(), x, out=dw)

    def allocating() -> list[Tensor]:
        logits = x @ w.t()
        results = [logits @ w] if n_gemms > 1 else []
        return [*results, logits.t() @ x] if n_gemms > 2 else results

    return [Case(FLOOR, into_buffers), Case("bare GEMMs, new buffers", allocating)]


MODES = {"reference": (1, False, False), "frozen": (2, True, False), "trainable": (3, True, True)}


@pytest.mark.parametrize("mode", MODES)
def test_linear_loss(benchmark: Any, compare: Any, setting: Setting, head: Head, lists: Lists, mode: str) -> None:
    n_gemms, grad, trainable = MODES[mode]
    p = problem(head, lists, setting, trainable)
    cases = [Case(OURS, ours(p, grad)), *bare_gemms(p, n_gemms)]
    compiles_here = setting.size != "tiny" and mode == "frozen" and lists == setting.lists[len(setting.lists) // 2]
    for peer in peers.for_task("linear_log_probs"):
        if not peer.slow_start or compiles_here:
            cases.append(theirs(peer, p, grad))
    compare("linear_loss", f"{mode} {head.name} T{lists.n_tokens}", cases, {**shapes(head, lists), "head": mode})


@pytest.mark.parametrize("mode", ["frozen", "trainable"])
def test_pairs_against_liger_dpo(benchmark: Any, compare: Any, setting: Setting, head: Head, mode: str) -> None:
    """k = 2, where the list loss is DPO and Liger's fused linear DPO computes the same."""
    trainable = mode == "trainable"
    lists = Lists(2, 2, 8) if setting.size == "tiny" else Lists(4, 2, 200 if setting.size == "cpu" else 500)
    p = problem(head, lists, setting, trainable)
    cases = [Case(OURS, ours(p, True)), *bare_gemms(p, 3 if trainable else 2)]
    cases.append(theirs(peers.for_task("linear_log_probs")[0], p, True))
    wanted = [x for x in (p.hidden, p.weight) if x.requires_grad]
    try:
        if setting.device != "cuda":
            raise RuntimeError("compiles for minutes on a CPU; needs a CUDA device")
        liger = peers.liger_dpo()
        packed = (lists.n_lists * lists.k, lists.n_response)

        def run() -> object:
            loss = liger(p.hidden.view(*packed, -1), p.weight, p.labels.view(packed))
            return torch.autograd.grad(loss, wanted)

        cases.append(Case("Liger fused linear DPO", run))
    except Exception as error:
        cases.append(Case("Liger fused linear DPO", lambda: None, problem=f"{type(error).__name__}: {error}"[:200]))
    compare("linear_pairs", f"{mode} {head.name} T{lists.n_tokens}", cases, {**shapes(head, lists), "head": mode})
