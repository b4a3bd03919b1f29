"""List-wise objectives: what is minimised over the scores of one list of candidates.

An objective is a value, not code: one kernel reads it, with branches resolved when it is compiled. Symbols, for a
list of k candidates:

    s_i   score: Σ_t ω_t log π(y_it) − log π_ref(y_i), divided by the number of tokens if `length_normalized`
    r_i   reward; only its order and its differences matter
    d_ij  = β (s_i − s_j) − m_ij,   m_ij = offset + log_margin · log(r_i − r_j)
    p_i   target: softmax(r / target_temperature)_i, or the best candidates in equal shares at target_temperature 0
    q_i   the worst candidates in equal shares
    A_i   advantage, centered: r_i − r̄       standardized: (r_i − r̄) / √(Σ_j (r_j − r̄)² / (k − 1))

The loss of a list is a sum of terms, each of which may be absent and has a weight (pair_scale, list_scale,
pointwise_scale, nll):

    pair term       Σ_ij w_ij ℓ(d_ij) over the chosen pairs (i better than j)
    list term       softmax: −Σ_i p_i log softmax(βs)_i       plackett_luce: Σ_j (log Σ_{m: r_m ≤ r_j} exp βs_m − βs_j)
    pointwise term  nca: −Σ_i p_i log σ(βs_i) − 1/k Σ_i log σ(−βs_i)       anchor: −Σ_i p_i log σ(βs_i)
                    bco: −Σ_i p_i log σ(βs_i − δ) − Σ_i q_i log σ(δ − βs_i), p at target_temperature 0, δ given or 0
                    policy_gradient: −β/k Σ_i A_i s_i
                    clipped: −β/k Σ_i min(ρ_i A_i, clip(ρ_i, 1 − clip_low, 1 + clip_high) A_i),
                        ρ_i = exp(min(s_i, 80)), with the policy that sampled the candidates for π_ref
    nll term        −nll · Σ_i p_i Σ_t ω_t log π(y_it), p at target_temperature 0; each sum divided by its number of
                        tokens if `nll_per_token`

    link ℓ          logistic: softplus(−d) + (1 − q) d       hinge: max(0, 1 − d)
                    squared: ((d − 1/2) / β)²                linear: −d
    weights w_ij    uniform: 1       power: (r_i − r_j)^γ       given: any matrix [k, k]
                    lambda: |2^r_i − 2^r_j| · |1/log(1 + τ_i) − 1/log(1 + τ_j)|, τ the rank by score, 1 the highest
                        (equal scores by
                    position; ranks are constants)
    normalize       list: w / Σ w       pairs: w / number of pairs       none

For every objective: weights, targets and ranks are constants; an invalid candidate (no token, a NaN or infinite
reward) is left out of every term; a list in which no candidate is better than another has loss 0 and gradient 0.
The gradient of the pair, softmax, Plackett–Luce and policy-gradient terms sums to 0 over the list.

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
    "pointwise": ("none", "nca", "anchor", "bco", "policy_gradient", "clipped"),
    "advantage": ("centered", "standardized"),
}


SMALLEST_TEMPERATURE = 1e-30  # 1 / T has to be a number of fp32
LARGEST_LOG_RATIO = 80.0  # exp of it is a number of fp32; a ratio beyond it is held there
POLICY_GRADIENTS = ("policy_gradient", "clipped")  # the pointwise terms with an advantage


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
        pointwise: "none", "nca", "anchor", "bco" (takes δ as `delta` with the data), "policy_gradient" or "clipped"
            (the reference log-probs must be given, and be of the policy that sampled).
        nll: ≥ 0, weight of the negative log-likelihood of the best candidates.
        length_normalized: scores are means over tokens.
        reference: False refuses reference log-probs.
        flips: the data must hold `flip_probs`, each candidate's own 1 − q.
        pair_scale, list_scale, pointwise_scale: > 0, the weights of these terms; one that is absent has none.
        nll_per_token: the likelihood of the nll term is a mean over tokens.
        advantage: "centered" or "standardized", of the two policy gradients.
        clip_low, clip_high: ≥ 0, how far ratios of pointwise="clipped" are followed below and above 1.

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
    pair_scale: float = 1.0
    list_scale: float = 1.0
    pointwise_scale: float = 1.0
    nll_per_token: bool = False
    advantage: str = "centered"
    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in (field.name for field in fields(self) if isinstance(field.default, float)):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            if not -math.inf < value < math.inf:
                raise ValueError(f"{name} must be finite, got {value!r}")
        for name in (field.name for field in fields(self) if isinstance(field.default, bool)):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("beta", "pair_scale", "list_scale", "pointwise_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be a finite number > 0, got {getattr(self, name)!r}")
        if 0 < self.target_temperature < SMALLEST_TEMPERATURE:
            raise ValueError(
                f"target_temperature must be 0 (the best alone) or at least {SMALLEST_TEMPERATURE}, "
                f"got {self.target_temperature!r}"
            )
        for name in ("gamma", "target_temperature", "nll", "soft_target", "clip_low", "clip_high"):
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
        for of_pairs in ("weight", "gamma", "normalize", "link", "offset", "log_margin", "pair_scale"):
            self._must_not_be_set(of_pairs, self.pairs == "none", "shapes the pair term, and pairs is 'none'")
        self._must_not_be_set("list_scale", self.list_term == "none", "weighs the list term, and list_term is 'none'")
        self._must_not_be_set(
            "pointwise_scale", self.pointwise == "none", "weighs the pointwise term, and there is none"
        )
        self._must_not_be_set("nll_per_token", self.nll == 0, "shapes the nll term, and nll is 0")
        self._must_not_be_set(
            "advantage",
            self.pointwise not in POLICY_GRADIENTS,
            f"is of pointwise='policy_gradient' and 'clipped', and pointwise is {self.pointwise!r}",
        )
        for of_ratios in ("clip_low", "clip_high"):
            self._must_not_be_set(
                of_ratios,
                self.pointwise != "clipped",
                f"is of pointwise='clipped', and pointwise is {self.pointwise!r}",
            )
        if self.pointwise == "clipped" and not self.reference:
            raise ValueError(
                "pointwise='clipped' takes the ratio to the policy that sampled, so reference must be True"
            )
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


def dr_grpo(beta: float = 1.0) -> Objective:
    """Dr. GRPO (arXiv 2503.20783), one step on lists just sampled: −β/k Σ (r_i − r̄) s_i. No clipping, no KL term.

    RLOO (arXiv 2402.14740) is β = k / (k − 1); `p3o` is RLOO too, over lists without ties.
    """
    return Objective(beta, pairs="none", pointwise="policy_gradient")


def grpo(beta: float = 1.0) -> Objective:
    """GRPO (arXiv 2402.03300), one step on lists just sampled: −β/k Σ (r_i − r̄) / std(r) · s_i. No clipping, no KL.

    Of whole answers: s is a sum over tokens. The paper's mean over tokens is `length_normalized=True`.
    """
    return Objective(beta, pairs="none", pointwise="policy_gradient", advantage="standardized")


def gspo(beta: float = 1.0, clip_low: float = 3e-4, clip_high: float = 4e-4) -> Objective:
    """GSPO (arXiv 2507.18071): GRPO's advantages times ρ_i = (π(y_i) / π_old(y_i))^(1/n_i), clipped.

    `ref_log_probs` are those of the policy that sampled. The clipping range is the paper's.
    """
    return Objective(
        beta, pairs="none", pointwise="clipped", advantage="standardized", length_normalized=True, clip_low=clip_low,
        clip_high=clip_high,
    )  # fmt: skip


def bco(beta: float = 0.1) -> Objective:
    """BCO (arXiv 2404.04656) of the best and the worst: −log σ(βs_w − δ) − log σ(δ − βs_l).

    δ, the data's `delta`, is the mean of βs so far; without one it is 0, as in TRL's "bco_pair".
    """
    return Objective(beta, pairs="none", pointwise="bco")


def mpo(beta: float = 0.1) -> Objective:
    """MPO (InternVL, arXiv 2411.10442): 0.8 DPO + 0.2 BCO + 1.0 mean negative log-likelihood per token of the best."""
    return Objective(
        beta, pairs="best_vs_worst", weight="uniform", pair_scale=0.8, pointwise="bco", pointwise_scale=0.2, nll=1.0,
        nll_per_token=True,
    )  # fmt: skip


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
        dr_grpo,
        grpo,
        gspo,
        bco,
        mpo,
    )
}
