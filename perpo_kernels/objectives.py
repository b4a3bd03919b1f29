"""List-wise objectives: what is minimised over the scores of one list of candidates.

An objective is a value, not code: one kernel reads it, with branches resolved when it is compiled. Symbols, for a
list of k candidates:

    s_i   score: Σ_t ω_t log π(y_it) − log π_ref(y_i), divided by the number of tokens if `length_normalized`
    r_i   reward; only its order and its differences matter
    d_ij  = β (s_i − s_j) − m_ij,   m_ij = offset + log_margin · log(r_i − r_j)
    p_i   target: softmax(r / target_temperature)_i, or the best candidates in equal shares at target_temperature 0

The loss of a list is a sum of terms, each of which may be absent:

    pair term       Σ_ij w_ij ℓ(d_ij) over the chosen pairs (i better than j)
    list term       softmax: −Σ_i p_i log softmax(βs)_i       plackett_luce: Σ_j (log Σ_{m: r_m ≤ r_j} exp βs_m − βs_j)
    pointwise term  nca: −Σ_i p_i log σ(βs_i) − 1/k Σ_i log σ(−βs_i)       anchor: −Σ_i p_i log σ(βs_i)
    nll term        −nll · Σ_i p_i Σ_t ω_t log π(y_it), p at target_temperature 0

    link ℓ          logistic: softplus(−d) + (1 − q) d       hinge: max(0, 1 − d)
                    squared: ((d − 1/2) / β)²                linear: −d
    weights w_ij    uniform: 1       power: (r_i − r_j)^γ       given: any matrix [k, k]
                    lambda: |2^r_i − 2^r_j| · |1/log(1 + τ_i) − 1/log(1 + τ_j)|, τ the rank by score, 1 the highest
                        (equal scores by
                    position; ranks are constants)
    normalize       list: w / Σ w       pairs: w / number of pairs       none

For every objective: weights, targets and ranks are constants; an invalid candidate (no token, a NaN or infinite
reward) is left out of every term; a list in which no candidate is better than another has loss 0 and gradient 0.
The gradient of the pair, softmax and Plackett–Luce terms sums to 0 over the list.

Plackett–Luce with ties: the tied candidates share one denominator (Breslow), and those tied for last place have no
term.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

CHOICES: dict[str, tuple[str, ...]] = {
    "pairs": ("none", "all", "best_vs_rest", "best_vs_worst", "given"),
    "weight": ("uniform", "power", "lambda"),
    "normalize": ("list", "pairs", "none"),
    "link": ("logistic", "hinge", "squared", "linear"),
    "list_term": ("none", "softmax", "plackett_luce"),
    "pointwise": ("none", "nca", "anchor"),
}


SMALLEST_TEMPERATURE = 1e-30  # 1 / T has to be a number of fp32


@dataclass(frozen=True)
class Objective:
    """One member of the family of the module's docstring. The default is PerPO.

    Args:
        beta: β > 0, the inverse temperature of the implicit reward β·s.
        gamma: γ ≥ 0, the exponent of the power weights.
        pairs: which pairs: "all" with r_i > r_j, "best_vs_rest", "best_vs_worst" (ties for best or worst count each),
            "given" (a matrix `pair_weights` [G, k, k] is passed with the data: explicit edges or custom weights), or
            "none".
        weight: "power", "uniform" or "lambda".
        normalize: "list", "pairs" or "none".
        link: "logistic", "hinge", "squared" or "linear".
        soft_target: q of the logistic link; 1 trusts the preference, 1 − ε smooths it, above 1 corrects for noise.
        offset, log_margin: the margin m_ij that a pair must keep.
        list_term: "none", "softmax" or "plackett_luce".
        target_temperature: of p; 0 puts p on the best.
        pointwise: "none", "nca" or "anchor".
        nll: ≥ 0, weight of the negative log-likelihood of the best candidates.
        length_normalized: scores are means over tokens.
        reference: False refuses reference log-probs.
        flips: the data must hold `flip_probs`, each candidate's own 1 − q.

    Raises:
        ValueError, TypeError: a value outside its range, or a combination without meaning, with the reason.
    """

    beta: float = 0.1
    gamma: float = 0.5
    pairs: str = "all"
    weight: str = "power"
    normalize: str = "list"
    link: str = "logistic"
    soft_target: float = 1.0
    offset: float = 0.0
    log_margin: float = 0.0
    list_term: str = "none"
    target_temperature: float = 0.0
    pointwise: str = "none"
    nll: float = 0.0
    length_normalized: bool = False
    reference: bool = True
    flips: bool = False

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("beta", "gamma", "target_temperature", "nll", "soft_target", "offset", "log_margin"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            if not -math.inf < value < math.inf:
                raise ValueError(f"{name} must be finite, got {value!r}")
        for name in ("length_normalized", "reference", "flips"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not self.beta > 0:
            raise ValueError(f"beta must be a finite number > 0, got {self.beta!r}")
        if 0 < self.target_temperature < SMALLEST_TEMPERATURE:
            raise ValueError(
                f"target_temperature must be 0 (the best alone) or at least {SMALLEST_TEMPERATURE}, "
                f"got {self.target_temperature!r}"
            )
        for name in ("gamma", "target_temperature", "nll", "soft_target"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be a finite number >= 0, got {getattr(self, name)!r}")
        self._check_combination()

    def _check_combination(self) -> None:
        if self.pairs == "none" and self.list_term == "none" and self.pointwise == "none":
            raise ValueError(
                "pairs='none' needs a list_term or a pointwise term: with nothing that compares candidates there is "
                "no preference to learn"
            )
        if (self.soft_target != 1.0 or self.flips) and (self.link != "logistic" or self.pairs == "none"):
            raise ValueError(
                f"soft_target and flips are probabilities of the logistic link of pairs, but link is {self.link!r} and "
                f"pairs is {self.pairs!r}"
            )
        for of_pairs in ("weight", "gamma", "normalize", "link", "offset", "log_margin"):
            self._must_not_be_set(of_pairs, self.pairs == "none", "shapes the pair term, and pairs is 'none'")
        self._must_not_be_set(
            "gamma", self.pairs == "given", "is the exponent of power weights; given pairs have theirs"
        )
        self._must_not_be_set(
            "gamma", self.weight != "power", f"belongs to weight='power', and weight is {self.weight!r}"
        )
        self._must_not_be_set("soft_target", self.flips, "is replaced by the data's flip_probs where flips is True")
        if self.pairs == "given" and self.weight == "lambda":
            raise ValueError("pairs='given' brings its own weights, which weight='lambda' would replace")
        if self.pairs == "given" and self.log_margin:
            raise ValueError("log_margin takes the logarithm of r_i − r_j, which given pairs need not have positive")
        if self.target_temperature and self.list_term != "softmax" and self.pointwise != "nca":
            raise ValueError("target_temperature shapes the target of list_term='softmax' and pointwise='nca' only")

    def _must_not_be_set(self, name: str, condition: bool, why: str) -> None:
        if condition and getattr(self, name) != getattr(Objective, name):
            raise ValueError(
                f"{name} must be left at {getattr(Objective, name)!r}, got {getattr(self, name)!r}: it {why}"
            )

    def numbers(self) -> list[float]:
        """What the operators are given; `Objective.from_numbers` gives the objective back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return [
            float(CHOICES[name].index(value)) if name in CHOICES else float(value) for name, value in values.items()
        ]

    @staticmethod
    def from_numbers(numbers: Sequence[float]) -> "Objective":
        return _from_numbers(tuple(numbers))


