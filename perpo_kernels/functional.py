"""The public functions: check the arguments, pick the backend, call the operator.

Symbols: T tokens, S candidates, G lists, k candidates a list, V vocabulary, H hidden size. The formulas are in
`perpo_kernels.objectives` (the loss) and `perpo_kernels.ops.linear` (how gradients come without logits).
"""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from perpo_kernels import backends, checks, layout, reference
from perpo_kernels.objectives import Objective
from perpo_kernels.ops import linear
from perpo_kernels.ops import lists as ops

METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "lists/pair_accuracy", "lists/active")


def _is_reference(backend: str) -> bool:
    """Whether the call is for the definition itself, which is no operator; the operators resolve the other names."""
    checks.backend(backend)
    return (os.environ.get("PERPO_BACKEND", "auto") if backend == "auto" else backend) == "reference"


def token_log_probs(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> Tensor:  # [...] fp32
    """log softmax(logits / temperature)[label] of each position: one read forward, one read and one write backward.

    Args:
        logits: [..., V], fp32, fp16 or bf16 (fp64 on the eager and reference backends). A view such as `logits[:, :-1]`
            is taken as it is.
        labels: int64 [...], aligned: labels[t] is the target of logits[t]. Nothing is shifted.
        temperature: > 0.
        ignore_index: positions with this label give 0, get no gradient, and are never read.
        inplace_backward: write the gradient over the logits, which saves [..., V]. Only for logits that nothing reads
            after the backward pass; a second backward pass through them is an error.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        fp32 (fp64 for fp64 logits) [...], 0 where ignored. A label outside [0, V) gives NaN on a GPU.

    Raises:
        ValueError, TypeError: arguments that do not fit, by name; on the CPU, or with PERPO_CHECK=1, also a label out
        of range.
    """
    checks.floating("logits", logits)
    checks.labels(labels, logits.shape[:-1], "logits.shape[:-1]", logits.device)
    checks.positive("temperature", temperature)
    checks.index("ignore_index", ignore_index)
    if _is_reference(backend):
        ops.check_labels(labels, logits.shape[-1], ignore_index)
        wide = logits.to(ops.accumulation_dtype(logits.dtype))
        return reference.token_log_probs(wide, labels, temperature, ignore_index)
    return ops.token_log_probs(logits, labels, temperature, ignore_index, inplace_backward, backend)[0]


def linear_token_log_probs(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...]
    bias: Tensor | None = None,  # [V]
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    max_chunk_bytes: int | None = None,
    backend: str = "auto",
) -> Tensor:  # [...] fp32
    """Log-probability of each label under the language head, without the logits [..., V] ever existing.

    logits = softcap · tanh(logit_scale · (hidden weightᵀ + bias) / softcap) / temperature, log-probs as
    `token_log_probs`. One GEMM under no_grad, two for forward and backward with a frozen head, four with a trainable
    one. Memory beyond the inputs: one chunk of logits, [..., H] for the gradient of `hidden`, and fp32 [V, H] for that
    of `weight`.

    Args:
        hidden: [..., H]: the states that *predict* the labels. Gather response positions first; ignored positions are
            skipped on the CPU but still multiplied on a GPU, where skipping them would need a synchronisation.
        weight: [V, H], of the dtype of `hidden` (under autocast both are cast to the autocast dtype).
        labels: int64 [...], aligned with `hidden`.
        bias: [V] or None.
        temperature, softcap, logit_scale: > 0; softcap None means none.
        ignore_index: positions with this label give 0 and get no gradient.
        max_chunk_bytes: budget of one chunk of logits; None: 100 MiB on the CPU, 1 GiB elsewhere.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        fp32 (fp64 for fp64 inputs) [...].

    Raises:
        ValueError, TypeError: arguments that do not fit, by name.
    """
    hidden, weight, bias = checks.head(hidden, weight, bias)
    checks.labels(labels, hidden.shape[:-1], "hidden.shape[:-1]", hidden.device)
    z = checks.logit_map(temperature, softcap, logit_scale, ignore_index)
    chunk_bytes = checks.chunk_bytes(max_chunk_bytes)
    if _is_reference(backend):
        return _reference_linear(hidden, weight, labels, bias, z)
    rows = hidden.reshape(-1, hidden.shape[-1]).contiguous()
    keep_derivative = torch.is_grad_enabled() and hidden.requires_grad
    log_probs, _, _ = linear.linear_log_probs(
        rows, weight, labels.reshape(-1).contiguous(), bias, *z, chunk_bytes, backend, keep_derivative
    )
    return log_probs.view(labels.shape)


