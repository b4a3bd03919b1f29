"""Draw docs/objectives/coefficients.png: how hard each objective pulls at each answer of one list.

    python docs/draw_coefficients.py

Left, the policy is the reference, so only the rewards count. Right, it has learnt to rank the list: β·score is
3 · reward. Each is −∂L/∂s in multiples of the sum of its sizes at the left.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt

import perpo_kernels as pk
from perpo_kernels import objectives
from perpo_kernels.objectives import Objective

PICTURE = Path(__file__).with_name("objectives") / "coefficients.png"
REWARDS = (0.02, 0.07, 0.12, 0.17, 0.22, 0.78, 0.95)
LEARNT = 3.0  # β · score of an answer of reward 1
DRAWN: dict[str, tuple[Objective, str, str]] = {  # colours of Okabe and Ito
    "uniform pairs (γ = 0)": (objectives.uniform_pairs(), "#56B4E9", "v:"),
    "PerPO, γ = 0.5": (objectives.perpo(gamma=0.5), "#D55E00", "o-"),
    "PerPO, γ = 1": (objectives.perpo(gamma=1.0), "#E69F00", "s-"),
    "PerPO, γ = 2": (objectives.perpo(gamma=2.0), "#CC79A7", "D-"),
    "GRPO": (objectives.grpo(), "#000000", "x--"),
    "DPO, best against worst": (objectives.dpo(), "#0072B2", "^:"),
}


def pull(objective: Objective, learnt: float) -> torch.Tensor:  # [k]
    """−∂L/∂s of each answer."""
    rewards = torch.tensor([REWARDS], dtype=torch.float64)
    scores = (learnt / objective.beta * rewards).requires_grad_()
    loss = pk.perpo_loss(scores, rewards, objective=objective, backend="eager")
    return -torch.autograd.grad(loss, scores)[0][0]


def draw() -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, learnt, title in zip(axes, (0.0, LEARNT), ("at the reference", "after the list is learnt"), strict=True):
        for name, (objective, color, style) in DRAWN.items():
            values = pull(objective, learnt) / pull(objective, 0.0).abs().sum()
            axis.plot(REWARDS, values, style, color=color, label=name, markersize=5, linewidth=1.5)
        axis.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        axis.set(title=title, xlabel="reward of the answer")
    axes[0].set_ylabel("pull at its log-probability")
    axes[0].legend(frameon=False, fontsize=8)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    draw()
