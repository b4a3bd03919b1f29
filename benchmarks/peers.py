"""What users would run instead, each behind the same three signatures, imported when asked for and skipped with
its reason.

    token_log_probs    fn(logits [T, V], labels [T]) -> log-probs [T]
    linear_log_probs   fn(hidden [T, H], weight [V, H], labels [T]) -> log-probs [T]
    list_loss          fn(log_probs [G, k], rewards [G, k], ref_log_probs [G, k], beta, gamma) -> scalar

Peers are called as their own trainers call them. Nothing of theirs is copied: the formulas below are the
definition in plain PyTorch. A peer that gives only a summed loss (no list loss can be built on it) is marked
`sums`: its time is that of cross-entropy, a lower bound of what a list loss would cost with it.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.problems import Problem

Function = Callable[..., Any]


class Peer(NamedTuple):
    name: str
    task: str
    load: Callable[[], Function]
    needs_cuda: bool = False
    slow_start: bool = False  # compiles for each shape: run at some shapes only, and not at tiny sizes
    sums: bool = False  # returns Σ −log p instead of one value a token
    risky: bool = False  # generates code for one GPU generation; runs last, since it may crash the device
    largest_k: int = 1 << 30
    remark: str | None = None


# ------------------------------------------------------------------------------------------------------- plain PyTorch


def plain_token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.log_softmax(wide, dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def plain_linear_log_probs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return plain_token_log_probs(F.linear(hidden, weight), labels)


def plain_list_loss(log_probs: Tensor, rewards: Tensor, ref: Tensor, beta: float = 0.1, gamma: float = 0.5) -> Tensor:
    """All pairs at once, [G, k, k], by autograd; no synchronisation."""
    gap = rewards.unsqueeze(-1) - rewards.unsqueeze(-2)
    better = gap > 0
    weight = torch.where(better, gap, 1.0).pow(gamma) * better
    weight = weight / weight.sum((-1, -2), keepdim=True).clamp_min(1e-30)
    score = log_probs - ref
    margin = score.unsqueeze(-1) - score.unsqueeze(-2)
    return -(weight * F.logsigmoid(beta * margin)).sum((-1, -2)).mean()


def loop_list_loss(log_probs: Tensor, rewards: Tensor, ref: Tensor, beta: float = 0.1, gamma: float = 0.5) -> Tensor:
    """Pairs one by one in Python, lists sorted best first: the shape of the published training script."""
    losses = []
    for scores, values in zip(log_probs - ref, rewards, strict=True):
        k = len(values)
        pairs = [(i, j) for i in range(k) for j in range(i + 1, k)]
        weights = torch.stack([(values[i] - values[j]).abs() ** gamma for i, j in pairs])
        terms = torch.stack([-F.logsigmoid(beta * (scores[i] - scores[j])) for i, j in pairs])
        losses.append((weights * terms).sum() / weights.sum())
    return torch.stack(losses).mean()


def list_loss_of_tokens(tokens: Tensor, problem: Problem) -> Tensor:
    """From log-probs of tokens [T] of equally long candidates to the loss, as a trainer would write it."""
    n_lists, k, _ = problem.lists
    sequences = tokens.view(n_lists, k, -1).sum(-1)
    return plain_list_loss(sequences, problem.rewards.view(n_lists, k), problem.ref_log_probs.view(n_lists, k))


# ----------------------------------------------------------------------------------------------------------- libraries


def _compiled(fn: Function) -> Callable[[], Function]:
    return lambda: torch.compile(fn, fullgraph=True, dynamic=False)


def _torch_cross_entropy() -> Function:
    return lambda logits, labels: -F.cross_entropy(logits.float(), labels, reduction="none")


def _torch_linear(chunked: bool) -> Callable[[], Function]:
    def load() -> Function:
        if not hasattr(F, "linear_cross_entropy"):
            raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 has)")
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None
        return lambda hidden, weight, labels: -F.linear_cross_entropy(
            hidden, weight, labels, reduction="none", options=options
        )

    return load


def _trl_selective() -> Function:
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax


TRL_CHUNK = 32768  # of the vocabulary, as TRL's trainers set it


def _trl_chunked() -> Function:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return lambda hidden, weight, labels: ChunkedLogProbFunction.apply(
        hidden, weight, None, labels, 1.0, TRL_CHUNK, None, 1.0, ()
    )[0]


def _liger_cross_entropy() -> Function:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda logits, labels: -liger_cross_entropy(logits.view_as(logits), labels, reduction="none")


def _liger_scaled() -> Function:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return lambda hidden, weight, labels: -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels)


def _apple(filter_eps: str | None) -> Callable[[], Function]:
    def load() -> Function:
        from cut_cross_entropy import linear_cross_entropy

        return lambda hidden, weight, labels: -linear_cross_entropy(
            hidden, weight, labels, reduction="none", filter_eps=filter_eps
        )

    return load


def _flash(inplace: bool) -> Callable[[], Function]:
    def load() -> Function:
        module = importlib.import_module("flash_attn.ops.triton.cross_entropy")
        return lambda logits, labels: -module.cross_entropy_loss(logits, labels, inplace_backward=inplace)[0]

    return load


def _quack_cross_entropy(inplace: bool) -> Callable[[], Function]:
    def load() -> Function:
        from quack.cross_entropy import cross_entropy

        return lambda logits, labels: -cross_entropy(logits, labels, reduction="none", inplace_backward=inplace)

    return load


QUACK_ROWS = 8  # it takes a multiple of this


def _quack_linear() -> Function:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def summed(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        missing = -len(labels) % QUACK_ROWS
        if missing:
            hidden, labels = F.pad(hidden, (0, 0, 0, missing)), F.pad(labels, (0, missing), value=-100)
        return chunked_linear_cross_entropy(hidden, weight, labels, reduction="sum", tuned=False)

    return summed


def liger_dpo(beta: float = 0.1, compiled: bool = True) -> Function:
    """fn(hidden [2B, R, H], weight, labels [2B, R]) -> DPO loss without a reference; chosen first, then rejected."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=beta, use_ref_model=False, compiled=compiled)
    return lambda hidden, weight, labels: loss(weight, hidden, labels)[0]


