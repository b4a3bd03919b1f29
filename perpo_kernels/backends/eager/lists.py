"""list_loss in plain PyTorch: all pairs of a few lists at a time, as tiles [lists, k, k] padded to the longest list.

Formulas: `perpo_kernels.objectives`. The gradient is written out; autograd is not used.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from perpo_kernels.backends import ListProblem, ListResult
from perpo_kernels.objectives import Objective

PAIRS_AT_ONCE = 1 << 22


class Candidates(NamedTuple):
    """One entry a candidate; [S], or [n, k] for n lists padded to k."""

    score: Tensor  # s
    log_prob: Tensor  # Σ ω log π
    reward: Tensor  # NaN for a candidate that takes part in nothing
    flip_prob: Tensor


def list_loss(problem: ListProblem, result: ListResult) -> None:
    """The longest list is read on the host: free on the CPU, one synchronisation on a device."""
    p = problem
    lengths = p.cu_lists.diff()
    if lengths.numel() == 0 or p.rewards.numel() == 0:
        return  # the result is zeros already
    everyone, tokens = _candidates(p, result)
    k = max(int(lengths.max()), 1)
    d_score, d_log_prob = torch.zeros_like(everyone.score), torch.zeros_like(everyone.score)
    slot = torch.arange(k, device=lengths.device)
    for block in torch.arange(lengths.numel(), device=lengths.device).split(max(1, PAIRS_AT_ONCE // (k * k))):
        inside = slot < lengths[block, None]
        place = torch.where(inside, p.cu_lists[block, None] + slot, 0).long()
        lists = Candidates(*(x[place] for x in everyone))
        lists = lists._replace(reward=lists.reward.masked_fill(~inside, torch.nan))
        given = None if p.pair_weights is None else p.pair_weights[block, :k, :k]
        loss, slope, likelihood, stats = lists_of_k(lists, given, p.objective)
        result.losses[block] = loss
        result.stats[:, block] = stats
        d_score[place[inside]] = slope[inside]
        d_log_prob[place[inside]] = likelihood[inside]
    if p.objective.length_normalized:
        d_score /= tokens.clamp(min=1)
    _write_coefficients(p, d_score + d_log_prob, result)


def _candidates(p: ListProblem, result: ListResult) -> tuple[Candidates, Tensor]:
    """The candidates of all lists, and their numbers of valid tokens [S]."""
    first, last = int(p.cu_lists[0]), int(p.cu_lists[-1])
    here = slice(first, last)
    dtype = result.losses.dtype
    n_candidates = p.rewards.numel()
    counts = torch.ones(last - first, dtype=dtype, device=p.rewards.device)
    if p.cu_seqlens is None or p.labels is None:
        sums = p.log_probs[here].to(dtype)
        present = torch.ones_like(counts, dtype=torch.bool)
        if p.lengths is not None:
            counts = p.lengths[here].to(dtype)
            present = counts > 0
    else:
        bounds = p.cu_seqlens[first : last + 1]
        tokens = slice(int(bounds[0]), int(bounds[-1]))
        lengths = bounds.diff().long()
        kept = p.labels[tokens] != p.ignore_index
        log_probs = p.log_probs[tokens].to(dtype)
        if p.token_weights is not None:
            log_probs = log_probs * p.token_weights[tokens]
        sums = _segment_sum(torch.where(kept, log_probs, 0.0), lengths)
        counts = _segment_sum(kept.to(dtype), lengths)
        present = counts > 0
    if p.valid is not None:
        present &= p.valid[here]
        sums = sums.where(p.valid[here], 0.0)
    rewards = p.rewards[here].to(dtype)
    score = sums if p.ref_log_probs is None else sums - p.ref_log_probs[here].to(dtype)
    if p.objective.length_normalized:
        score = score / counts.clamp(min=1)

    def place(values: Tensor) -> Tensor:
        out = torch.zeros(n_candidates, dtype=dtype, device=values.device)
        out[here] = values
        return out

    result.sequence_log_probs[here] = sums
    flips = torch.full_like(counts, torch.nan) if p.flip_probs is None else p.flip_probs[here].to(dtype)
    reward = rewards.masked_fill(~(present & rewards.isfinite()), torch.nan)
    return Candidates(place(score), place(sums), place(reward), place(flips)), place(counts)


def _segment_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums of consecutive runs, in a fixed order; torch.segment_reduce refuses to make none."""
    if lengths.numel() == 0:
        return values.new_zeros(0)
    return torch.segment_reduce(values, "sum", lengths=lengths, initial=0.0)


