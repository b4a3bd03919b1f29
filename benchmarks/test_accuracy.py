"""How far from float64 are log-probs, loss and gradients, by dtype?

Hypothesis. With log-probs, sums and the loss in fp32 whatever the inputs' dtype, the errors of log-probs and loss in
fp32, bf16 and fp16 are no larger than plain PyTorch's at the same dtype. Nor is that of the gradient of the hidden
states: D W is kept in fp32 until it is scaled, and rounded once. Nor is that of the head's gradient: its D is made with
the coefficient in it. With logits in fp32 (`logits_dtype`) no error in 16 bits is larger than any peer's.

Floor. The definition in float64 on the same, already rounded, inputs is the zero of the scale. `rounding` is what
rounding the exact gradients once to the dtype costs: no function that returns them in it can be closer on average.

Columns, in `extra`. log_probs: rms error of a token's. loss: |error|. d_hidden, d_weight: ‖error‖ / ‖exact‖.

Shapes. One list of 20 answers; V as large as the head's, since it is over V that errors add up. Logits of unit
variance, as of a model that knows nothing, and peaked at the label, as of the model that is trained: what a peer leaves
out of its backward, and how much of the loss is cancellation, depends on which. Nothing is timed. A peer that takes
logits gets those of a plain linear layer. What needs a GPU is a row with its reason.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import perpo_kernels as pk
from benchmarks import peers
from benchmarks.harness import OURS, Case
from benchmarks.problems import HeadShape, ListShape, Problem, Setting, problem, shapes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = {
    "tiny": (HeadShape("tiny", 256, 32), ListShape(1, 4, 4)),
    "cpu": (HeadShape("laptop", 32000, 256), ListShape(1, 20, 6)),  # 16-bit products are slow there
    "gpu": (HeadShape("qwen2.5-vl-7b", 152064, 3584), ListShape(1, 20, 25)),
}
Results = tuple[Tensor, Tensor, Tensor, Tensor | None]  # token log-probs, loss, d hidden, d weight


def from_tokens(tokens: Tensor, p: Problem) -> Results:
    """A list loss on top of token log-probs, in PyTorch."""
    loss = peers.list_loss_of_tokens(tokens, p)
    d_hidden, d_weight = torch.autograd.grad(loss, (p.hidden, p.weight))
    return tokens, loss, d_hidden, d_weight


def exact_results(p: Problem) -> Results:
    def leaf(x: Tensor) -> Tensor:
        return x.detach().double().requires_grad_()

    p = p._replace(
        hidden=leaf(p.hidden),
        weight=leaf(p.weight),
        rewards=p.rewards.double(),
        ref_log_probs=p.ref_log_probs.double(),
    )
    return from_tokens(peers.plain_linear_log_probs(p.hidden, p.weight, p.labels), p)


def our_results(p: Problem, trainable: bool, logits_dtype: torch.dtype | None = None) -> Results:
    p = p._replace(weight=p.weight.detach().requires_grad_(trainable))
    with torch.no_grad():
        tokens = pk.linear_token_log_probs(p.hidden, p.weight, p.labels, logits_dtype=logits_dtype)
    out = pk.linear_perpo_loss(
        p.hidden,
        p.weight,
        p.labels,
        p.rewards,
        cu_seqlens=p.cu_seqlens,
        cu_lists=p.cu_lists,
        ref_log_probs=p.ref_log_probs,
        logits_dtype=logits_dtype,
    )
    grads = torch.autograd.grad(out.loss, (p.hidden, p.weight) if trainable else (p.hidden,))
    return tokens, out.loss, grads[0], grads[1] if trainable else None


def errors(found: Results, exact: Results) -> dict[str, float]:
    tokens, loss, *grads = (None if x is None else x.detach().double() for x in found)
    exact_tokens, exact_loss, *exact_grads = (x.detach() for x in exact if x is not None)
    assert tokens is not None
    assert loss is not None
    figures = {
        "log_probs": (tokens - exact_tokens).square().mean().sqrt().item(),
        "loss": (loss - exact_loss).abs().item(),
    }
    for name, grad, true in zip(("d_hidden", "d_weight"), grads, exact_grads, strict=True):
        if grad is not None:
            figures[name] = ((grad - true).norm() / true.norm()).item()
    return {name: float(f"{value:.3g}") for name, value in figures.items()}


def rounding(exact: Results, dtype: torch.dtype) -> Results:
    tokens, loss, *grads = exact
    # For the type checker: of two or three.
    return (tokens.float(), loss.float(), *(None if x is None else x.to(dtype) for x in grads))  # type: ignore[return-value]


def of_peer(peer: peers.Peer, p: Problem) -> Callable[[], Results]:
    fn, reason = peers.load(peer, p.hidden.device.type)
    if fn is None:
        raise RuntimeError(reason)

    def run() -> Results:
        if peer.task == "linear_log_probs":
            return from_tokens(fn(p.hidden, p.weight, p.labels), p)
        return from_tokens(fn(F.linear(p.hidden, p.weight), p.labels), p)

    return run


@pytest.mark.parametrize("logits", ["unit variance", "peaked"])
@pytest.mark.parametrize("precision", DTYPES)
def test_accuracy(benchmark: Any, inspect: Any, setting: Setting, precision: str, logits: str) -> None:
    head, lists = SHAPES[setting.size]
    dtype = DTYPES[precision]
    full = problem(head, lists, setting, trainable_head=True, unit_variance=logits != "peaked")
    p = full._replace(
        hidden=full.hidden.detach().to(dtype).requires_grad_(), weight=full.weight.detach().to(dtype).requires_grad_()
    )
    exact = exact_results(p)

    def case(name: str, make: Callable[[], Results], **options: Any) -> Case:
        return Case(name, lambda: errors(make(), exact), **options)

    def from_logits() -> Results:
        return from_tokens(pk.token_log_probs(F.linear(p.hidden, p.weight), p.labels), p)

    cases = [
        case(OURS, lambda: our_results(p, True)),
        case(f"{OURS}, frozen head", lambda: our_results(p, False)),
        case(f"{OURS}, from logits", from_logits),
        case("rounding", lambda: rounding(exact, dtype)),
    ]
    if dtype != torch.float32:
        for name, trainable in ((OURS, True), (f"{OURS}, frozen head", False)):
            wide = partial(our_results, p, trainable, torch.float32)
            cases.insert(-2, case(f"{name}, fp32 logits", wide))
    for task, note in (("linear_log_probs", ""), ("token_log_probs", ", from logits")):
        for peer in peers.for_task(task):
            if peer.sums or peer.name.endswith("in place") or (peer.slow_start and note):
                continue  # no log-probs; the same numbers as without; compiled once is enough
            _, reason = peers.load(peer, setting.device)
            reason = reason or peers.compiles_elsewhere(peer, setting.size, True, "")
            run = (lambda: ()) if reason else of_peer(peer, p)
            # For the type checker: one of two functions.
            cases.append(case(peer.name + note, run, problem=reason, risky=peer.risky))  # type: ignore[arg-type]
    inspect("accuracy", f"{precision}, {logits} logits", cases, {**shapes(head, lists), "logits": logits}, dtype)
