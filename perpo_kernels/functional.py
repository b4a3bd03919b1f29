"""The public functions: check the arguments, pick the backend, call the operator.

Symbols: T tokens, S candidates, G lists, k candidates per list, V vocabulary, H hidden size. The formulas are in
`perpo_kernels.objectives` (the loss) and `perpo_kernels.ops.linear` (how gradients come without logits).
"""

import os
from typing import NamedTuple

import torch
from torch import Tensor

from perpo_kernels import checks, layout, metrics, reference
from perpo_kernels.objectives import Objective
from perpo_kernels.ops import linear, vocab_parallel
from perpo_kernels.ops import lists as list_ops
from perpo_kernels.ops import logits as token_ops
from perpo_kernels.ops.equal_lists import equal_list_loss
from perpo_kernels.problem import ListProblem, LogitMap, accumulation_dtype, packed
from perpo_kernels.vocab_slices import Group, Slice, take_slice, whole


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
            is not copied.
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
        checks.label_values(labels, logits.shape[-1], ignore_index)
        wide = logits.to(accumulation_dtype(logits.dtype))
        return reference.token_log_probs(wide, labels, temperature, ignore_index)
    numbers = packed(LogitMap(temperature))
    labels = _normal(labels)
    return token_ops.token_log_probs(logits, labels, *numbers, ignore_index, inplace_backward, backend)[0]


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
    logits_dtype: torch.dtype | None = None,
    group: Group = None,
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
        logits_dtype: torch.float32 has the product of a bf16 or fp16 head write fp32 logits, as an fp32 head would;
            None keeps the dtype of the head. The gradient of the logits has the head's dtype either way.
        group: the ranks that share the vocabulary, each with a slice [V_r, H] of the weight and [V_r] of the bias: a
            ProcessGroup or a mesh of one dimension where slices are equal or the weight is a DTensor with Shard(0),
            else `VocabSlices`. `hidden` and `labels` (ids of the whole vocabulary) must be the same on all of them, and
            so are the results: log-probs and the gradient of `hidden` are those of the whole head, the gradient of
            `weight` is that of the slice. An all-gather of [3, T] and an all-reduce of fp32 [T, H], both in the forward
            pass (`perpo_kernels.ops.vocab_parallel`). A DTensor needs no group if `hidden` is one as well, replicated.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        fp32 (fp64 for fp64 inputs) [...].

    Raises:
        ValueError, TypeError: arguments that do not fit, by name.
    """
    hidden, weight, bias, place = take_slice(hidden, weight, bias, group)
    hidden, weight, bias = checks.head(hidden, weight, bias)
    checks.labels(labels, hidden.shape[:-1], "hidden.shape[:-1]", hidden.device)
    z = checks.logit_map(temperature, softcap, logit_scale, ignore_index)
    memory = checks.chunk_bytes(max_chunk_bytes), checks.logits_dtype(logits_dtype, weight.dtype)
    rows = hidden.reshape(-1, hidden.shape[-1])
    return _linear_log_probs(rows, weight, bias, labels.reshape(-1), z, *memory, backend, place).view(labels.shape)


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
    list_weights: Tensor | None = None,  # [G]
    delta: Tensor | None = None,  # [] or [1]
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
        ref_log_probs: same shape, under the reference model, or None for no reference. Of objectives with
            pointwise="clipped" under the policy that sampled, and required.
        cu_lists: candidates of list g are cu_lists[g] .. cu_lists[g + 1]; required exactly when log_probs is [S].
        valid: False for a candidate that is padding; what stands there is never read.
        lengths: numbers of response tokens, needed by objectives with length_normalized or nll_per_token only.
        pair_weights: [G, k, k] with k at least the longest list, needed by objectives with pairs="given": entry [g,
            i, j] is the weight with which candidate i of list g is preferred to candidate j; 0 for no preference.
        flip_probs: probability in [0, 1] that a preference over this candidate is wrong; RosePO needs it, other
            objectives on pairs with the logistic link take 1 − soft_target if it is not given.
        list_weights: [G], finite and ≥ 0, of the difficulty of a prompt for example: loss and gradient of list g are
            multiplied by list_weights[g]; at 0 they are 0, whatever the list holds. "mean" divides by the number of
            lists and not by the sum of the weights: weights of mean 1 keep the size of a step, and batches may be
            cut anywhere. On a GPU a weight that is negative or NaN counts as 0 unless PERPO_CHECK=1 finds it.
        delta: the reward shift δ of pointwise="bco", a tensor so that nothing waits for it; None is 0.
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
    target = checks.objective(objective, beta, gamma)
    if cu_lists is valid is lengths is pair_weights is flip_probs is list_weights is delta is None:
        loss = equal_list_loss(log_probs, rewards, ref_log_probs, target, reduction, backend)
        if loss is not None:
            return loss
    checks.sequences(log_probs, cu_lists)
    k = 0
    if cu_lists is None:
        n_lists, k = log_probs.shape
        cu_lists = layout.equal_lists(n_lists, k, log_probs.device)
    problem = ListProblem(
        rewards,
        cu_lists,
        ref_log_probs=ref_log_probs,
        valid=valid,
        lengths=lengths,
        pair_weights=pair_weights,
        flip_probs=flip_probs,
        list_weights=list_weights,
        delta=delta,
        objective=target,
    )
    shape = log_probs.shape
    checks.candidates(problem, shape, f"have the shape of log_probs, {list(shape)}", log_probs.device)
    checks.objective_data(problem)
    if (problem.objective.length_normalized or problem.objective.nll_per_token) and lengths is None:
        raise ValueError("lengths must be given: this objective divides log-probs by the number of tokens")
    checks.reduction(reduction)
    checks.pair_weights(pair_weights, cu_lists, log_probs.device, k)
    if log_probs.dim() > 1:
        problem = problem.each(lambda x: x if x.dim() == 3 else x.reshape(-1))
    total, losses, _, _ = _list_loss(log_probs.reshape(-1), problem, backend)
    return _reduce(total, losses, reduction)


class LinearPerPOOutput(NamedTuple):
    """What `linear_perpo_loss` returns; all but the loss is detached."""

    loss: Tensor  # [] or [G]
    log_probs: Tensor  # [S]: Σ_t ω_t log π(y_it)
    scores: Tensor  # [S]: what the objective ranks, log π − log π_ref
    rewards: Tensor  # [S]: NaN for an invalid candidate
    active: Tensor  # [G]: 1 if the list has a preferred pair, else 0
    cu_lists: Tensor  # [G + 1]
    beta: float
    list_weights: Tensor | None = None  # [G]

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Scalars under TRL's names, detached and still on the device; computed when asked for.

        rewards/chosen, rewards/rejected: β·(log π − log π_ref) of the best and the worst candidate, mean over active
        lists; rewards/margins: their difference; lists/pair_accuracy: share of preferred pairs that the scores rank
        right, mean over active lists; lists/active: share of lists that have a preferred pair at all. With
        `list_weights` the means over active lists are weighted, Σ w x / Σ w; lists/active is not.
        """
        ranking = metrics.rank(self.scores, self.rewards, self.cu_lists)
        scores = self.beta * self.scores
        of_lists = (
            metrics.pick(scores, ranking.best),
            metrics.pick(scores, ranking.worst),
            ranking.pair_accuracy.to(scores.dtype),
        )
        weights = self.active if self.list_weights is None else metrics.list_weights(self.active, self.list_weights)
        total = weights.sum()
        values = torch.stack(of_lists).where(weights > 0, 0.0)
        chosen, rejected, right = (weights * values).sum(-1) / total.where(total > 0, 1.0)
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "lists/pair_accuracy": right,
            "lists/active": self.active.sum() / max(self.active.shape[0], 1),
        }


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
    list_weights: Tensor | None = None,  # [G]
    delta: Tensor | None = None,  # [] or [1]
    beta: float | None = None,
    gamma: float | None = None,
    reduction: str = "mean",
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    max_chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    objective: Objective | None = None,
    group: Group = None,
    backend: str = "auto",
) -> LinearPerPOOutput:
    """The PerPO loss from the hidden states of packed response tokens: no logits, no host synchronisation.

    GEMMs of T × V × H: one under no_grad, two with a frozen head (forward and backward together), three with a
    trainable one when each list fits `max_chunk_bytes` and the layout is on the CPU or all tokens fit at once,
    otherwise four; with `group`, one, two and four of T × V_r × H on each rank.

    Args:
        hidden: [T, H], the states that predict the labels: response positions only, all candidates of all lists one
            after another.
        weight, bias, temperature, softcap, logit_scale, ignore_index, logits_dtype, group: as `linear_token_log_probs`.
        max_chunk_bytes: likewise; None lets the D of a trainable head take as much as its weight's gradient in fp32.
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
        pair_weights, flip_probs, list_weights, delta: as `perpo_loss`; the objective says whether they are needed.
        beta, gamma, reduction, objective: as `perpo_loss`.
        backend: "auto", "triton", "eager" or "reference".

    Returns:
        LinearPerPOOutput: loss (differentiable in hidden, weight and bias), log_probs [S] and metrics (detached).

    Raises:
        ValueError, TypeError: arguments that do not fit, by name.
    """
    hidden, weight, bias, place = take_slice(hidden, weight, bias, group)
    hidden, weight, bias = checks.head(hidden, weight, bias, packed=True)
    checks.labels(labels, hidden.shape[:-1], "hidden.shape[:-1]", hidden.device)
    for name, x in (("cu_seqlens", cu_seqlens), ("cu_lists", cu_lists)):
        checks.layout(name, x, hidden.device)
    labels = labels.contiguous()
    if token_weights is not None:
        checks.token_weights(token_weights, labels)
        labels = labels.masked_fill(token_weights == 0, ignore_index)
    problem = ListProblem(
        rewards,
        cu_lists,
        cu_seqlens,
        labels,
        ref_log_probs,
        token_weights=token_weights,
        pair_weights=pair_weights,
        flip_probs=flip_probs,
        list_weights=list_weights,
        delta=delta,
        objective=checks.objective(objective, beta, gamma),
        ignore_index=ignore_index,
    )
    shape = torch.Size([cu_seqlens.shape[0] - 1])
    checks.candidates(problem, shape, f"be [S] = {list(shape)}, as cu_seqlens says", hidden.device)
    checks.objective_data(problem)
    checks.pair_weights(pair_weights, cu_lists, hidden.device)
    checks.reduction(reduction)
    z = checks.logit_map(temperature, softcap, logit_scale, ignore_index)
    memory = checks.chunk_bytes(max_chunk_bytes), checks.logits_dtype(logits_dtype, weight.dtype)
    need = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    if any(need[1:]) and reduction != "none" and place is None and not _is_reference(backend):
        total, _, candidates, active, *_ = linear.linear_list_loss(
            hidden.contiguous(),
            weight,
            bias,
            problem.each(_normal).pack(),
            *packed(z, problem.objective),
            ignore_index,
            *memory,
            backend,
            need,
        )
        losses = active  # as long; only its length is read
    else:
        tokens = _linear_log_probs(hidden, weight, bias, labels, z, *memory, backend, place)
        total, losses, candidates, active = _list_loss(tokens, problem, backend)
    loss = _reduce(total, losses, reduction)
    log_probs, scores, ranked_rewards = candidates.detach()
    beta = problem.objective.beta
    return LinearPerPOOutput(loss, log_probs, scores, ranked_rewards, active.detach(), cu_lists, beta, list_weights)


