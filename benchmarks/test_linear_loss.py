"""What does the list loss cost from hidden states, beyond the matrix products that nobody can avoid?

Hypothesis. ∂log p/∂logits does not depend on the loss, so a frozen head needs two GEMMs of T × V × H for forward
and backward together, a trainable head three, a reference pass (no_grad) one; the row kernel between them is
small beside the GEMMs. On the CPU: the frozen head within 1.10 of its two bare GEMMs and no slower than plain
PyTorch.

Floor. The one, two or three bare GEMMs, the whole batch at once, into buffers that are there already: Z = X Wᵀ,
U = Z W, dW = Zᵀ X. Beside it the same products in chunks of as many rows as ours has (chunking is ours to pay for); and
on a CPU into new buffers, whose pages cost a fault each, which every function that allocates pays.

Any other loss. `perpo_kernels, any loss`: the same list loss written in PyTorch on top of `linear_token_log_probs`, as
one would write a loss of one's own. With a frozen head it is to cost what the fused loss costs; with a trainable one a
GEMM more, since the logits are made again.

Shapes. `benchmarks.problems`: LLaVA-1.5 (small vocabulary), Qwen2.5-VL (large), Gemma-3 (largest) and T from 500 (one
grounding list of 20) to 16000 (OCR pages), bf16; on the CPU V 32000, k 20, fp32, T 800 and H 512, with `--full` T 1600
and 3200 and H 1024. Logits are peaked at the label, for all alike: see `benchmarks.problems`.

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
from benchmarks.harness import BARE, FLOOR, OURS, Case
from benchmarks.problems import HeadShape, ListShape, Problem, Setting, problem, shapes
from perpo_kernels.chunks import bind_head
from perpo_kernels.problem import LogitMap


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


def any_loss(p: Problem, grad: bool) -> Callable[[], object]:
    """A loss of one's own on top of log-probs, here the same one."""
    wanted = [x for x in (p.hidden, p.weight) if x.requires_grad]

    def run() -> object:
        with torch.set_grad_enabled(grad):
            loss = peers.list_loss_of_tokens(pk.linear_token_log_probs(p.hidden, p.weight, p.labels), p)
            return torch.autograd.grad(loss, wanted) if grad else loss

    return run


def theirs(peer: peers.Peer, p: Problem, grad: bool) -> Case:
    device = p.hidden.device.type
    extra = peers.remarks_on(peer, device, p.weight.shape[0])
    fn, reason = peers.load(peer, device)
    if fn is None:
        return Case(peer.name, run=lambda: None, problem=reason, extra=extra)
    wanted = [x for x in (p.hidden, p.weight) if x.requires_grad]
    hidden = p.hidden if grad else p.hidden.detach()  # some look at requires_grad and not at the mode

    def run() -> object:
        with torch.set_grad_enabled(grad):
            value = fn(hidden, p.weight, p.labels)
            loss = value if peer.sums else peers.list_loss_of_tokens(value, p)
            return torch.autograd.grad(loss, wanted) if grad else loss

    return Case(peer.name, run, risky=peer.risky, extra=extra)


class Products:
    """The GEMMs of a batch, `n_rows` of it at a time. Buffers of logits live from `prepare` to `release`, so that no
    peer has to do without that memory."""

    def __init__(self, p: Problem, n_gemms: int, n_rows: int) -> None:
        self.x, self.w, self.n_gemms, self.n_rows = p.hidden.detach(), p.weight.detach(), n_gemms, n_rows
        self.buffers: list[Tensor] = []

    def prepare(self) -> None:
        z = self.x.new_zeros(min(self.n_rows, len(self.x)), len(self.w))  # zeros: its pages are there
        self.buffers = [z, torch.zeros_like(self.x), torch.zeros_like(self.w if self.n_gemms > 2 else z[:0])]

    def release(self) -> None:
        self.buffers = []

    def run(self) -> None:
        whole_z, u, dw = self.buffers
        for start in range(0, len(self.x), self.n_rows):
            rows = slice(start, start + self.n_rows)
            x = self.x[rows]
            z = torch.mm(x, self.w.t(), out=whole_z[: len(x)])
            if self.n_gemms > 1:
                torch.mm(z, self.w, out=u[rows])
            if self.n_gemms > 2:
                torch.addmm(dw, z.t(), x, beta=1 if start else 0, out=dw)

    def case(self, name: str) -> Case:
        return Case(name, self.run, self.prepare, self.release)