def perpo_loss(
    log_probs: Tensor,  # [G, k] or [S]
    rewards: Tensor,  # same shape
    ref_log_probs: Tensor | None = None,  # same shape
    *,
    cu_lists: Tensor | None = None,  # int32 [G + 1]
    valid: Tensor | None = None,  # bool, same shape
    lengths: Tensor | None = None,  # same shape
    pair_weights: Tensor | None = None,  # [G, k, k]
    flip_probs: Tensor | None = None,  # same shape
    beta: float | None = None,
    gamma: float | None = None,
    reduction: str = "mean",
    objective: Objective | None = None,
    backend: str = "auto",
) -> Tensor:  # [] or [G]
    """The PerPO loss of lists of sequence log-probs (formulas: `perpo_kernels.objectives`).

    Args:
        log_probs: log π(y_i) of whole responses: [G, k] padded, or [S] packed with `cu_lists`.
        rewards: same shape. Higher is better; order within a list does not matter. A candidate with a NaN or infinite
            reward takes part in no pair. A list whose rewards are all equal has loss 0.
        ref_log_probs: same shape, under the reference model, or None for no reference.
        cu_lists: candidates of list g are cu_lists[g] .. cu_lists[g + 1]; required exactly when log_probs is [S].
        valid: False for a candidate that is padding; what stands there is never read.
        lengths: numbers of response tokens, needed by length-normalised objectives only.
        pair_weights: [G, k, k] with k at least the longest list, needed by objectives with pairs="given": entry [g,
            i, j] is the weight with which candidate i of list g is preferred to candidate j; 0 for no preference.
        flip_probs: probability in [0, 1] that a preference over this candidate is wrong; RosePO needs it, other
            objectives on pairs with the logistic link take 1 − soft_target if it is not given.
        beta, gamma: of PerPO, 0.1 and 0.5 if not given; `objective` takes their place.
        reduction: "mean" over all lists (inactive ones count, so that accumulation stays exact), "sum", or "none".
        objective: any of `perpo_kernels.objectives`, for example `objectives.plackett_luce()`.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        fp32 (fp64 for fp64 log-probs): a scalar, or [G] for reduction="none".

    Raises:
        ValueError, TypeError: arguments that do not fit, by name.

    Example:
        >>> import torch, perpo_kernels as pk
        >>> logp = torch.tensor([[-4.0, -5.0, -3.0]], requires_grad=True)
        >>> loss = pk.perpo_loss(logp, torch.tensor([[0.9, 0.1, 0.5]]), torch.tensor([[-4.5, -4.5, -4.5]]))
        >>> loss.backward(); logp.grad.sum().abs() < 1e-7
        tensor(True)
    """
    checks.floating("log_probs", log_probs)
    target = checks.objective(objective, beta, gamma)
    checks.lists(log_probs, rewards, ref_log_probs, cu_lists, valid, lengths, flip_probs)
    checks.needs(target, ref_log_probs, pair_weights, flip_probs)
    if target.length_normalized and lengths is None:
        raise ValueError("lengths must be given: this objective divides log-probs by the number of tokens")
    checks.reduction(reduction)
    k = 0
    if cu_lists is None:
        n_lists, k = log_probs.shape
        cu_lists = layout.equal_lists(n_lists, k, log_probs.device)
        log_probs, rewards = log_probs.reshape(-1), rewards.reshape(-1)
        ref_log_probs, valid, lengths, flip_probs = (
            None if x is None else x.reshape(-1) for x in (ref_log_probs, valid, lengths, flip_probs)
        )
    checks.pair_weights(pair_weights, cu_lists, k)
    if _is_reference(backend):
        ops.check_cumulative("cu_lists", cu_lists, rewards.numel(), "candidates")
        ops.check_pair_weights(pair_weights, cu_lists)
        ops.check_flip_probs(flip_probs)
        lists = _reference_lists(log_probs, rewards, cu_lists, ref_log_probs, valid, lengths, pair_weights, flip_probs)
        losses = reference.list_losses(lists, target)
        return _reduce(losses.sum(), losses, reduction)
    total, losses, *_ = ops.list_loss(
        log_probs,
        rewards,
        cu_lists,
        target.numbers(),
        None,
        None,
        -100,
        ref_log_probs,
        valid,
        lengths,
        None,
        pair_weights,
        flip_probs,
        backend,
    )
    return _reduce(total, losses, reduction)


