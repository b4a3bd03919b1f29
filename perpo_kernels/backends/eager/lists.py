"""list_loss in plain PyTorch: all pairs of a few lists at a time, as tiles [lists, k, k] padded to the longest list.

Formulas: `perpo_kernels.objectives`. The gradient is written out; autograd is not used.
"""

import functools
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from perpo_kernels.objectives import LARGEST_LOG_RATIO, Objective
from perpo_kernels.problem import ListProblem, ListResult

PAIRS_AT_ONCE = 1 << 22
TAME = 1e12  # Σ |numbers| of all candidates, over max(1, β): no square of a difference of two overflows

FAST_GAMMA = 0.25  # from here on a margin of the smallest normal number has no weight beside the largest one


class Candidates(NamedTuple):
    """One entry per candidate; [S], or [n, k] for n lists padded to k."""

    score: Tensor  # s
    log_prob: Tensor  # Σ ω log π; over the number of tokens if the objective's nll is
    reward: Tensor  # NaN for an invalid candidate
    flip_prob: Tensor | None
    tame: bool  # all are valid, and every number is of ordinary size: nothing has to be selected away


def list_loss(log_probs: Tensor, problem: ListProblem, result: ListResult) -> None:
    """The longest list is read on the host: free on the CPU, a few synchronisations on a device."""
    p = problem
    bounds = p.cu_lists.tolist()
    here = slice(bounds[0], bounds[-1])
    k = max((b - a for a, b in pairwise(bounds)), default=0)
    if k == 0:
        result.losses.zero_()
        result.active.zero_()
        return
    everyone, counts = _candidates(log_probs, p, here, result)
    d_score: Tensor | None = None
    d_log_prob: Tensor | None = None
    for lists, place, inside in _blocks(p.cu_lists, here, k):
        score, log_prob, reward = (_at(x, place).view(-1, k) for x in everyone[:3])
        if inside is not None:
            reward = reward.masked_fill(~inside, torch.nan)
        flips = None if everyone.flip_prob is None else everyone.flip_prob[place].view(-1, k)
        some = Candidates(score, log_prob, reward, flips, everyone.tame and inside is None)
        given = None if p.pair_weights is None else p.pair_weights[lists, :k, :k]
        result.losses[lists], slope, likelihood, result.active[lists] = lists_of_k(some, given, p.delta, p.objective)
        if p.list_weights is not None:
            slope, likelihood = _weigh(p.list_weights[lists], result.losses[lists], slope, likelihood)
        d_score = _put(d_score, slope, place, inside, len(everyone.score))
        d_log_prob = _put(d_log_prob, likelihood, place, inside, len(everyone.score))
    assert d_score is not None
    if p.objective.length_normalized and counts is not None:
        d_score = d_score / counts.clamp(min=1)
    if p.objective.nll_per_token and counts is not None and d_log_prob is not None:
        d_log_prob = d_log_prob / counts.clamp(min=1)
    _write_coefficients(p, here, d_score if d_log_prob is None else d_score + d_log_prob, result)


def _at(x: Tensor, place: Any) -> Tensor:
    """x[place], or x itself for a slice of all of it."""
    return x if isinstance(place, slice) and place == slice(0, len(x)) else x[place]


def _put(total: Tensor | None, values: Tensor | None, place: Any, inside: Tensor | None, n: int) -> Tensor | None:
    """The values [lists, k] of a block, where its candidates are among all n."""
    if values is None:
        return total
    if inside is None and values.numel() == n:
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


