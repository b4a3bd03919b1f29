"""The terms of the family of objectives in plain PyTorch, each with its slope in z; `lists` puts them together.

Formulas: `perpo_kernels.objectives`.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from perpo_kernels.objectives import LARGEST_LOG_RATIO, Objective


class Candidates(NamedTuple):
    """One entry per candidate; [S], or [n, k] for n lists padded to k."""

    score: Tensor  # s
    log_prob: Tensor  # Σ ω log π; over the number of tokens if the objective's nll is
    reward: Tensor  # NaN for an invalid candidate
    flip_prob: Tensor | None
    tame: bool  # all are valid, and every number is of ordinary size: nothing has to be selected away


def better(reward: Tensor) -> Tensor:
    """[n, i, j]: r_i > r_j; false where either is invalid."""
    return reward.unsqueeze(-1) > reward.unsqueeze(-2)


def link(d: Tensor, flip_prob: Tensor | None, o: Objective) -> tuple[Tensor, Tensor]:
    """ℓ(d) and ℓ'(d), with d 0, or at least tame, outside of the pairs."""
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


def lambda_weight(c: Candidates, z: Tensor) -> Tensor:
    """|2^r_i − 2^r_j| · |1/log(1 + τ_i) − 1/log(1 + τ_j)| [n, k, k]."""
    z = z.masked_fill(c.reward.isnan(), -torch.inf)
    above = z.unsqueeze(-2) > z.unsqueeze(-1)  # [n, i, j]: j ranks above i
    tied = z.unsqueeze(-2) == z.unsqueeze(-1)
    rank = 1 + above.sum(-1) + tied.tril(-1).sum(-1)
    discount = 1 / torch.log1p(rank.to(z.dtype))
    gain = torch.exp2(c.reward)
    return (gain.unsqueeze(-1) - gain.unsqueeze(-2)).abs() * (discount.unsqueeze(-1) - discount.unsqueeze(-2)).abs()


def bco_term(shifted: Tensor, best_share: Tensor, is_worst: Tensor) -> tuple[Tensor, Tensor]:
    """Σ p_i softplus(δ − z_i) + Σ q_i softplus(z_i − δ) [n], and its slope [n, k]. `shifted` is z − δ."""
    worst_share = is_worst.to(shifted.dtype) / is_worst.sum(-1, keepdim=True).clamp(min=1)
    up = torch.where(best_share > 0, -best_share * F.logsigmoid(shifted), 0.0)  # of a share of 0, z may be infinite
    down = torch.where(is_worst, -worst_share * F.logsigmoid(-shifted), 0.0)
    return (up + down).sum(-1), worst_share * torch.sigmoid(shifted) - best_share * torch.sigmoid(-shifted)


def policy_gradient(c: Candidates, z: Tensor, highest: Tensor, lowest: Tensor, o: Objective) -> tuple[Tensor, Tensor]:
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


def plackett_luce(reward: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_j (log Σ_{m: r_m ≤ r_j} exp z_m − z_j) over j above the last place [n], and its slope [n, k]."""
    in_race = reward.unsqueeze(-2) <= reward.unsqueeze(-1)  # [n, j, m]
    has_worse = better(reward).any(-1)
    denominator = z.unsqueeze(-2).masked_fill(~in_race, -torch.inf).logsumexp(-1)
    loss = (denominator - z).where(has_worse, 0.0).sum(-1)
    chance = (z.unsqueeze(-2) - denominator.unsqueeze(-1)).where(in_race & has_worse.unsqueeze(-1), -torch.inf).exp()
    return loss, chance.sum(-2) - has_worse.to(z.dtype)