def _write_coefficients(p: ListProblem, gradient: Tensor, result: ListResult) -> None:
    first, last = int(p.cu_lists[0]), int(p.cu_lists[-1])
    if p.cu_seqlens is None:
        result.coefficients[first:last] = gradient[first:last]
        return
    bounds = p.cu_seqlens[first : last + 1]
    tokens = slice(int(bounds[0]), int(bounds[-1]))
    result.coefficients[tokens] = torch.repeat_interleave(gradient[first:last], bounds.diff())
    if p.token_weights is not None:
        result.coefficients[tokens] *= p.token_weights[tokens]


def lists_of_k(c: Candidates, given: Tensor | None, objective: Objective) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[n, k] candidates -> loss [n], ∂loss/∂s [n, k], ∂loss/∂(Σ log π) [n, k], statistics [4, n]."""
    o = objective
    member = ~c.reward.isnan()
    better = c.reward.unsqueeze(-1) > c.reward.unsqueeze(-2)  # [n, i, j]: r_i > r_j; false where either is no candidate
    highest = c.reward.nan_to_num(nan=-torch.inf).amax(-1, keepdim=True)
    lowest = c.reward.nan_to_num(nan=torch.inf).amin(-1, keepdim=True)
    is_best, is_worst = c.reward == highest, c.reward == lowest
    p_best = is_best.to(c.score.dtype) / is_best.sum(-1, keepdim=True).clamp(min=1)
    if given is not None:
        given = given.to(c.score.dtype).masked_fill(~(member.unsqueeze(-1) & member.unsqueeze(-2)), 0.0)
    active = (better if given is None else given > 0).any(-1).any(-1)

    z = o.beta * c.score.where(member, 0.0)
    loss = torch.zeros_like(z[:, 0])
    slope = torch.zeros_like(z)  # ∂loss/∂z
    if o.pairs != "none":
        pair_loss, pair_slope = _pair_term(c, z, better, given, highest, lowest, o)
        loss, slope = loss + pair_loss, slope + pair_slope
    p = p_best
    if o.target_temperature:
        p = (c.reward / o.target_temperature).masked_fill(~member, -torch.inf).softmax(-1)
    if o.list_term == "softmax":
        log_softmax = z.masked_fill(~member, -torch.inf).log_softmax(-1)
        loss = loss - torch.where(member, p * log_softmax, 0.0).sum(-1)
        slope = slope + log_softmax.exp() - p
    elif o.list_term == "plackett_luce":
        pl_loss, pl_slope = _plackett_luce(c.reward, z, better)
        loss, slope = loss + pl_loss, slope + pl_slope
    if o.pointwise != "none":
        loss = loss - torch.where(member, p * F.logsigmoid(z), 0.0).sum(-1)
        slope = slope - p * torch.sigmoid(-z)
    if o.pointwise == "nca":
        share = member.to(z.dtype) / member.sum(-1, keepdim=True).clamp(min=1)
        loss = loss - (share * F.logsigmoid(-z)).sum(-1)
        slope = slope + share * torch.sigmoid(z)
    likelihood = -o.nll * p_best
    if o.nll:
        loss = loss - o.nll * torch.where(is_best, p_best * c.log_prob, 0.0).sum(-1)

    right = (better & (c.score.unsqueeze(-1) > c.score.unsqueeze(-2))).sum((-1, -2)).to(z.dtype)
    right /= better.sum((-1, -2)).clamp(min=1)
    chosen, rejected = (z.gather(-1, x.int().argmax(-1, keepdim=True)).squeeze(-1) for x in (is_best, is_worst))
    stats = torch.stack([chosen, rejected, right, active.to(z.dtype)])
    on = active.unsqueeze(-1) & member
    return (
        loss.where(active, 0.0),
        (o.beta * slope).where(on, 0.0),
        likelihood.where(on, 0.0),
        stats.where(active, 0.0),
    )


def _pair_term(
    c: Candidates,
    z: Tensor,  # [n, k]: βs
    better: Tensor,  # bool [n, k, k]
    given: Tensor | None,  # [n, k, k]
    highest: Tensor,  # [n, 1]
    lowest: Tensor,
    o: Objective,
) -> tuple[Tensor, Tensor]:
    """Σ w_ij ℓ(d_ij) [n] and its slope in z [n, k]."""
    gap = torch.where(better, c.reward.unsqueeze(-1) - c.reward.unsqueeze(-2), 1.0)
    unit = torch.where((highest - lowest).isfinite(), 1.0, 0.5)  # differences of halves are finite for all rewards
    scaled, spread = unit * c.reward, unit * highest - unit * lowest
    share = torch.where(better, (scaled.unsqueeze(-1) - scaled.unsqueeze(-2)) / spread.unsqueeze(-1), 1.0)
    if given is not None:
        pair = given > 0
        weight = given.where(pair, 0.0)
    else:
        pair = better
        if o.pairs != "all":
            pair = pair & (c.reward == highest).unsqueeze(-1)
        if o.pairs == "best_vs_worst":
            pair = pair & (c.reward == lowest).unsqueeze(-2)
        weight = pair.to(z.dtype)
        if o.weight == "power":
            weight = (share if o.normalize == "list" else gap).pow(o.gamma).where(pair, 0.0)
        elif o.weight == "lambda":
            weight = _lambda_weight(c, z).where(pair, 0.0)
    if o.normalize != "none":
        total = (weight if o.normalize == "list" else pair).sum((-1, -2), keepdim=True)
        weight = weight / total.where(total > 0, 1.0)
    d = torch.where(pair, z.unsqueeze(-1) - z.unsqueeze(-2) - o.offset, 0.0)
    if o.log_margin:
        d = d - o.log_margin * gap.log()
    flip = torch.full_like(c.flip_prob, 1 - o.soft_target).where(c.flip_prob.isnan(), c.flip_prob).unsqueeze(-2)
    link, slope = _link(d, flip, o)
    pull = (weight * slope).where(pair, 0.0)
    return (weight * link).where(pair, 0.0).sum((-1, -2)), pull.sum(-1) - pull.sum(-2)


def _link(d: Tensor, flip: Tensor, o: Objective) -> tuple[Tensor, Tensor]:
    """ℓ(d) and ℓ'(d); `flip` is 1 − q."""
    if o.link == "logistic":
        return flip * d - F.logsigmoid(d), flip - torch.sigmoid(-d)
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


def _plackett_luce(reward: Tensor, z: Tensor, better: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_j (log Σ_{m: r_m ≤ r_j} exp z_m − z_j) over j above the last place [n], and its slope [n, k]."""
    in_race = reward.unsqueeze(-2) <= reward.unsqueeze(-1)  # [n, j, m]
    has_worse = better.any(-1)
    denominator = z.unsqueeze(-2).masked_fill(~in_race, -torch.inf).logsumexp(-1)
    loss = (denominator - z).where(has_worse, 0.0).sum(-1)
    chance = (z.unsqueeze(-2) - denominator.unsqueeze(-1)).where(in_race & has_worse.unsqueeze(-1), -torch.inf).exp()
    return loss, chance.sum(-2) - has_worse.to(z.dtype)
