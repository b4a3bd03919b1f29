"""The terms of the family of objectives, as functions of tiles, from which `list_loss` is composed.

Formulas: `perpo_kernels.objectives`. Which of them a kernel holds is decided when it is compiled, by the names of
`objectives.CHOICES`.
"""

import triton
import triton.language as tl


@triton.jit
def softplus_and_sigmoid(x):
    """log(1 + exp(x)) and its derivative, without overflow."""
    e = tl.exp(-tl.abs(x))
    one = 1.0 + e
    # log1p(e): log(one) · e / (one − 1) is exact to rounding where 1 + e loses digits
    log1p = tl.where(one == 1.0, e, tl.log(one) * (e / tl.where(one == 1.0, 1.0, one - 1.0)))
    return tl.maximum(x, 0.0) + log1p, tl.where(x >= 0, 1.0, e) / one


@triton.jit
def link_and_slope(d, flip, beta, LINK: tl.constexpr, SOFT: tl.constexpr):
    """ℓ(d) and ℓ'(d); flip is 1 − q of the logistic link, 0 unless SOFT."""
    if LINK == "logistic":
        softplus, sigmoid = softplus_and_sigmoid(-d)
        if SOFT:
            softplus += tl.where(flip == 0.0, 0.0, flip * d)  # d may be infinite
            return softplus, flip - sigmoid
        else:
            return softplus, -sigmoid
    elif LINK == "hinge":
        return tl.maximum(1.0 - d, 0.0), tl.where(d < 1.0, -1.0, 0.0)
    elif LINK == "squared":
        from_target = (d - 0.5) / beta
        return from_target * from_target, 2.0 * from_target / beta
    else:
        return -d, tl.zeros_like(d) - 1.0


@triton.jit
def in_pair_set(key_i, key_j, highest, lowest, PAIRS: tl.constexpr):
    """Whether i is preferred to j and the objective takes the pair; never where a key is NaN."""
    pair = key_i > key_j
    if PAIRS != "all":
        pair = pair & (key_i == highest)
    if PAIRS == "best_vs_worst":
        pair = pair & (key_j == lowest)
    return pair


@triton.jit
def ranked_weight(gap, key_i, key_j, rank_i, rank_j, gamma, WEIGHT: tl.constexpr):
    """w_ij of a ranked pair, of either direction; gap = |r_i − r_j| / range, 1 where there is no pair."""
    if WEIGHT == "power":
        return tl.exp2(gamma * tl.log2(tl.maximum(gap, 1e-37)))
    elif WEIGHT == "lambda":
        discounts = tl.abs(1.0 / tl.log(1.0 + rank_i) - 1.0 / tl.log(1.0 + rank_j))
        return tl.abs(tl.exp2(key_i) - tl.exp2(key_j)) * discounts
    else:
        return tl.zeros_like(gap) + 1.0


@triton.jit
def target_share(key, highest, inverse_temperature, target_total, n_best, TEMPERED: tl.constexpr):
    """p_i; 0 for an invalid candidate."""
    if TEMPERED:
        return tl.where(key == key, tl.exp((key - highest) * inverse_temperature) / target_total, 0.0)
    else:
        return tl.where(key == highest, 1.0 / n_best, 0.0)


@triton.jit
def bco_term(z, best_share, worst_share):
    """p softplus(−z) + q softplus(z) and its slope; z is βs − δ, which may be infinite where its share is 0."""
    up, pull = softplus_and_sigmoid(-z)
    down, push = softplus_and_sigmoid(z)
    loss = tl.where(best_share > 0, best_share * up, 0.0) + tl.where(worst_share > 0, worst_share * down, 0.0)
    return loss, worst_share * push - best_share * pull


@triton.jit
def clipped_term(score, advantage, clip_low, clip_high):
    """min(ρA, clip(ρ)A) and its slope in the score, ρ = exp(min(score, 80)): `objectives.LARGEST_LOG_RATIO`."""
    ratio = tl.exp(tl.minimum(score, 80.0))
    gain = ratio * advantage
    clipped = tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high) * advantage
    follows = (gain <= clipped) & (score <= 80.0)
    return tl.minimum(gain, clipped), tl.where(follows, gain, 0.0)
