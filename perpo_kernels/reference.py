"""The definition: plain PyTorch, differentiable by autograd, one loop for each sum. The oracle of every test.

It works in the dtype that it is given: float64 inputs are computed in float64 throughout. It is slow on purpose; read
it to learn what the other backends compute.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from perpo_kernels.objectives import LARGEST_LOG_RATIO, Objective
from perpo_kernels.problem import ListProblem


def token_log_probs(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:  # [...]
    """log softmax(logits / temperature)[label], 0 where the label is `ignore_index`."""
    ignored = labels == ignore_index
    target = labels.masked_fill(ignored, 0)
    log_probs = F.log_softmax(logits / temperature, dim=-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return torch.where(ignored, 0.0, log_probs)


def head_logits(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:  # [..., V]
    """logit_scale · (hidden · weightᵀ + bias), then softcap · tanh(· / softcap)."""
    logits = F.linear(hidden, weight, bias) * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def sequence_log_probs(
    log_probs: Tensor,  # [T], 0 at ignored tokens
    labels: Tensor,  # [T]
    cu_seqlens: Tensor,  # int [S + 1]
    ignore_index: int = -100,
    token_weights: Tensor | None = None,  # [T]
) -> tuple[Tensor, Tensor]:  # [S], int [S]
    """Σ_t ω_t log π(y_t) over the valid tokens of each candidate, and how many there are; weight 0 is not valid."""
    valid = labels != ignore_index
    if token_weights is not None:
        valid = valid & (token_weights != 0)
        log_probs = torch.where(valid, log_probs * token_weights.masked_fill(~valid, 0.0), 0.0)
    spans = list(pairwise(cu_seqlens.tolist()))
    sums = [log_probs[a:b].sum() for a, b in spans]
    counts = [int(valid[a:b].sum()) for a, b in spans]
    return (torch.stack(sums) if sums else log_probs.new_zeros(0)), torch.tensor(counts, device=log_probs.device)


def per_candidate(log_probs: Tensor, problem: ListProblem) -> tuple[Tensor, ListProblem]:
    """Log-probs of whole responses [S] and the problem of candidates, from log-probs [T] and a problem of tokens."""
    if problem.cu_seqlens is None or problem.labels is None:
        return log_probs, problem
    sums, lengths = sequence_log_probs(
        log_probs, problem.labels, problem.cu_seqlens, problem.ignore_index, problem.token_weights
    )
    return sums, problem._replace(cu_seqlens=None, labels=None, token_weights=None, lengths=lengths)


def scores(log_probs: Tensor, problem: ListProblem) -> Tensor:  # [S]
    """s = Σ_t ω_t log π − log π_ref, divided by the number of tokens if the objective says so."""
    ratio = log_probs if problem.ref_log_probs is None else log_probs - problem.ref_log_probs
    if not problem.objective.length_normalized or problem.lengths is None:
        return ratio
    return ratio / problem.lengths.clamp(min=1)


def members(problem: ListProblem) -> Iterator[list[int]]:
    """The candidates of each list that take part: not padding, not empty, with a finite reward."""
    for start, end in pairwise(problem.cu_lists.tolist()):
        yield [
            i
            for i in range(start, end)
            if (problem.valid is None or problem.valid[i])
            and (problem.lengths is None or problem.lengths[i] > 0)
            and torch.isfinite(problem.rewards[i])
        ]


def list_losses(log_probs: Tensor, problem: ListProblem) -> Tensor:  # [G]
    """The objective of each list, term by term as in `perpo_kernels.objectives`, times the list's weight; 0 without a
    preferred pair or at weight 0."""
    log_probs, problem = per_candidate(log_probs, problem)
    s, rewards, objective = scores(log_probs, problem), problem.rewards, problem.objective
    losses = []
    for g, inside in enumerate(members(problem)):
        weight = 1.0 if problem.list_weights is None else float(problem.list_weights[g])
        if weight == 0 or not is_active(problem, g, inside):
            # zero, attached to the graph, whatever the scores are
            losses.append(s.masked_fill(torch.ones_like(s, dtype=torch.bool), 0.0).sum())
            continue
        loss = objective.pair_scale * pair_term(problem, s, pair_weights(problem, s.detach(), g, inside))
        loss = loss + objective.list_scale * list_term(rewards, s, inside, objective)
        loss = loss + objective.pointwise_scale * pointwise_term(problem, s, inside)
        for i, p in target(rewards, inside, 0.0).items():
            n_tokens = problem.lengths[i] if objective.nll_per_token and problem.lengths is not None else 1
            loss = loss - objective.nll * p * log_probs[i] / n_tokens
        losses.append(weight * loss)
    return torch.stack(losses) if losses else s.new_zeros(0)


def ranked_by(log_probs: Tensor, problem: ListProblem) -> tuple[Tensor, Tensor]:
    """What metrics are made of: candidates [3, S] (Σ ω log π, score, reward or NaN for one that takes no part), and
    active [G] (1 for a list with a preferred pair)."""
    log_probs, problem = per_candidate(log_probs, problem)
    lists = list(members(problem))
    part = [i for inside in lists for i in inside]
    rewards = torch.full_like(log_probs, math.nan)
    rewards[part] = problem.rewards[part].to(rewards.dtype)
    active = log_probs.new_tensor([is_active(problem, g, inside) for g, inside in enumerate(lists)])
    return torch.stack([log_probs, scores(log_probs, problem), rewards]).detach(), active


def is_active(problem: ListProblem, g: int, members: list[int]) -> bool:
    """Whether the list has a preference at all: two different rewards, or a given pair."""
    if problem.objective.pairs == "given":
        return bool(given_weights(problem, g, members))
    return bool(ranked_pairs(problem.rewards, members))


def given_weights(problem: ListProblem, g: int, members: list[int]) -> dict[tuple[int, int], Tensor]:
    """The positive entries of the matrix of list g, whose rows and columns are places in the list."""
    assert problem.pair_weights is not None
    matrix, start = problem.pair_weights[g], int(problem.cu_lists[g])
    weights = {(i, j): matrix[i - start, j - start] for i in members for j in members}
    return {pair: w for pair, w in weights.items() if w > 0}


def ranked_pairs(rewards: Tensor, members: list[int]) -> list[tuple[int, int]]:
    """(i, j) with r_i > r_j."""
    return [(i, j) for i in members for j in members if rewards[i] > rewards[j]]


def pair_weights(problem: ListProblem, scores: Tensor, g: int, members: list[int]) -> dict[tuple[int, int], Tensor]:
    """w_ij of the pairs that the objective takes, normalised."""
    objective, rewards = problem.objective, problem.rewards.to(scores.dtype)
    if objective.pairs == "none":
        return {}
    if objective.pairs == "given":
        weights = {pair: w.to(scores.dtype) for pair, w in given_weights(problem, g, members).items()}
    else:
        top, bottom = (f((float(rewards[i]) for i in members), default=0.0) for f in (max, min))
        pairs = [
            (i, j)
            for i, j in ranked_pairs(rewards, members)
            if (objective.pairs == "all" or rewards[i] == top)
            and (objective.pairs != "best_vs_worst" or rewards[j] == bottom)
        ]
        # What is normalised per list does not depend on the unit; the range as unit keeps large exponents finite.
        unit = top - bottom if objective.normalize == "list" else 1.0
        weights = {pair: pair_weight(rewards, scores, members, *pair, unit, objective) for pair in pairs}
    if objective.normalize == "list" and weights:
        total = torch.stack(list(weights.values())).sum()
        return {pair: w / total for pair, w in weights.items()}
    n_pairs = len(weights) if objective.normalize == "pairs" else 1
    return {pair: w / n_pairs for pair, w in weights.items()}


def pair_weight(
    rewards: Tensor, scores: Tensor, members: list[int], i: int, j: int, unit: float, objective: Objective
) -> Tensor:
    """w_ij before normalisation, for r_i > r_j; rewards in multiples of `unit`."""
    if objective.weight == "uniform":
        return rewards.new_ones(())
    if objective.weight == "power":
        share = (rewards[i].double() - rewards[j].double()) / unit  # of fp32 rewards, the difference may leave fp32
        return (share**objective.gamma).to(rewards.dtype)
    ranks = {
        a: 1 + sum(bool(scores[b] > scores[a]) or bool(scores[b] == scores[a] and b < a) for b in members)
        for a in (i, j)
    }
    return (2 ** rewards[i] - 2 ** rewards[j]) * abs(1 / math.log(1 + ranks[i]) - 1 / math.log(1 + ranks[j]))


def pair_term(problem: ListProblem, scores: Tensor, weights: dict[tuple[int, int], Tensor]) -> Tensor:
    """Σ w_ij ℓ(β (s_i − s_j) − m_ij)."""
    objective, flips = problem.objective, problem.flip_probs
    total = scores.new_zeros(())
    for (i, j), weight in weights.items():
        margin = objective.offset
        if objective.log_margin:
            margin += objective.log_margin * math.log(float(problem.rewards[i] - problem.rewards[j]))
        d = objective.beta * (scores[i] - scores[j]) - margin
        target = objective.soft_target if flips is None else 1 - float(flips[j])
        if objective.link == "logistic":
            link = -F.logsigmoid(d)
            if target != 1:  # d may be infinite
                link = link + (1 - target) * d
        elif objective.link == "hinge":
            link = F.relu(1 - d)
        elif objective.link == "squared":
            link = ((d - 0.5) / objective.beta) ** 2
        else:
            link = -d
        total = total + weight * link
    return total


def list_term(rewards: Tensor, scores: Tensor, members: list[int], objective: Objective) -> Tensor:
    z = {i: objective.beta * scores[i] for i in members}
    total = scores.new_zeros(())
    if objective.list_term == "softmax":
        normaliser = torch.stack(list(z.values())).logsumexp(0)
        for i, p in target(rewards, members, objective.target_temperature).items():
            total = total + p * (normaliser - z[i])
    elif objective.list_term == "plackett_luce":
        for j in members:
            if any(rewards[m] < rewards[j] for m in members):
                rest = torch.stack([z[m] for m in members if rewards[m] <= rewards[j]])
                total = total + rest.logsumexp(0) - z[j]
    return total


def pointwise_term(problem: ListProblem, scores: Tensor, members: list[int]) -> Tensor:
    objective, rewards = problem.objective, problem.rewards
    total = scores.new_zeros(())
    if objective.pointwise in ("nca", "anchor"):
        for i, p in target(rewards, members, objective.target_temperature).items():
            total = total - p * F.logsigmoid(objective.beta * scores[i])
            if objective.pointwise == "nca":
                total = total - F.logsigmoid(-objective.beta * scores[i]) / len(members)
    elif objective.pointwise == "bco":
        delta = 0.0 if problem.delta is None else float(problem.delta)
        best, worst = target(rewards, members, 0.0), target(-rewards, members, 0.0)
        for sign, shares in ((1, best), (-1, worst)):
            for i, share in shares.items():
                if share:
                    total = total - share * F.logsigmoid(sign * (objective.beta * scores[i] - delta))
    elif objective.pointwise != "none":
        for i, advantage in advantages(rewards, members, objective.advantage).items():
            gain = advantage * scores[i]
            if objective.pointwise == "clipped":
                ratio = scores[i].clamp(max=LARGEST_LOG_RATIO).exp()
                near = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high)
                gain = torch.minimum(advantage * ratio, advantage * near)
            total = total - objective.beta * gain / len(members)
    return total


def advantages(rewards: Tensor, members: list[int], kind: str) -> dict[int, float]:
    """A_i: r_i less the mean over the list, in multiples of their standard deviation if standardized."""
    values = rewards[members].double()
    values = values - values.mean()
    if kind == "standardized":
        spread = (values.square().sum() / max(len(members) - 1, 1)).sqrt()
        values = values / spread if spread > 0 else torch.zeros_like(values)
    return dict(zip(members, values.tolist(), strict=True))


def target(rewards: Tensor, members: list[int], temperature: float) -> dict[int, float]:
    """p_i: softmax(r / temperature), or the best in equal shares at 0."""
    values = rewards[members].double()
    if temperature == 0:
        best = (values == values.max()).double()
        return dict(zip(members, (best / best.sum()).tolist(), strict=True))
    return dict(zip(members, (values / temperature).softmax(0).tolist(), strict=True))