# ---------------------------------------------------- the operators, or the definition itself, which is no operator


def _is_reference(backend: str) -> bool:
    checks.backend(backend)
    return (os.environ.get("PERPO_BACKEND", "auto") if backend == "auto" else backend) == "reference"


def _linear_log_probs(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [T]
    z: LogitMap,
    chunk_bytes: int,
    logits_dtype: torch.dtype,
    backend: str,
    place: Slice | None,
) -> Tensor:  # [T]
    if _is_reference(backend):
        if place is not None:
            weight, bias = whole(weight, place), None if bias is None else whole(bias, place)
        checks.label_values(labels, weight.shape[0], z.ignore_index)
        wide_bias = None if bias is None else bias.to(logits_dtype)
        factors = hidden.to(logits_dtype), weight.to(logits_dtype), wide_bias
        logits = reference.head_logits(*factors, z.softcap, z.logit_scale)
        wide = logits.to(accumulation_dtype(logits.dtype))
        return reference.token_log_probs(wide, labels, z.temperature, z.ignore_index)
    keep_derivative = torch.is_grad_enabled() and hidden.requires_grad
    tensors = hidden.contiguous(), weight, bias, _normal(labels).contiguous()
    settings = *packed(z), z.ignore_index, chunk_bytes, logits_dtype, backend
    if place is not None:
        return vocab_parallel.vocab_parallel_log_probs(*tensors, *settings, *place, keep_derivative)[0]
    return linear.linear_log_probs(*tensors, *settings, keep_derivative)[0]