@functools.lru_cache(maxsize=64)  # a training run has one or two, and asks at every step
def _from_numbers(numbers: tuple[float, ...]) -> Objective:
    values: dict[str, Any] = {}
    for field, number in zip(fields(Objective), numbers, strict=True):
        if field.name in CHOICES:
            values[field.name] = CHOICES[field.name][int(number)]
        else:
            values[field.name] = bool(number) if isinstance(field.default, bool) else float(number)
    return Objective(**values)


def perpo(beta: float = Objective.beta, gamma: float = Objective.gamma) -> Objective:
    """PerPO (arXiv 2502.04371): all pairs of a list, weighted by (r_i − r_j)^γ, normalised per list."""
    return Objective(beta, gamma)


def uniform_pairs(beta: float = 0.1) -> Objective:
    """Every preferred pair weighs the same: the mean of DPO over all pairs of a list."""
    return Objective(beta, weight="uniform")


def dpo(beta: float = 0.1) -> Objective:
    """DPO (arXiv 2305.18290) of the best against the worst: softplus(−d)."""
    return Objective(beta, pairs="best_vs_worst", weight="uniform")


def cdpo(beta: float = 0.1, epsilon: float = 0.1) -> Objective:
    """Conservative DPO (Mitchell 2023): (1 − ε) softplus(−d) + ε softplus(d), for labels wrong with probability ε."""
    _probability("epsilon", epsilon, 0.5)
    return Objective(beta, pairs="best_vs_worst", weight="uniform", soft_target=1 - epsilon)


def robust_dpo(beta: float = 0.1, epsilon: float = 0.1) -> Objective:
    """Robust DPO (arXiv 2403.00409): the unbiased form of cDPO, soft target (1 − ε) / (1 − 2ε)."""
    _probability("epsilon", epsilon, 0.5)
    return Objective(beta, pairs="best_vs_worst", weight="uniform", soft_target=(1 - epsilon) / (1 - 2 * epsilon))


