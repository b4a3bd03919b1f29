"""list_loss in plain PyTorch: all pairs of a few lists at a time, as tiles [lists, k, k] padded to the longest list.

Formulas: `perpo_kernels.objectives`. The gradient is written out; autograd is not used.
"""

import functools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from perpo_kernels.backends.eager.list_terms import (
    Candidates,
    bco_term,
    better,
    lambda_weight,
    link,
    plackett_luce,
    policy_gradient,
)
from perpo_kernels.objectives import Objective
from perpo_kernels.problem import ListProblem, ListResult

PAIRS_AT_ONCE = 1 << 22
TAME = 1e12  # Σ |numbers| of all candidates, over max(1, β): no square of a difference of two overflows

LOG_SIGMOID, LOG_SIGMOID_SLOPE = torch.ops.aten.log_sigmoid_forward.default, torch.ops.aten.log_sigmoid_backward.default
FAST_GAMMA = 0.25  # from here on a margin of the smallest normal number has no weight beside the largest one


def list_loss(log_probs: Tensor, problem: ListProblem, result: ListResult) -> None:
    """The longest list is read on the host: free on the CPU, a few synchronisations on a device."""
    p = problem
    bounds = p.cu_lists.tolist()
    here = None if bounds[0] == 0 and bounds[-1] == p.rewards.shape[0] else slice(bounds[0], bounds[-1])
    n = bounds[-1] - bounds[0]
    k = max(map(operator.sub, bounds[1:], bounds), default=0)
    if k == 0:
        result.losses.zero_()
        result.active.zero_()
        return
    everyone, counts = _candidates(log_probs, p, here, result)
    d_score: Tensor | None = None
    d_log_prob: Tensor | None = None
    for lists, place, inside in _blocks(p.cu_lists, bounds[0], n, k):
        score, log_prob, reward = (_at(x, place).view(-1, k) for x in everyone[:3])
        if inside is not None:
            reward = reward.masked_fill(~inside, torch.nan)
        flips = None if everyone.flip_prob is None else _at(everyone.flip_prob, place).view(-1, k)
        some = Candidates(score, log_prob, reward, flips, everyone.tame and inside is None)
        given = None if p.pair_weights is None else _at(p.pair_weights, lists)[:, :k, :k]
        loss, slope, likelihood, active = lists_of_k(some, given, p.delta, p.objective)
        if p.list_weights is not None:
            slope, likelihood = _weigh(_at(p.list_weights, lists), loss, slope, likelihood)
        _at(result.losses, lists).copy_(loss)
        _at(result.active, lists).copy_(active)
        d_score = _put(d_score, slope, place, inside, n)
        d_log_prob = _put(d_log_prob, likelihood, place, inside, n)
    assert d_score is not None
    if p.objective.length_normalized and counts is not None:
        d_score = d_score / counts.clamp(min=1)
    if p.objective.nll_per_token and counts is not None and d_log_prob is not None:
        d_log_prob = d_log_prob / counts.clamp(min=1)
    _write_coefficients(p, here, d_score if d_log_prob is None else d_score + d_log_prob, result)


def _at(x: Tensor, place: Any) -> Tensor:
    """x[place]; None is all of it."""
    return x if place is None else x[place]


def _put(total: Tensor | None, values: Tensor | None, place: Any, inside: Tensor | None, n: int) -> Tensor | None:
    """The values [lists, k] of a block, where its candidates are among all n."""
    if values is None:
        return total
    if place is None:
        return values.view(-1)
    total = values.new_zeros(n) if total is None else total
    if inside is None:
        total[place] = values.view(-1)
    else:
        total[place[inside.view(-1)]] = values[inside]
    return total


