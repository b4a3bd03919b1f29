"""How the scores of a list rank its candidates: the one definition of what is logged, in plain PyTorch.

Nothing here runs unless it is asked for, nothing waits for a device, and no shape depends on data: the layout of the
lists may be on a device, and the numbers may be part of a compiled function or of a CUDA graph.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from perpo_kernels import layout

PAIRS_AT_ONCE = 1 << 22  # of the S² pairs of candidates of all lists; bounds the memory


class Ranking(NamedTuple):
    """The candidates of each list, compared by reward and by score. Pairs are counted once."""

    best: Tensor  # int64 [G]: the candidate of highest reward, the first of equals; S if the list has none
    worst: Tensor  # int64 [G]: of lowest reward
    ranked: Tensor  # int64 [G]: pairs of different rewards
    distinct: Tensor  # int64 [G]: pairs of different scores
    concordant: Tensor  # int64 [G]: pairs that reward and score order alike
    discordant: Tensor  # int64 [G]: pairs that they order oppositely

    @property
    def pair_accuracy(self) -> Tensor:  # [G]
        """Share of the pairs with r_i > r_j that have s_i > s_j. A tie of scores is not right."""
        return self.concordant / self.ranked.clamp(min=1)

    @property
    def kendall_tau(self) -> Tensor:  # [G]
        """τ-b: 1 where scores order candidates as rewards do, −1 where reversed, 0 where either is constant.

        τ-b = Σ sgn(Δs) sgn(Δr) / √(Σ |sgn Δs| · Σ |sgn Δr|) over pairs, which takes ties in either into account.
        """
        untied = (self.ranked * self.distinct).clamp(min=1)
        return (self.concordant - self.discordant) / untied.sqrt()


def rank(scores: Tensor, rewards: Tensor, cu_lists: Tensor) -> Ranking:
    """scores [S], rewards [S] (NaN for an invalid candidate), cu_lists [G + 1]."""
    n, n_lists = scores.shape[0], cu_lists.shape[0] - 1
    lists = layout.owner(cu_lists.to(scores.device, non_blocking=True), n)

    taking_part = ~rewards.isnan()

    def first_with(extreme: str, nothing: float) -> Tensor:  # [G]: places of the highest or lowest rewards
        values = rewards.masked_fill(~taking_part, nothing)
        reached = rewards.new_full((n_lists,), nothing).scatter_reduce(0, lists, values, extreme)
        place = torch.where(rewards == reached[lists], torch.arange(n, device=lists.device), n)
        return place.new_full((n_lists,), n).scatter_reduce(0, lists, place, "amin")

    counts = lists.new_zeros(4, n)  # of each candidate, over the pairs that it is the better or the higher of
    block = max(1, PAIRS_AT_ONCE // max(n, 1))
    for start in range(0, n, block):
        i = slice(start, start + block)
        together = (lists[i, None] == lists) & taking_part[i, None] & taking_part
        better = together & (rewards[i, None] > rewards)
        higher = together & (scores[i, None] > scores)
        lower = scores[i, None] < scores
        pairs = (better, higher, better & higher, better & lower)
        counts[:, i] = torch.stack([pair.sum(1) for pair in pairs])
    ranked, distinct, concordant, discordant = counts.new_zeros(4, n_lists).index_add(1, lists, counts)
    best, worst = first_with("amax", -torch.inf), first_with("amin", torch.inf)
    return Ranking(best, worst, ranked, distinct, concordant, discordant)


def pick(values: Tensor, index: Tensor) -> Tensor:  # [G]
    """values [S] of the candidates `index` [G]; 0 for the index S of a list that has none."""
    return torch.cat([values, values.new_zeros(1)])[index]


def list_weights(active: Tensor, weights: Tensor) -> Tensor:  # [G]
    """What each list counts in a mean over active lists: its weight, 0 if it is not active."""
    return torch.where(active > 0, weights.to(active.device, active.dtype), 0.0)
