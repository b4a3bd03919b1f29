"""What is run: a question is a set of arms, an arm one way to align the demo's model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from perpo.storage.fingerprints import fingerprint
from perpo_kernels.objectives import PRESETS

SFT = "sft"
SWEPT = (5e-5, 1e-4, 2e-4, 4e-4)  # and further ones where the best is the first or the last of them
VALIDATION_SEEDS = (100, 101, 102)  # all rates with the first, the two best with all
OBJECTIVES = ("perpo", "uniform_pairs", "dpo", "grpo", "dr_grpo", "gspo")
ROUNDS = (1, 2, 4, 8)
SIZES = (2, 4, 8, 16, 32)
GAMMAS = (0.0, 0.5, 1.0, 2.0)
NOISES = (0.0, 0.1, 0.2, 0.4)
PASSES = (1, 2, 4, 8)
BETAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Arm:
    """One way to align the model, with one seed.

    Attributes:
        pictures: that answers are sampled for, in all rounds together.
        rounds: how often answers are sampled anew; every round has pictures / rounds of its own.
        learning_rate: None: the best of the sweep.
        passes: over the lists of a round; the model is measured after each of `measured`. Over several passes the
            learning rate is constant, so that a run is the beginning of a longer one; otherwise it falls as a cosine.
        noise: each side of the true boxes that answers are scored with is off by this share of the box's size.
        answers: which of a list's answers are trained on: "all"; the half with the "best" or the "worst" rewards;
            "ends": the best and the worst quarter; "copies": the first half, each beside a copy of itself with one side
            moved by a hundredth.
        probes: the no-image gap and the drift are measured too.
    """

    task: str = "grounding"
    seed: int = 0
    objective: str = "perpo"
    rounds: int = 1
    pictures: int = 256
    k: int = 16
    learning_rate: float | None = None
    beta: float | None = None
    gamma: float | None = None
    degree_weight: float = 0.0
    passes: int = 1
    measured: tuple[int, ...] = ()
    noise: float = 0.0
    answers: str = "all"
    split: str = "test"
    held_out: int = 2000
    probes: bool = False

    def __post_init__(self) -> None:
        if self.pictures % self.rounds:
            raise ValueError(f"rounds: {self.pictures} pictures cannot be shared out over {self.rounds} rounds")
        for name in ("beta", "gamma"):  # one name for one arm
            if getattr(self, name) == getattr(PRESETS[self.objective]() if self.objective != SFT else None, name, ...):
                object.__setattr__(self, name, None)

    @property
    def key(self) -> str:
        """What the arm is known by in the rows; what is measured beside is not part of it."""
        return fingerprint(repr(sorted(replace(self, probes=False).named().items())))

    @classmethod
    def of_row(cls, named: dict[str, Any]) -> Self:
        return cls(**{**named, "measured": tuple(named.get("measured", ()))})

    def named(self) -> dict[str, Any]:
        """What differs from the defaults, for a row."""
        plain = asdict(Arm())
        return {name: value for name, value in asdict(self).items() if value != plain[name] or name in ("task", "seed")}


def sweep(tasks: Sequence[str]) -> list[Arm]:
    """Every objective with every learning rate on validation pictures, for one round and for four, with one seed."""
    return [
        Arm(task, VALIDATION_SEEDS[0], objective, rounds, learning_rate=rate, split="validation", held_out=1000)
        for task in tasks
        for objective in OBJECTIVES
        for rounds in (1, 4)
        for rate in SWEPT
    ]


def questions(seeds: Sequence[int]) -> dict[str, list[Arm]]:
    """Name of a question -> its arms. Arms that two of them share are run once."""

    def each(base: Arm, **varied: Sequence[Any]) -> list[Arm]:
        arms = [replace(base, seed=seed) for seed in seeds]
        for name, values in varied.items():
            arms = [replace(arm, **{name: value}) for arm in arms for value in values]
        return arms

    plain, probed = Arm(), Arm(probes=True)
    return {
        "race": each(replace(probed, objective=SFT)) + each(probed, objective=OBJECTIVES, rounds=ROUNDS),
        "margins": each(plain, gamma=GAMMAS, noise=NOISES) + each(plain, objective=("dpo", "grpo"), noise=NOISES),
        "size": each(plain, objective=("perpo", "dpo"), k=SIZES),
        "pairs": each(plain, objective=("perpo", "uniform_pairs"), answers=("all", "best", "worst", "ends")),
        "reading": each(replace(probed, task="ocr", objective=SFT))
        + each(replace(probed, task="ocr"), objective=OBJECTIVES, rounds=(1, 4)),
        "rates": each(replace(probed, task="ocr", rounds=4), learning_rate=SWEPT),
        "copies": each(replace(plain, answers="copies"), gamma=GAMMAS),
        "degree": each(plain, degree_weight=(0.0, 0.1, 1.0)),
        "passes": each(replace(plain, passes=PASSES[-1], measured=PASSES), objective=("perpo", "dpo", "grpo", "gspo")),
        "beta": each(plain, objective=("perpo", "dpo"), beta=BETAS),
        "tokens": [arm for k in SIZES for arm in each(replace(plain, k=k, pictures=4096 // k)) if k != 16],
    }