def _list_loss(log_probs: Tensor, problem: ListProblem, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> Σ losses [], losses [G], candidates [3, S], active [G]."""
    if _is_reference(backend):
        checks.list_values(problem, log_probs.shape[0])
        dtype = accumulation_dtype(log_probs.dtype)  # as the other backends compute
        wide, problem = log_probs.to(dtype), problem.each(lambda x: x.to(dtype) if x.is_floating_point() else x)
        losses = reference.list_losses(wide, problem)
        return losses.sum(), losses, *reference.ranked_by(wide, problem)
    numbers = packed(problem.objective)
    data = [x if x is None else _normal(x) for x in problem.pack()]
    total, losses, _, candidates, active = list_ops.list_loss(log_probs, data, *numbers, problem.ignore_index, backend)
    return total, losses, candidates, active


def _normal(x: Tensor) -> Tensor:
    """A copy of a tensor that was made under inference mode, which autograd refuses to keep; else the tensor."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not x.is_inference():
        return x
    return x.clone()


def _reduce(total: Tensor, losses: Tensor, reduction: str) -> Tensor:
    """The scalar or [G] asked for; a batch without lists has mean 0, attached to the graph."""
    if reduction == "none":
        return losses
    return total if reduction == "sum" or losses.shape[0] <= 1 else total / losses.shape[0]