def _weigh(
    weights: Tensor,  # [n]
    losses: Tensor,  # [n], written to
    slope: Tensor,  # [n, k]
    likelihood: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Losses and slopes times the weights of the lists; 0 at weight 0, whatever they are."""
    on, weights = weights > 0, weights.to(losses.dtype)
    losses.mul_(weights).masked_fill_(~on, 0.0)
    on, weights = on.unsqueeze(-1), weights.unsqueeze(-1)
    return (slope * weights).where(on, 0.0), None if likelihood is None else (likelihood * weights).where(on, 0.0)


def _blocks(cu_lists: Tensor, first: int, n: int, k: int) -> Iterator[tuple[Any, Any, Tensor | None]]:
    """Blocks of lists: which, where their candidates are counted from the `first` of n, and which of k exist.

    None is all of them: one block of lists of k, as in most batches, is not indexed.
    """
    n_lists, at_once = cu_lists.shape[0] - 1, max(1, PAIRS_AT_ONCE // (k * k))
    equal = n_lists * k == n
    if equal and n_lists <= at_once:
        yield None, None, None
        return
    slot = None if equal else torch.arange(k, device=cu_lists.device)
    for start in range(0, n_lists, at_once):
        lists = slice(start, min(start + at_once, n_lists))
        if slot is None:
            yield lists, slice(lists.start * k, lists.stop * k), None
            continue
        inside = slot < (cu_lists[lists.start + 1 : lists.stop + 1] - cu_lists[lists])[:, None]
        place = torch.where(inside, cu_lists[lists, None] + slot - first, 0).long()
        yield lists, place.view(-1), inside


def _candidates(
    log_probs: Tensor, p: ListProblem, here: slice | None, result: ListResult
) -> tuple[Candidates, Tensor | None]:
    """The candidates of all lists, and their numbers of valid tokens where they are known."""
    dtype = result.losses.dtype
    counts: Tensor | None = None
    if p.cu_seqlens is None or p.labels is None:
        sums = _at(log_probs, here).to(dtype)
        if p.lengths is not None:
            counts = _at(p.lengths, here).to(dtype)
    else:
        sums, counts = _sums_of_tokens(log_probs, p, here, dtype)
    present = None if counts is None else counts > 0
    if p.valid is not None:
        valid = _at(p.valid, here)
        present = valid if present is None else present & valid
        sums = sums.where(valid, 0.0)
    rewards = _at(p.rewards, here).to(dtype)
    score = sums if p.ref_log_probs is None else sums - _at(p.ref_log_probs, here).to(dtype)
    if p.objective.length_normalized and counts is not None:
        score = score / counts.clamp(min=1)
    out = result.candidates if here is None else result.candidates[:, here]
    written = torch.stack([sums, score, rewards], out=out)
    # NaN and inf are not below anything
    size = float(torch.linalg.vector_norm(written, 1)) * max(1.0, p.objective.beta)
    tame = size < TAME and (present is None or bool(present.all()))
    if not tame:
        taking_part = rewards.isfinite() if present is None else present & rewards.isfinite()
        rewards = rewards.masked_fill(~taking_part, torch.nan)
        written[2] = rewards
    flips = None if p.flip_probs is None else _at(p.flip_probs, here).to(dtype)
    if p.objective.nll_per_token and counts is not None:
        sums = sums / counts.clamp(min=1)
    return Candidates(score, sums, rewards, flips, tame), counts


def _sums_of_tokens(log_probs: Tensor, p: ListProblem, here: slice | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Σ ω log π of each candidate, and its number of tokens that count."""
    assert p.cu_seqlens is not None
    assert p.labels is not None
    bounds = p.cu_seqlens if here is None else p.cu_seqlens[here.start : here.stop + 1]
    tokens = slice(int(bounds[0]), int(bounds[-1]))
    lengths = bounds.diff().long()
    kept = p.labels[tokens] != p.ignore_index
    of_tokens = log_probs[tokens].to(dtype)
    if p.token_weights is not None:
        weights = p.token_weights[tokens]
        kept &= weights != 0
        of_tokens = of_tokens * weights
    if bool(kept.all()):
        return _segment_sum(of_tokens, lengths), lengths.to(dtype)
    return _segment_sum(torch.where(kept, of_tokens, 0.0), lengths), _segment_sum(kept.to(dtype), lengths)


def _segment_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums of consecutive runs, in a fixed order; torch.segment_reduce refuses to make none."""
    if lengths.numel() == 0:
        return values.new_zeros(0)
    return torch.segment_reduce(values, "sum", lengths=lengths, initial=0.0)


def _write_coefficients(p: ListProblem, here: slice | None, gradient: Tensor, result: ListResult) -> None:
    if p.cu_seqlens is None:
        _at(result.coefficients, here).copy_(gradient)
        return
    bounds = p.cu_seqlens if here is None else p.cu_seqlens[here.start : here.stop + 1]
    tokens = slice(int(bounds[0]), int(bounds[-1]))
    result.coefficients[tokens] = torch.repeat_interleave(gradient, bounds.diff())
    if p.token_weights is not None and p.labels is not None:  # those of ignored tokens may be anything
        ignored = p.labels[tokens] == p.ignore_index
        result.coefficients[tokens] *= p.token_weights[tokens].masked_fill(ignored, 0.0)


def lists_of_k(
    c: Candidates, given: Tensor | None, delta: Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """[n, k] candidates -> loss [n], ∂loss/∂s [n, k], ∂loss/∂(Σ log π) [n, k] or None, whether active [n]."""
    o = objective
    dtype = c.score.dtype
    if c.tame and is_like_perpo(o):
        loss, slope, spread = like_perpo(c.score, c.reward, c.flip_prob, o)
        return loss, slope.mul_(o.beta), None, spread.view(-1) > 0
    member = None if c.tame else ~c.reward.isnan()
    highest = (c.reward if c.tame else c.reward.nan_to_num(nan=-torch.inf)).amax(-1, keepdim=True)
    lowest = (c.reward if c.tame else c.reward.nan_to_num(nan=torch.inf)).amin(-1, keepdim=True)
    active = (highest > lowest).squeeze(-1)
    if given is not None:
        given = given.to(dtype)
        if member is not None:
            given = given.masked_fill(~(member.unsqueeze(-1) & member.unsqueeze(-2)), 0.0)
        active = (given > 0).flatten(-2).any(-1)

    z = o.beta * (c.score if member is None else c.score.masked_fill(~member, 0.0))
    terms: list[tuple[Tensor, Tensor]] = []  # loss [n] and ∂loss/∂z [n, k]

    def add(scale: float, loss: Tensor, slope: Tensor) -> None:
        terms.append((loss, slope) if scale == 1 else (scale * loss, scale * slope))

    if o.pairs != "none":
        add(o.pair_scale, *_pair_term(c, _ahead(z, o.offset), given, highest, lowest, o))
    if c.tame and o.list_term == o.pointwise == "none" and not o.nll:  # a list without a pair has loss 0 already
        (loss, slope), *_ = terms
        return loss, slope.mul_(o.beta), None, active
    if member is None:
        member = torch.ones_like(c.reward, dtype=torch.bool)
    is_best = c.reward == highest
    best_share = is_best.to(dtype) / is_best.sum(-1, keepdim=True).clamp(min=1)
    p = best_share
    if o.target_temperature:
        p = (c.reward / o.target_temperature).masked_fill(~member, -torch.inf).softmax(-1)
    if o.list_term == "softmax":
        log_softmax = z.masked_fill(~member, -torch.inf).log_softmax(-1)
        add(o.list_scale, -torch.where(member, p * log_softmax, 0.0).sum(-1), log_softmax.exp() - p)
    elif o.list_term == "plackett_luce":
        add(o.list_scale, *plackett_luce(c.reward, z))
    if o.pointwise in ("nca", "anchor"):
        loss, slope = -torch.where(member, p * F.logsigmoid(z), 0.0).sum(-1), -p * torch.sigmoid(-z)
        if o.pointwise == "nca":
            share = member.to(dtype) / member.sum(-1, keepdim=True).clamp(min=1)
            loss, slope = loss - (share * F.logsigmoid(-z)).sum(-1), slope + share * torch.sigmoid(z)
        add(o.pointwise_scale, loss, slope)
    elif o.pointwise == "bco":
        add(o.pointwise_scale, *bco_term(z if delta is None else z - delta, best_share, c.reward == lowest))
    elif o.pointwise != "none":
        add(o.pointwise_scale, *policy_gradient(c, z, highest, lowest, o))
    loss, slope = (functools.reduce(torch.add, parts) for parts in zip(*terms, strict=True))
    likelihood = None
    on = active.unsqueeze(-1) & member
    if o.nll:
        loss = loss - o.nll * torch.where(is_best, best_share * c.log_prob, 0.0).sum(-1)
        likelihood = (-o.nll * best_share).where(on, 0.0)
    return loss.where(active, 0.0), (o.beta * slope).where(on, 0.0), likelihood, active


def is_like_perpo(o: Objective) -> bool:
    """Whether the loss is that of pairs alone, with weights that `_share_powers` gives: few operators."""
    return _has_share_powers(o) and o.list_term == o.pointwise == "none" and not o.nll and o.pair_scale == 1


def like_perpo(score: Tensor, reward: Tensor, flip_prob: Tensor | None, o: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """[n, k] of tame numbers -> loss [n], ∂loss/∂(βs) [n, k], range of the rewards [n, 1, 1].

    Of a NaN, an infinite number, or two whose difference is infinite, the loss is not finite: the difference of a
    number from itself, or the range, is NaN then.
    """
    weight, spread = _share_powers(reward, o)
    loss, slope = _weighted(weight, None, _ahead(score * o.beta, o.offset), flip_prob, o)
    return loss, slope, spread


def _ahead(z: Tensor, offset: float) -> Tensor:
    """[n, i, j]: z_i − z_j − offset."""
    d = z.unsqueeze(-1) - z.unsqueeze(-2)
    return d - offset if offset else d


def _pair_term(
    c: Candidates,
    d: Tensor,  # [n, k, k]: z_i − z_j − offset
    given: Tensor | None,  # [n, k, k]
    highest: Tensor,  # [n, 1]
    lowest: Tensor,
    o: Objective,
) -> tuple[Tensor, Tensor]:
    """Σ w_ij ℓ(d_ij) [n] and its slope in z [n, k]. Outside of the pairs w is 0, and ℓ is finite."""
    if c.tame and _has_share_powers(o):
        return _weighted(_share_powers(c.reward, o)[0], None, d, c.flip_prob, o)
    if given is not None:
        pair = given > 0
        weight = given.where(pair, 0.0)
    else:
        pair = better(c.reward)
        if o.pairs != "all":
            pair = pair & (c.reward == highest).unsqueeze(-1)
        if o.pairs == "best_vs_worst":
            pair = pair & (c.reward == lowest).unsqueeze(-2)
        if o.weight == "power":
            weight = _power_weight(c.reward, pair, highest, lowest, o)
        elif o.weight == "lambda":
            weight = lambda_weight(c, o.beta * c.score).where(pair, 0.0)
        else:
            weight = pair.to(d.dtype)
    if not c.tame:
        d = d.where(pair, 0.0)
    if o.log_margin:
        gap = torch.where(pair, c.reward.unsqueeze(-1) - c.reward.unsqueeze(-2), 1.0)
        d = d - o.log_margin * gap.log()
    return _weighted(weight, pair, d, c.flip_prob, o)


def _has_share_powers(o: Objective) -> bool:
    over_list = (o.pairs, o.weight, o.normalize) == ("all", "power", "list")
    return over_list and o.gamma >= FAST_GAMMA and not o.log_margin


def _share_powers(reward: Tensor, o: Objective) -> tuple[Tensor, Tensor]:
    """((r_i − r_j) / range)^γ of tame rewards, 0 where that is not positive [n, k, k], and the range [n, 1, 1]."""
    gap = reward.unsqueeze(-1) - reward.unsqueeze(-2)
    spread = gap.amax((-2, -1), keepdim=True)
    tiny = torch.finfo(gap.dtype).tiny
    weight = gap.div_(spread.clamp_min(tiny)).clamp_min_(tiny).pow_(o.gamma)  # roots of 0 are slow
    return torch.threshold_(weight, (1.001 * tiny) ** o.gamma, 0.0), spread


def _weighted(
    weight: Tensor, pair: Tensor | None, d: Tensor, flip_prob: Tensor | None, o: Objective
) -> tuple[Tensor, Tensor]:
    """Σ w ℓ(d), normalised, and its slope. `pair` None: where w is not 0, by which no objective normalises."""
    if o.link == "logistic" and flip_prob is None and o.soft_target == 1:  # the same in half of the operators
        log_sigmoid, kept = LOG_SIGMOID(d)
        push = LOG_SIGMOID_SLOPE(weight, d, kept)  # w σ(−d) = −w ℓ'(d)
        loss, slope = log_sigmoid.mul_(weight).sum((-2, -1)).neg_(), push.sum(-2).sub_(push.sum(-1))
    else:
        loss, slope = link(d, flip_prob, o)
        pull = slope.mul_(weight)
        loss, slope = loss.mul_(weight).sum((-2, -1)), pull.sum(-1).sub_(pull.sum(-2))
    if o.normalize != "none":
        total = (weight if o.normalize == "list" or pair is None else pair).sum((-2, -1)).to(d.dtype)
        scale = total.clamp_min_(torch.finfo(d.dtype).tiny).reciprocal_()
        loss, slope = loss.mul_(scale), slope.mul_(scale.unsqueeze(-1))
    return loss, slope


def _power_weight(reward: Tensor, pair: Tensor, highest: Tensor, lowest: Tensor, o: Objective) -> Tensor:
    """(r_i − r_j)^γ over the pairs, else 0; in multiples of the range^γ where the sum over the list divides it out."""
    gap = reward.unsqueeze(-1) - reward.unsqueeze(-2)
    if o.normalize == "list":
        spread = (highest - lowest).unsqueeze(-1)
        if bool(spread.isinf().any()):  # differences of halves are finite for all rewards
            half = 0.5 * reward
            gap, spread = half.unsqueeze(-1) - half.unsqueeze(-2), (0.5 * highest - 0.5 * lowest).unsqueeze(-1)
        gap = gap / spread
    return gap.masked_fill(~pair, 1.0).pow(o.gamma).masked_fill(~pair, 0.0)
