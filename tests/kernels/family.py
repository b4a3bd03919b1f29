"""Every objective of the family as its paper writes it, for one list, in plain PyTorch and differentiable by autograd.

Written without `Objective` and without `perpo_kernels.reference`: what the package computes is held against this.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from perpo_kernels import objectives
from perpo_kernels.objectives import Objective


class OneList(NamedTuple):
    """The valid candidates of one list."""

    log_probs: Tensor  # [k]: Σ_t ω_t log π
    ref: Tensor  # [k]
    rewards: Tensor  # [k]
    lengths: Tensor  # [k]
    flips: Tensor  # [k]: ε of a preference over this candidate
    given: Tensor  # [k, k]
    delta: Tensor | float = 0.0

    @property
    def ratio(self) -> Tensor:
        return self.log_probs - self.ref

    @property
    def best(self) -> Tensor:
        return self.rewards == self.rewards.max()

    @property
    def worst(self) -> Tensor:
        return self.rewards == self.rewards.min()


def differences(c: OneList, scores: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """s_i − s_j and r_i − r_j of all pairs with r_i > r_j."""
    scores = c.ratio if scores is None else scores
    i, j = (c.rewards[:, None] > c.rewards[None, :]).nonzero(as_tuple=True)
    return scores[i] - scores[j], c.rewards[i] - c.rewards[j]


def extremes(c: OneList, scores: Tensor | None = None) -> Tensor:
    """s_w − s_l of best against worst: every best with every worst."""
    scores = c.ratio if scores is None else scores
    return (scores[c.best][:, None] - scores[c.worst][None, :]).flatten()


def perpo(c: OneList, beta: float, gamma: float) -> Tensor:
    ahead, gap = differences(c)
    weight = gap**gamma
    return (weight * F.softplus(-beta * ahead)).sum() / weight.sum()


def uniform_pairs(c: OneList, beta: float) -> Tensor:
    return F.softplus(-beta * differences(c)[0]).mean()


def dpo(c: OneList, beta: float) -> Tensor:
    return -F.logsigmoid(beta * extremes(c)).mean()


def cdpo(c: OneList, beta: float, epsilon: float) -> Tensor:
    d = beta * extremes(c)
    return (-(1 - epsilon) * F.logsigmoid(d) - epsilon * F.logsigmoid(-d)).mean()


def robust_dpo(c: OneList, beta: float, epsilon: float) -> Tensor:
    d = beta * extremes(c)
    return ((-(1 - epsilon) * F.logsigmoid(d) + epsilon * F.logsigmoid(-d)) / (1 - 2 * epsilon)).mean()


def rosepo(c: OneList, beta: float) -> Tensor:
    d = beta * differences(c)[0]
    _, j = (c.rewards[:, None] > c.rewards[None, :]).nonzero(as_tuple=True)
    return (-(1 - c.flips[j]) * F.logsigmoid(d) - c.flips[j] * F.logsigmoid(-d)).mean()


def ipo(c: OneList, beta: float) -> Tensor:
    return ((extremes(c, c.ratio / c.lengths) - 1 / (2 * beta)) ** 2).mean()


def hinge(c: OneList, beta: float) -> Tensor:
    return torch.relu(1 - beta * extremes(c)).mean()


def odpo(c: OneList, beta: float, alpha: float) -> Tensor:
    return -F.logsigmoid(beta * extremes(c) - alpha * (c.rewards.max() - c.rewards.min()).log()).mean()


def discounts(scores: Tensor) -> Tensor:
    """1 / log(1 + rank), the highest score first, equal ones by position."""
    rank = torch.empty_like(scores, dtype=torch.long)
    rank[scores.argsort(descending=True, stable=True)] = torch.arange(1, len(scores) + 1, device=scores.device)
    return 1 / torch.log(1 + rank.to(scores.dtype))


def lambda_weights(c: OneList) -> Tensor:  # [k, k]
    """|ΔDCG| when i and j swap places, where r_i > r_j."""
    gain, discount = 2**c.rewards, discounts(c.ratio.detach())
    weights = (gain[:, None] - gain[None, :]).abs() * (discount[:, None] - discount[None, :]).abs()
    return weights * (c.rewards[:, None] > c.rewards[None, :])


def lipo(c: OneList, beta: float) -> Tensor:
    ahead = c.ratio[:, None] - c.ratio[None, :]
    return (lambda_weights(c) * torch.log1p(torch.exp(-beta * ahead))).sum()


def sdpo(c: OneList, beta: float) -> Tensor:
    losses = []
    for w in c.best.nonzero().flatten().tolist():
        others = torch.arange(len(c.rewards), device=c.rewards.device) != w
        losses.append(-F.logsigmoid(-(beta * (c.ratio[others] - c.ratio[w])).logsumexp(0)))
    return torch.stack(losses).mean()


def plackett_luce(c: OneList, beta: float) -> Tensor:
    """Place after place, the best of those that are left; tied places are drawn from one and the same rest."""
    z, left = beta * c.ratio, torch.ones_like(c.best)
    loss = z.new_zeros(())
    for value in sorted(set(c.rewards.tolist()), reverse=True)[:-1]:
        tied = c.rewards == value
        loss = loss - (z[tied] - z[left].exp().sum().log()).sum()
        left = left & ~tied
    return loss


def infonca(c: OneList, beta: float, target_temperature: float) -> Tensor:
    return F.cross_entropy(beta * c.ratio[None], (c.rewards / target_temperature).softmax(0)[None])


def nca(c: OneList, beta: float, target_temperature: float) -> Tensor:
    z, p = beta * c.ratio, (c.rewards / target_temperature).softmax(0)
    return -(p * F.logsigmoid(z)).sum() - F.logsigmoid(-z).mean()


def simpo(c: OneList, beta: float, margin: float) -> Tensor:
    return -F.logsigmoid(beta * extremes(c, c.log_probs / c.lengths) - margin).mean()


def rpo(c: OneList, beta: float, eta: float) -> Tensor:
    return dpo(c, beta) - beta * eta * c.log_probs[c.best].mean()


def mdpo(c: OneList, beta: float) -> Tensor:
    ahead = c.ratio[:, None] - c.ratio[None, :]
    return -(c.given * F.logsigmoid(beta * ahead)).sum() - F.logsigmoid(beta * c.ratio[c.best]).mean()


def p3o(c: OneList, beta: float) -> Tensor:
    ahead, gap = differences(c)
    return (-beta * gap * ahead).mean()


def dr_grpo(c: OneList, beta: float) -> Tensor:
    return -beta * ((c.rewards - c.rewards.mean()) * c.ratio).mean()


def grpo(c: OneList, beta: float) -> Tensor:
    return dr_grpo(c, beta) / c.rewards.std()


def gspo(c: OneList, beta: float, clip_low: float, clip_high: float) -> Tensor:
    """Term by term as TRL and the paper have it: the smaller of two products."""
    ratio = (c.ratio / c.lengths).clamp(max=80).exp()
    advantage = (c.rewards - c.rewards.mean()) / c.rewards.std()
    near = torch.clamp(ratio, 1 - clip_low, 1 + clip_high)
    return -beta * torch.min(ratio * advantage, near * advantage).mean()


def bco(c: OneList, beta: float) -> Tensor:
    chosen, rejected = beta * c.ratio[c.best] - c.delta, beta * c.ratio[c.worst] - c.delta
    return -F.logsigmoid(chosen).mean() - F.logsigmoid(-rejected).mean()


def mpo(c: OneList, beta: float) -> Tensor:
    likelihood = (c.log_probs / c.lengths)[c.best].mean()
    return 0.8 * dpo(c, beta) + 0.2 * bco(c, beta) - likelihood


DEFINITIONS: dict[str, tuple[Callable[..., Tensor], dict[str, float]]] = {
    "perpo": (perpo, {"beta": 0.4, "gamma": 0.7}),
    "uniform_pairs": (uniform_pairs, {"beta": 0.4}),
    "dpo": (dpo, {"beta": 0.4}),
    "cdpo": (cdpo, {"beta": 0.4, "epsilon": 0.15}),
    "robust_dpo": (robust_dpo, {"beta": 0.4, "epsilon": 0.15}),
    "rosepo": (rosepo, {"beta": 0.4}),
    "ipo": (ipo, {"beta": 0.4}),
    "hinge": (hinge, {"beta": 0.4}),
    "odpo": (odpo, {"beta": 0.4, "alpha": 0.8}),
    "lipo": (lipo, {"beta": 0.4}),
    "sdpo": (sdpo, {"beta": 0.7}),
    "plackett_luce": (plackett_luce, {"beta": 0.4}),
    "infonca": (infonca, {"beta": 0.4, "target_temperature": 0.3}),
    "nca": (nca, {"beta": 0.4, "target_temperature": 0.3}),
    "simpo": (simpo, {"beta": 2.0, "margin": 0.6}),
    "rpo": (rpo, {"beta": 0.4, "eta": 0.3}),
    "mdpo": (mdpo, {"beta": 0.4}),
    "p3o": (p3o, {"beta": 0.5}),
    "dr_grpo": (dr_grpo, {"beta": 0.7}),
    "grpo": (grpo, {"beta": 0.7}),
    "gspo": (gspo, {"beta": 0.7, "clip_low": 0.3, "clip_high": 0.5}),
    "bco": (bco, {"beta": 0.4}),
    "mpo": (mpo, {"beta": 0.4}),
}
NAMES = tuple(DEFINITIONS)
ZERO_SUM = tuple(
    name for name in NAMES if name not in ("nca", "rpo", "mdpo", "gspo", "bco", "mpo")
)  # terms of differences of scores only


def preset(name: str) -> Objective:
    return getattr(objectives, name)(**DEFINITIONS[name][1])


class Batch(NamedTuple):
    """Lists one after another; what an objective does not take is there all the same."""

    rewards: Tensor  # [S]
    ref: Tensor  # [S]
    lengths: Tensor  # [S]
    flips: Tensor  # [S]
    given: Tensor  # [G, k, k]
    valid: Tensor  # bool [S]
    cu_lists: Tensor  # [G + 1]
    delta: Tensor  # [1]

    def to(self, dtype: torch.dtype) -> "Batch":
        return Batch(*(x.to(dtype) if x.is_floating_point() else x for x in self))

    def options(self, name: str) -> dict[str, Tensor]:
        """What the objective of this name takes, for both public functions."""
        target, options = preset(name), {"cu_lists": self.cu_lists}
        if target.reference:
            options["ref_log_probs"] = self.ref
        if name == "rosepo":
            options["flip_probs"] = self.flips
        if target.pairs == "given":
            options["pair_weights"] = self.given
        if target.pointwise == "bco":
            options["delta"] = self.delta
        return options


def batch(device: torch.device, *rewards: list[float]) -> Batch:
    """Lists of these rewards; everything else is drawn. float64, of numbers that fp32 holds."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device).double()

    sizes = [len(r) for r in rewards]
    n, longest = sum(sizes), max(sizes)
    flat = torch.tensor([x for r in rewards for x in r], device=device).double()
    bounds = torch.tensor([0, *sizes], device=device).cumsum(0).int()
    given = (draw(len(sizes), longest, longest) + 0.1) * (draw(len(sizes), longest, longest) < 0.4)
    given[:, 0, 1:2] = 0.5  # no list of two without a pair
    lengths = torch.randint(1, 5, (n,), device=device).double()
    return Batch(
        flat, 2 * draw(n), lengths, draw(n) / 3, given, torch.ones_like(flat, dtype=torch.bool), bounds, draw(1)
    )


def definition(name: str, log_probs: Tensor, b: Batch) -> Tensor:  # [G]
    """Loss of each list; invalid candidates are taken out of it, a list without a preference is 0."""
    fn, options = DEFINITIONS[name]
    ref = b.ref if preset(name).reference else torch.zeros_like(b.ref)
    losses = []
    for g, (start, end) in enumerate(pairwise(b.cu_lists.tolist())):
        keep = (b.valid & b.rewards.isfinite())[start:end].nonzero().flatten()
        given = b.given[g][keep][:, keep]
        fields = (x[start:end][keep] for x in (log_probs, ref, b.rewards, b.lengths, b.flips))
        one = OneList(*fields, given, b.delta)
        preferred = bool((given > 0).any()) if name == "mdpo" else one.rewards.unique().numel() > 1
        losses.append(fn(one, **options) if preferred else log_probs.new_zeros(()))
    return torch.stack(losses)
