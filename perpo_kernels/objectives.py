"""List-wise objectives: what is minimised over the scores of one list of candidates.

An objective is a value, not code: the kernels read its numbers. With scores s_i = log π(y_i) − log π_ref(y_i) and
rewards r_i, the objective implemented here is the reward-weighted pairwise logistic loss

    w_ij = (r_i − r_j)^γ / Σ_{a,b: r_a > r_b} (r_a − r_b)^γ          for r_i > r_j, else 0
    L    = Σ_{i,j: r_i > r_j} w_ij · softplus(−β (s_i − s_j))
    ∂L/∂s_i = β (Σ_j G_ij − Σ_j G_ji),   G_ij = −w_ij · σ(−β (s_i − s_j))

PerPO (arXiv 2502.04371, section 3) is γ = 0.5. At k = 2 it is DPO (arXiv 2305.18290) for every γ; γ = 0 is the plain
mean over pairs; γ → ∞ leaves the best against the worst.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Objective:
    """A pairwise logistic objective with power-of-margin pair weights.

    Args:
        beta: β > 0, the inverse temperature of the implicit reward β·s. Published: 0.1.
        gamma: γ ≥ 0, the exponent of the reward margin in a pair's weight. Published: 0.5.

    Raises:
        ValueError: beta or gamma outside its range.
    """

    beta: float = 0.1
    gamma: float = 0.5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ValueError(f"beta must be a finite number > 0, got {self.beta!r}")
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ValueError(f"gamma must be a finite number >= 0, got {self.gamma!r}")

    def numbers(self) -> list[float]:
        """What the operators and kernels are given; `Objective(*numbers)` gives the objective back."""
        return [float(self.beta), float(self.gamma)]


def perpo(beta: float = 0.1, gamma: float = 0.5) -> Objective:
    """PerPO (arXiv 2502.04371): all pairs of a list, weighted by (r_i − r_j)^γ, normalised per list."""
    return Objective(beta, gamma)


def uniform_pairs(beta: float = 0.1) -> Objective:
    """Every preferred pair weighs the same: the mean of DPO over all pairs of a list (γ = 0)."""
    return Objective(beta, 0.0)