class LinearPerPOOutput(NamedTuple):
    """What `linear_perpo_loss` returns."""

    loss: Tensor  # [] or [G]
    log_probs: Tensor  # [S], Σ_t log π(y_it), detached
    list_stats: (
        Tensor  # [4, G], detached: β·score of best and of worst candidate, share of pairs ranked right, is active
    )

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Scalars under TRL's names, detached and still on the device; computed when asked for.

        rewards/chosen, rewards/rejected: β·(log π − log π_ref) of the best and the worst candidate, mean over active
        lists; rewards/margins: their difference; lists/pair_accuracy: share of preferred pairs that the scores rank
        right, mean over active lists; lists/active: share of lists that have a preferred pair at all.
        """
        active = self.list_stats[3]
        chosen, rejected, right = self.list_stats[:3].sum(-1) / active.sum().clamp(min=1)
        share = active.sum() / max(active.numel(), 1)
        return dict(zip(METRICS, (chosen, rejected, chosen - rejected, right, share), strict=True))


def linear_perpo_loss(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [T]
    rewards: Tensor,  # [S]
    *,
    cu_seqlens: Tensor,  # int32 [S + 1]
    cu_lists: Tensor,  # int32 [G + 1]
    ref_log_probs: Tensor | None = None,  # [S]
    bias: Tensor | None = None,  # [V]
    token_weights: Tensor | None = None,  # [T]
    pair_weights: Tensor | None = None,  # [G, k, k]
    flip_probs: Tensor | None = None,  # [S]
    beta: float | None = None,
    gamma: float | None = None,
    reduction: str = "mean",
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    max_chunk_bytes: int | None = None,
    objective: Objective | None = None,
    backend: str = "auto",
) -> LinearPerPOOutput:
    """The PerPO loss from the hidden states of packed response tokens: no logits, no host synchronisation.

    GEMMs of T × V × H: one under no_grad, two with a frozen head (forward and backward together), three with a
    trainable one when each list fits `max_chunk_bytes` and the layout is on the CPU or all tokens fit at once,
    otherwise four.

    Args:
        hidden: [T, H], the states that predict the labels: response positions only, all candidates of all lists one
            after another.
        weight, bias, temperature, softcap, logit_scale, ignore_index, max_chunk_bytes: as `linear_token_log_probs`.
        labels: int64 [T].
        rewards: [S], as `perpo_loss`.
        cu_seqlens: int32 [S + 1], tokens of candidate i are cu_seqlens[i] .. cu_seqlens[i + 1]. A candidate without a
            valid token takes part in no pair.
        cu_lists: int32 [G + 1], candidates of list g are cu_lists[g] .. cu_lists[g + 1]. Both layouts may live on the
            CPU while the rest is on a GPU: then they are checked for free, and chunks can follow the lists.
        ref_log_probs: [S], Σ_t log π_ref(y_it), or None for no reference.
        token_weights: [T], ω_t of each token in Σ_t ω_t log π(y_it) (TIS-DPO, arXiv 2410.04350); constants. The
            reference log-probs must then be sums with the same weights. A token of weight 0 is as absent as an ignored
            one: it does not count in a length, and a candidate with no other takes part in no pair.
        pair_weights, flip_probs: as `perpo_loss`; the objective says whether they are needed.
        beta, gamma, reduction, objective: as `perpo_loss`.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        LinearPerPOOutput: loss (differentiable in hidden, weight and bias), log_probs [S] and metrics (detached).

    Raises:
        ValueError, TypeError: arguments that do not fit, by name.
    """
    hidden, weight, bias = checks.head(hidden, weight, bias, packed=True)
    checks.labels(labels, hidden.shape[:-1], "hidden.shape[:-1]", hidden.device)
    target = checks.objective(objective, beta, gamma)
    checks.packed(rewards, cu_seqlens, cu_lists, ref_log_probs, flip_probs, hidden.device)
    checks.needs(target, ref_log_probs, pair_weights, flip_probs)
    checks.pair_weights(pair_weights, cu_lists)
    checks.token_weights(token_weights, labels)
    checks.reduction(reduction)
    z = checks.logit_map(temperature, softcap, logit_scale, ignore_index)
    chunk_bytes = checks.chunk_bytes(max_chunk_bytes)
    if _is_reference(backend):
        ops.check_cumulative("cu_lists", cu_lists, rewards.numel(), "candidates")
        ops.check_cumulative("cu_seqlens", cu_seqlens, hidden.shape[0], "tokens")
        ops.check_pair_weights(pair_weights, cu_lists)
        ops.check_flip_probs(flip_probs)
        tokens = _reference_linear(hidden, weight, labels, bias, z)
        log_probs, lengths = reference.sequence_log_probs(tokens, labels, cu_seqlens, ignore_index, token_weights)
        lists = _reference_lists(
            log_probs, rewards, cu_lists, ref_log_probs, lengths > 0, lengths, pair_weights, flip_probs
        )
        losses = reference.list_losses(lists, target)
        loss = _reduce(losses.sum(), losses, reduction)
        return LinearPerPOOutput(loss, log_probs.detach(), reference.list_stats(lists, target))
    hidden, labels = hidden.contiguous(), labels.contiguous()
    grad = torch.is_grad_enabled()
    need_hidden, need_weight = grad and hidden.requires_grad, grad and weight.requires_grad
    need_bias = grad and bias is not None and bias.requires_grad
    if (need_weight or need_bias) and reduction != "none":
        total, _, log_probs, stats, *_ = linear.linear_list_loss(
            hidden,
            weight,
            labels,
            bias,
            rewards,
            cu_seqlens,
            cu_lists,
            ref_log_probs,
            token_weights,
            pair_weights,
            flip_probs,
            *z,
            chunk_bytes,
            backend,
            target.numbers(),
            need_hidden,
            need_weight,
            need_bias,
        )
        loss = _reduce(total, stats[3], reduction)
    else:
        tokens, _, _ = linear.linear_log_probs(hidden, weight, labels, bias, *z, chunk_bytes, backend, need_hidden)
        total, losses, _, log_probs, stats = ops.list_loss(
            tokens,
            rewards,
            cu_lists,
            target.numbers(),
            cu_seqlens,
            labels,
            ignore_index,
            ref_log_probs,
            None,
            None,
            token_weights,
            pair_weights,
            flip_probs,
            backend,
        )
        loss = _reduce(total, losses, reduction)
    return LinearPerPOOutput(loss, log_probs.detach(), stats.detach())


def _reduce(total: Tensor, losses: Tensor, reduction: str) -> Tensor:
    """The scalar or [G] asked for; a batch without lists has mean 0, attached to the graph."""
    if reduction == "none":
        return losses
    return total if reduction == "sum" else total / max(losses.shape[0], 1)


def _reference_lists(log_probs: Tensor, rewards: Tensor, cu_lists: Tensor, *others: Tensor | None) -> reference.Lists:
    """In accumulation precision throughout, as the other backends compute."""
    dtype = ops.accumulation_dtype(log_probs.dtype)
    rest = (x.to(dtype) if x is not None and x.is_floating_point() else x for x in others)
    return reference.Lists(log_probs.to(dtype), rewards.to(dtype), cu_lists, *rest)


def _reference_linear(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, z: backends.LogitMap
) -> Tensor:
    ops.check_labels(labels, weight.shape[0], z.ignore_index)
    logits = reference.head_logits(hidden, weight, bias, z.softcap, z.logit_scale)
    wide = logits.to(ops.accumulation_dtype(logits.dtype))
    return reference.token_log_probs(wide, labels, z.temperature, z.ignore_index)