def bare_gemms(p: Problem, n_gemms: int) -> list[Case]:
    """The floor; in chunks; on a CPU also into buffers that are new each time."""
    x, w = p.hidden.detach(), p.weight.detach()
    chunk = bind_head(w, None, LogitMap(), 0, w.dtype, "eager").chunk_rows(len(x))

    def allocating() -> list[Tensor]:
        logits = x @ w.t()
        results = [logits @ w] if n_gemms > 1 else []
        return [*results, logits.t() @ x] if n_gemms > 2 else results

    cases = [Products(p, n_gemms, len(x)).case(FLOOR)]
    if chunk < len(x):
        cases.append(Products(p, n_gemms, chunk).case(f"{BARE}, in chunks"))
    if x.device.type == "cpu":
        cases.append(Case(f"{BARE}, new buffers", allocating))
    return cases


MODES = {"reference": (1, False, False), "frozen": (2, True, False), "trainable": (3, True, True)}


@pytest.mark.parametrize("mode", MODES)
def test_linear_loss(
    benchmark: Any, compare: Any, setting: Setting, head: HeadShape, lists: ListShape, mode: str
) -> None:
    n_gemms, grad, trainable = MODES[mode]
    p = problem(head, lists, setting, trainable)
    cases = [Case(OURS, ours(p, grad)), Case(f"{OURS}, any loss", any_loss(p, grad)), *bare_gemms(p, n_gemms)]
    chosen = setting.lists[len(setting.lists) // 2]
    here = setting.device == "cpu" or (mode, lists) == ("frozen", chosen)
    for peer in peers.for_task("linear_log_probs"):
        case = theirs(peer, p, grad)
        elsewhere = f"measured with a frozen head at T{chosen.n_tokens}"
        case.problem = case.problem or peers.compiles_elsewhere(peer, setting.size, here, elsewhere)
        cases.append(case)
    measured = {**shapes(head, lists), "head": mode}
    compare("linear_loss", f"{mode} {head.name} T{lists.n_tokens}", cases, measured, long=setting.full)


def chosen_first(p: Problem) -> Problem:
    """The pairs of `p` as trainers of pairs lay them out: the better answers of all pairs, then the worse ones."""
    better = p.rewards.view(-1, 2).argsort(dim=-1, descending=True)
    order = (better + 2 * torch.arange(len(better), device=better.device).unsqueeze(-1)).t().flatten()  # of sequences
    n_response = p.lists.n_response
    tokens = (order.unsqueeze(-1) * n_response + torch.arange(n_response, device=order.device)).flatten()
    hidden = p.hidden.detach()[tokens].requires_grad_()
    return p._replace(hidden=hidden, labels=p.labels[tokens], rewards=p.rewards[order])


def liger_pairs(p: Problem, compiled: bool = True) -> Callable[[], tuple[Tensor, ...]]:
    """(loss, gradients) of Liger's DPO over pairs in that order; without reference log-probs, as it has none."""
    loss_of, n_response = peers.liger_dpo(compiled=compiled), p.lists.n_response
    wanted = [x for x in (p.hidden, p.weight) if x.requires_grad]

    def run() -> tuple[Tensor, ...]:
        loss = loss_of(p.hidden.view(-1, n_response, p.hidden.shape[-1]), p.weight, p.labels.view(-1, n_response))
        return loss.detach(), *torch.autograd.grad(loss, wanted)

    return run


@pytest.mark.parametrize("mode", ["frozen", "trainable"])
def test_pairs_against_liger_dpo(benchmark: Any, compare: Any, setting: Setting, head: HeadShape, mode: str) -> None:
    """k = 2, where the list loss is DPO and Liger's fused linear DPO computes the same."""
    trainable = mode == "trainable"
    n_lists, n_response = {"tiny": (2, 8), "cpu": (2, 200), "full": (4, 200), "gpu": (4, 500)}[setting.scale]
    lists = ListShape(n_lists, 2, n_response)
    p = problem(head, lists, setting, trainable)
    p = p._replace(ref_log_probs=torch.zeros_like(p.ref_log_probs))
    cases = [Case(OURS, ours(p, True)), *bare_gemms(p, 3 if trainable else 2)]
    cases.append(theirs(peers.for_task("linear_log_probs")[0], p, True))
    name = "Liger fused linear DPO"
    try:
        if setting.device != "cuda":
            raise RuntimeError("compiles for minutes on a CPU; needs a CUDA device")
        cases.append(Case(name, liger_pairs(chosen_first(p))))
    except Exception as error:
        cases.append(Case(name, lambda: None, problem=f"{type(error).__name__}: {error}"[:200]))
    measured = {**shapes(head, lists), "head": mode}
    compare("linear_pairs", f"{mode} {head.name} T{lists.n_tokens}", cases, measured, long=setting.full)