def rosepo(beta: float = 0.1) -> Objective:
    """RosePO (arXiv 2410.12519): cDPO over all pairs, with ε of each rejected candidate given as `flip_probs` [S]."""
    return Objective(beta, weight="uniform", flips=True)


def ipo(beta: float = 0.1) -> Objective:
    """IPO (arXiv 2310.12036): (d − 1/(2β))² on the unscaled difference of length-normalised log-ratios."""
    return Objective(beta, pairs="best_vs_worst", weight="uniform", link="squared", length_normalized=True)


def hinge(beta: float = 0.1) -> Objective:
    """The hinge of SLiC (arXiv 2305.10425) on log-ratios: max(0, 1 − d)."""
    return Objective(beta, pairs="best_vs_worst", weight="uniform", link="hinge")


def odpo(beta: float = 0.1, alpha: float = 1.0) -> Objective:
    """ODPO (arXiv 2402.10571): softplus(−d + α log(r_w − r_l)), an offset that grows with the reward margin."""
    return Objective(beta, pairs="best_vs_worst", weight="uniform", log_margin=alpha)


def lipo(beta: float = 0.1) -> Objective:
    """LiPO-λ (arXiv 2402.01878): logistic pairs weighted by the change in DCG when they swap places.

    The gain of a candidate is 2^r − 1, so rewards should be of unit scale: 2^128 is infinite in fp32.
    """
    return Objective(beta, weight="lambda", normalize="none")


def sdpo(beta: float = 1.0) -> Objective:
    """S-DPO (arXiv 2406.09215): the best against all others in one softmax, LSE(βs) − βs_w."""
    return Objective(beta, pairs="none", list_term="softmax")


def plackett_luce(beta: float = 0.1) -> Objective:
    """Plackett–Luce (DPO, arXiv 2305.18290, appendix A.3): the likelihood of the whole ranking."""
    return Objective(beta, pairs="none", list_term="plackett_luce")


def infonca(beta: float = 0.01, target_temperature: float = 1.0) -> Objective:
    """InfoNCA (arXiv 2402.05369): cross-entropy between softmax(r / T) and softmax(βs).

    T belongs to the scale of the rewards: the paper's scores go to 10, these to 1. At T far below their differences it
    is S-DPO; at T far above, all candidates are to be equally likely.
    """
    return Objective(beta, pairs="none", list_term="softmax", target_temperature=target_temperature)


def nca(beta: float = 0.01, target_temperature: float = 1.0) -> Objective:
    """NCA (arXiv 2402.05369): −Σ p_i log σ(βs_i) − mean_i log σ(−βs_i); absolute likelihoods are kept up."""
    return Objective(beta, pairs="none", pointwise="nca", target_temperature=target_temperature)


def simpo(beta: float = 2.0, margin: float = 1.0) -> Objective:
    """SimPO (arXiv 2405.14734): mean log-probs, no reference, a constant margin."""
    return Objective(
        beta, pairs="best_vs_worst", weight="uniform", offset=margin, length_normalized=True, reference=False
    )


def rpo(beta: float = 0.01, eta: float = 0.005) -> Objective:
    """RPO (arXiv 2405.16436): DPO − β·η·log π(y_w)."""
    return Objective(beta, pairs="best_vs_worst", weight="uniform", nll=beta * eta)


def mdpo(beta: float = 0.1) -> Objective:
    """mDPO (arXiv 2406.11839): DPO, the same answer against itself under a corrupted image, and an anchor on the best.

    The corrupted-image candidates are further members of the list; `pair_weights` says who is preferred to whom.
    """
    return Objective(beta, pairs="given", weight="uniform", normalize="none", pointwise="anchor")


def p3o(beta: float = 0.5) -> Objective:
    """P3O (arXiv 2310.00212), the pairwise policy gradient, not clipped: mean of −½ (r_i − r_j)(s_i − s_j).

    Over pairs of different rewards; tied ones, which add 0, do not count in the mean.
    """
    return Objective(beta, gamma=1.0, normalize="pairs", link="linear")


def _probability(name: str, value: float, below: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= value < below:
        raise ValueError(f"{name} must lie in [0, {below}), got {value!r}")


PRESETS: dict[str, Callable[..., Objective]] = {
    preset.__name__: preset
    for preset in (
        perpo,
        uniform_pairs,
        dpo,
        cdpo,
        robust_dpo,
        rosepo,
        ipo,
        hinge,
        odpo,
        lipo,
        sdpo,
        plackett_luce,
        infonca,
        nca,
        simpo,
        rpo,
        mdpo,
        p3o,
    )
}