QUACK_REMARK = "T padded to a multiple of 8; its GEMM of dW without its tuner; its older path where V % 128"
PEERS = [
    Peer("plain PyTorch", "token_log_probs", lambda: plain_token_log_probs),
    Peer("F.cross_entropy", "token_log_probs", _torch_cross_entropy),
    Peer("torch.compile", "token_log_probs", _compiled(plain_token_log_probs), slow_start=True),
    Peer("TRL selective_log_softmax", "token_log_probs", _trl_selective),
    Peer("Liger cross_entropy", "token_log_probs", _liger_cross_entropy, needs_cuda=True),
    Peer("flash-attn cross_entropy", "token_log_probs", _flash(False), needs_cuda=True),
    Peer("flash-attn cross_entropy in place", "token_log_probs", _flash(True), needs_cuda=True),
    Peer("quack cross_entropy", "token_log_probs", _quack_cross_entropy(False), needs_cuda=True, risky=True),
    Peer("quack cross_entropy in place", "token_log_probs", _quack_cross_entropy(True), needs_cuda=True, risky=True),
    Peer("plain PyTorch", "linear_log_probs", lambda: plain_linear_log_probs),
    Peer("torch.compile", "linear_log_probs", _compiled(plain_linear_log_probs), slow_start=True),
    Peer("F.linear_cross_entropy", "linear_log_probs", _torch_linear(False)),
    Peer("F.linear_cross_entropy, chunked", "linear_log_probs", _torch_linear(True)),
    Peer("TRL chunked log-prob", "linear_log_probs", _trl_chunked),
    Peer("Apple CCE (default)", "linear_log_probs", _apple("high"), needs_cuda=True),
    Peer("Apple CCE (unfiltered)", "linear_log_probs", _apple(None), needs_cuda=True),
    Peer("Liger scaled CE", "linear_log_probs", _liger_scaled, risky=True),
    Peer(
        "quack chunked CE",
        "linear_log_probs",
        _quack_linear,
        needs_cuda=True,
        sums=True,
        risky=True,
        remark=QUACK_REMARK,
    ),
    Peer("pairs in a Python loop", "list_loss", lambda: loop_list_loss, largest_k=64),
    Peer("plain PyTorch", "list_loss", lambda: plain_list_loss),
    Peer("torch.compile", "list_loss", _compiled(plain_list_loss), slow_start=True),
]


def for_task(task: str) -> list[Peer]:
    return [peer for peer in PEERS if peer.task == task]


@functools.cache
def load(peer: Peer, device: str) -> tuple[Function | None, str | None]:
    """(the function, None) or (None, why it can't run here)."""
    if peer.needs_cuda and device != "cuda":
        return None, "needs a CUDA device"
    try:
        return peer.load(), None
    except Exception as error:  # an import may fail in any way
        first_line = (str(error).strip().splitlines() or [""])[0][:200]
        return None, f"{type(error).__name__}: {first_line}"


def compiles_elsewhere(peer: Peer, size: str, here: bool, where: str) -> str | None:
    """Why a peer that compiles for each shape is not run, but for the few shapes where it is measured (`here`)."""
    if not peer.slow_start or (here and size != "tiny"):
        return None
    return f"not run: compiles for each shape, {'left out at tiny sizes' if size == 'tiny' else where}"


def remarks_on(peer: Peer, device: str, n_vocab: int = 0) -> dict[str, Any]:
    """What a reader of the peer's row must know, for its `extra`; a `note` says that it does another job."""
    remarks = [peer.remark] if peer.remark else []
    if device == "cpu" and peer.name == "Liger scaled CE":
        remarks.append("its PyTorch fallback for a CPU")
    if peer.name == "TRL chunked log-prob":
        if device == "cpu":
            remarks.append("its PyTorch fallback for a CPU")
        if n_vocab and n_vocab <= TRL_CHUNK:
            remarks.append(f"V fits its chunk of {TRL_CHUNK}")
    extra: dict[str, Any] = {"remark": ", ".join(remarks)} if remarks else {}
    return extra | ({"note": "cross-entropy, no list loss"} if peer.sums else {})
