"""The definition: plain PyTorch, differentiable by autograd, one loop a sum, nothing fused. The oracle of every test.

Works in the dtype that it is given, so float64 in means float64 throughout. Slow on purpose: read it to learn what is
computed.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from perpo_kernels.objectives import Objective


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


class Lists(NamedTuple):
    """What an objective reads: one entry a candidate, candidates of list g at cu_lists[g] .. cu_lists[g + 1]."""

    log_probs: Tensor  # [S]: Σ_t ω_t log π
    rewards: Tensor  # [S]
    cu_lists: Tensor  # int [G + 1]
    ref_log_probs: Tensor | None = None  # [S]
    valid: Tensor | None = None  # bool [S]
    lengths: Tensor | None = None  # [S], for length-normalised scores
    pair_weights: Tensor | None = None  # [G, k, k], for pairs="given"
    flip_probs: Tensor | None = None  # [S]: probability that a preference over this candidate is wrong

    def scores(self, objective: Objective) -> Tensor:  # [S]
        scores = self.log_probs if self.ref_log_probs is None else self.log_probs - self.ref_log_probs
        if not objective.length_normalized or self.lengths is None:
            return scores
        return scores / self.lengths.clamp(min=1)

    def members(self) -> Iterator[list[int]]:
        """The candidates of each list that take part."""
        for start, end in pairwise(self.cu_lists.tolist()):
            yield [
                i
                for i in range(start, end)
                if (self.valid is None or self.valid[i])
                and (self.lengths is None or self.lengths[i] > 0)
                and torch.isfinite(self.rewards[i])
            ]


def list_losses(lists: Lists, objective: Objective) -> Tensor:  # [G]
    """The objective of each list, term by term as in `perpo_kernels.objectives`; 0 without a preferred pair."""
    scores = lists.scores(objective)
    losses = []
    for g, members in enumerate(lists.members()):
        weights = pair_weights(lists, scores.detach(), g, members, objective)
        if not is_active(lists, g, members, objective):
            # zero, attached to the graph, whatever the scores are
            losses.append(scores.masked_fill(torch.ones_like(scores, dtype=torch.bool), 0.0).sum())
            continue
        loss = pair_term(lists, scores, weights, objective)
        loss = loss + list_term(lists.rewards, scores, members, objective)
        loss = loss + pointwise_term(lists.rewards, scores, members, objective)
        best = target(lists.rewards, members, 0.0)
        losses.append(loss - objective.nll * sum(p * lists.log_probs[i] for i, p in best.items()))
    return torch.stack(losses) if losses else scores.new_zeros(0)


def is_active(lists: Lists, g: int, members: list[int], objective: Objective) -> bool:
    """Whether the list has a preference at all: two different rewards, or a given pair."""
    if objective.pairs == "given":
        assert lists.pair_weights is not None
        places = [i - int(lists.cu_lists[g]) for i in members]
        return bool((lists.pair_weights[g][places][:, places] > 0).any())
    return bool(ranked_pairs(lists.rewards, members))


def ranked_pairs(rewards: Tensor, members: list[int]) -> list[tuple[int, int]]:
    """(i, j) with r_i > r_j."""
    return [(i, j) for i in members for j in members if rewards[i] > rewards[j]]


def pair_weights(
    lists: Lists, scores: Tensor, g: int, members: list[int], objective: Objective
) -> dict[tuple[int, int], Tensor]:
    """w_ij of the pairs that the objective takes, normalised."""
    if objective.pairs == "none":
        return {}
    rewards, start = lists.rewards.to(scores.dtype), int(lists.cu_lists[g])
    if objective.pairs == "given":
        assert lists.pair_weights is not None
        given = lists.pair_weights[g].to(scores.dtype)
        pairs = [(i, j) for i in members for j in members if given[i - start, j - start] > 0]
        weights = {(i, j): given[i - start, j - start] for i, j in pairs}
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


def pair_term(lists: Lists, scores: Tensor, weights: dict[tuple[int, int], Tensor], objective: Objective) -> Tensor:
    """Σ w_ij ℓ(β (s_i − s_j) − m_ij)."""
    total = scores.new_zeros(())
    for (i, j), weight in weights.items():
        margin = objective.offset
        if objective.log_margin:
            margin += objective.log_margin * math.log(float(lists.rewards[i] - lists.rewards[j]))
        d = objective.beta * (scores[i] - scores[j]) - margin
        target = objective.soft_target if lists.flip_probs is None else 1 - float(lists.flip_probs[j])
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


def pointwise_term(rewards: Tensor, scores: Tensor, members: list[int], objective: Objective) -> Tensor:
    total = scores.new_zeros(())
    if objective.pointwise == "none":
        return total
    for i, p in target(rewards, members, objective.target_temperature).items():
        total = total - p * F.logsigmoid(objective.beta * scores[i])
        if objective.pointwise == "nca":
            total = total - F.logsigmoid(-objective.beta * scores[i]) / len(members)
    return total


def target(rewards: Tensor, members: list[int], temperature: float) -> dict[int, float]:
    """p_i: softmax(r / temperature), or the best in equal shares at 0."""
    values = rewards[members].double()
    if temperature == 0:
        best = (values == values.max()).double()
        return dict(zip(members, (best / best.sum()).tolist(), strict=True))
    return dict(zip(members, (values / temperature).softmax(0).tolist(), strict=True))


def list_stats(lists: Lists, objective: Objective) -> Tensor:  # [4, G]
    """Rows: β·score of best and of worst candidate, share of preferred pairs ranked right, 1 if there is a pair."""
    scores, rewards = lists.scores(objective).detach(), lists.rewards
    stats = scores.new_zeros(4, lists.cu_lists.numel() - 1)
    for g, members in enumerate(lists.members()):
        if is_active(lists, g, members, objective):
            pairs = ranked_pairs(rewards, members)
            best = max(members, key=lambda i: float(rewards[i]))  # the first of equals
            worst = min(members, key=lambda i: float(rewards[i]))
            right = sum(bool(scores[i] > scores[j]) for i, j in pairs) / max(len(pairs), 1)
            chosen, rejected = (objective.beta * float(scores[i]) for i in (best, worst))
            stats[:, g] = scores.new_tensor([chosen, rejected, right, 1.0])
    return stats