def _blocks(cu_lists: Tensor, here: slice, k: int) -> Iterator[tuple[slice, Any, Tensor | None]]:
    """Blocks of lists: which, where their candidates are counted from `here`, and which of k exist (None: all)."""
    n_lists, at_once = cu_lists.numel() - 1, max(1, PAIRS_AT_ONCE // (k * k))
    equal = n_lists * k == here.stop - here.start
    slot = None if equal else torch.arange(k, device=cu_lists.device)
    for first in range(0, n_lists, at_once):
        lists = slice(first, min(first + at_once, n_lists))
        if slot is None:
            yield lists, slice(lists.start * k, lists.stop * k), None
            continue
        inside = slot < (cu_lists[lists.start + 1 : lists.stop + 1] - cu_lists[lists])[:, None]
        place = torch.where(inside, cu_lists[lists, None] + slot - here.start, 0).long()
        yield lists, place.view(-1), inside


def _candidates(log_probs: Tensor, p: ListProblem, here: slice, result: ListResult) -> tuple[Candidates, Tensor | None]:
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
    written = torch.stack([sums, score, rewards], out=result.candidates[:, here])
    size = float(written.abs().sum()) * max(1.0, p.objective.beta)  # NaN and inf are not below anything
    tame = size < TAME and (present is None or bool(present.all()))
    if not tame:
        taking_part = rewards.isfinite() if present is None else present & rewards.isfinite()
        rewards = rewards.masked_fill(~taking_part, torch.nan)
        result.candidates[2, here] = rewards
    flips = None if p.flip_probs is None else _at(p.flip_probs, here).to(dtype)
    if p.objective.nll_per_token and counts is not None:
        sums = sums / counts.clamp(min=1)
    return Candidates(score, sums, rewards, flips, tame), counts


def _sums_of_tokens(log_probs: Tensor, p: ListProblem, here: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Σ ω log π of each candidate, and its number of tokens that count."""
    assert p.cu_seqlens is not None
    assert p.labels is not None
    bounds = p.cu_seqlens[here.start : here.stop + 1]
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


def _write_coefficients(p: ListProblem, here: slice, gradient: Tensor, result: ListResult) -> None:
    if p.cu_seqlens is None:
        result.coefficients[here] = gradient
        return
    bounds = p.cu_seqlens[here.start : here.stop + 1]
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
    ahead = z.unsqueeze(-1) - z.unsqueeze(-2)  # [n, i, j]
    terms: list[tuple[Tensor, Tensor]] = []  # loss [n] and ∂loss/∂z [n, k]

    def add(scale: float, loss: Tensor, slope: Tensor) -> None:
        terms.append((loss, slope) if scale == 1 else (scale * loss, scale * slope))

    if o.pairs != "none":
        add(o.pair_scale, *_pair_term(c, ahead, given, highest, lowest, o))
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
        add(o.list_scale, *_plackett_luce(c.reward, z))
    if o.pointwise in ("nca", "anchor"):
        loss, slope = -torch.where(member, p * F.logsigmoid(z), 0.0).sum(-1), -p * torch.sigmoid(-z)
        if o.pointwise == "nca":
            share = member.to(dtype) / member.sum(-1, keepdim=True).clamp(min=1)
            loss, slope = loss - (share * F.logsigmoid(-z)).sum(-1), slope + share * torch.sigmoid(z)
        add(o.pointwise_scale, loss, slope)
    elif o.pointwise == "bco":
        add(o.pointwise_scale, *_bco_term(z if delta is None else z - delta, best_share, c.reward == lowest))
    elif o.pointwise != "none":
        add(o.pointwise_scale, *_policy_gradient(c, z, highest, lowest, o))
    loss, slope = (functools.reduce(torch.add, parts) for parts in zip(*terms, strict=True))
    likelihood = None
    on = active.unsqueeze(-1) & member
    if o.nll:
        loss = loss - o.nll * torch.where(is_best, best_share * c.log_prob, 0.0).sum(-1)
        likelihood = (-o.nll * best_share).where(on, 0.0)
    return loss.where(active, 0.0), (o.beta * slope).where(on, 0.0), likelihood, active


def _better(reward: Tensor) -> Tensor:
    """[n, i, j]: r_i > r_j; false where either is invalid."""
    return reward.unsqueeze(-1) > reward.unsqueeze(-2)


def _pair_term(
    c: Candidates,
    ahead: Tensor,  # [n, k, k]: z_i − z_j
    given: Tensor | None,  # [n, k, k]
    highest: Tensor,  # [n, 1]
    lowest: Tensor,
    o: Objective,
) -> tuple[Tensor, Tensor]:
    """Σ w_ij ℓ(d_ij) [n] and its slope in z [n, k]. Outside of the pairs w is 0, and ℓ is finite."""
    over_list = (o.pairs, o.weight, o.normalize) == ("all", "power", "list")
    if c.tame and over_list and o.gamma >= FAST_GAMMA and not o.log_margin:
        gap = c.reward.unsqueeze(-1) - c.reward.unsqueeze(-2)
        tiny = torch.finfo(gap.dtype).tiny
        share = gap.div_((highest - lowest).clamp_min_(tiny).unsqueeze(-1)).clamp_min_(tiny)  # roots of 0 are slow
        weight = F.threshold(share.pow_(o.gamma), (1.001 * tiny) ** o.gamma, 0.0, inplace=True)
        return _weighted(weight, None, ahead - o.offset if o.offset else ahead, c.flip_prob, o)
    if given is not None:
        pair = given > 0
        weight = given.where(pair, 0.0)
    else:
        pair = _better(c.reward)
        if o.pairs != "all":
            pair = pair & (c.reward == highest).unsqueeze(-1)
        if o.pairs == "best_vs_worst":
            pair = pair & (c.reward == lowest).unsqueeze(-2)
        if o.weight == "power":
            weight = _power_weight(c.reward, pair, highest, lowest, o)
        elif o.weight == "lambda":
            weight = _lambda_weight(c, o.beta * c.score).where(pair, 0.0)
        else:
            weight = pair.to(ahead.dtype)
    d = ahead.where(pair, 0.0)
    if o.offset:
        d = (ahead - o.offset).where(pair, 0.0)
    if o.log_margin:
        gap = torch.where(pair, c.reward.unsqueeze(-1) - c.reward.unsqueeze(-2), 1.0)
        d = d - o.log_margin * gap.log()
    return _weighted(weight, pair, d, c.flip_prob, o)


def _weighted(
    weight: Tensor, pair: Tensor | None, d: Tensor, flip_prob: Tensor | None, o: Objective
) -> tuple[Tensor, Tensor]:
    """Σ w ℓ(d), normalised, and its slope. `pair` None: where w is not 0, by which no objective normalises."""
    link, slope = _link(d, flip_prob, o)
    loss = link.mul_(weight).sum((-2, -1))
    pull = slope.mul_(weight)
    slope = pull.sum(-1).sub_(pull.sum(-2))
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


def _link(d: Tensor, flip_prob: Tensor | None, o: Objective) -> tuple[Tensor, Tensor]:
    """ℓ(d) and ℓ'(d), with d 0 outside of the pairs."""
    if o.link == "logistic":
        link, slope = F.logsigmoid(d).neg_(), d.neg().sigmoid_().neg_()
        if flip_prob is None and o.soft_target == 1:
            return link, slope
        flip = d.new_tensor(1 - o.soft_target) if flip_prob is None else flip_prob.unsqueeze(-2)
        return link + torch.where(flip == 0, 0.0, flip * d), slope + flip  # d may be infinite
    if o.link == "hinge":
        return F.relu(1 - d), -(d < 1).to(d.dtype)
    if o.link == "squared":
        return ((d - 0.5) / o.beta) ** 2, 2 * (d - 0.5) / o.beta**2
    return -d, -torch.ones_like(d)


def _lambda_weight(c: Candidates, z: Tensor) -> Tensor:
    """|2^r_i − 2^r_j| · |1/log(1 + τ_i) − 1/log(1 + τ_j)| [n, k, k]."""
    z = z.masked_fill(c.reward.isnan(), -torch.inf)
    above = z.unsqueeze(-2) > z.unsqueeze(-1)  # [n, i, j]: j ranks above i
    tied = z.unsqueeze(-2) == z.unsqueeze(-1)
    rank = 1 + above.sum(-1) + tied.tril(-1).sum(-1)
    discount = 1 / torch.log1p(rank.to(z.dtype))
    gain = torch.exp2(c.reward)
    return (gain.unsqueeze(-1) - gain.unsqueeze(-2)).abs() * (discount.unsqueeze(-1) - discount.unsqueeze(-2)).abs()


def _bco_term(shifted: Tensor, best_share: Tensor, is_worst: Tensor) -> tuple[Tensor, Tensor]:
    """Σ p_i softplus(δ − z_i) + Σ q_i softplus(z_i − δ) [n], and its slope [n, k]. `shifted` is z − δ."""
    worst_share = is_worst.to(shifted.dtype) / is_worst.sum(-1, keepdim=True).clamp(min=1)
    up = torch.where(best_share > 0, -best_share * F.logsigmoid(shifted), 0.0)  # of a share of 0, z may be infinite
    down = torch.where(is_worst, -worst_share * F.logsigmoid(-shifted), 0.0)
    return (up + down).sum(-1), worst_share * torch.sigmoid(shifted) - best_share * torch.sigmoid(-shifted)


def _policy_gradient(c: Candidates, z: Tensor, highest: Tensor, lowest: Tensor, o: Objective) -> tuple[Tensor, Tensor]:
    """−1/k Σ A_i z_i, or −β/k Σ min(ρ_i A_i, clip(ρ_i) A_i) [n], and its slope in z [n, k]."""
    member = ~c.reward.isnan()
    n = member.sum(-1, keepdim=True).clamp(min=1)
    unit = (0.5 * highest - 0.5 * lowest).where(
        highest > lowest, 0.5
    )  # halves: rewards may fill the range of the dtype
    place = ((0.5 * c.reward - 0.5 * lowest) / unit).where(member, 0.0)  # in [0, 1]
    off = (place - place.sum(-1, keepdim=True) / n).where(member, 0.0)
    if o.advantage == "standardized":
        spread = (off.square().sum(-1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
        advantage = (off / spread).where(spread > 0, 0.0)
    else:
        advantage = off * (2 * unit)
    slope = -advantage / n
    if o.pointwise == "policy_gradient":
        return torch.where(advantage != 0, slope * z, 0.0).sum(-1), slope
    score = c.score.masked_fill(~member, 0.0)
    ratio = score.clamp(max=LARGEST_LOG_RATIO).exp()
    gain, clipped = advantage * ratio, advantage * ratio.clamp(1 - o.clip_low, 1 + o.clip_high)
    follows = (gain <= clipped) & (score <= LARGEST_LOG_RATIO)
    return -o.beta * (torch.minimum(gain, clipped) / n).sum(-1), torch.where(follows, -gain / n, 0.0)


def _plackett_luce(reward: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_j (log Σ_{m: r_m ≤ r_j} exp z_m − z_j) over j above the last place [n], and its slope [n, k]."""
    in_race = reward.unsqueeze(-2) <= reward.unsqueeze(-1)  # [n, j, m]
    has_worse = _better(reward).any(-1)
    denominator = z.unsqueeze(-2).masked_fill(~in_race, -torch.inf).logsumexp(-1)
    loss = (denominator - z).where(has_worse, 0.0).sum(-1)
    chance = (z.unsqueeze(-2) - denominator.unsqueeze(-1)).where(in_race & has_worse.unsqueeze(-1), -torch.inf).exp()
    return loss, chance.sum(-2) - has_worse.to(z.dtype)
