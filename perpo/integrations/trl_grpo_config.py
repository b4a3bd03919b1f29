"""`ListGRPOConfig`: TRL's GRPOConfig, with an objective over lists in place of its settings of the GRPO loss."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from perpo.integrations.trl_versions import require_trl
from perpo.training.objective import named_objective
from perpo_kernels.objectives import PRESETS, Objective

require_trl()
from trl import GRPOConfig  # noqa: E402 - needs trl

REFERENCES = ("sampler", "model", "none")

# Settings of the GRPO loss, which is not computed. They must be as TRL has them.
OF_ITS_LOSS = (
    "loss_type",
    "epsilon",
    "epsilon_high",
    "delta",
    "sapo_temperature_neg",
    "sapo_temperature_pos",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
    "importance_sampling_level",
    "multi_objective_aggregation",
    "scale_rewards",
    "top_entropy_quantile",
    "entropy_coef",
    "use_adaptive_entropy",
    "entropy_coef_min",
    "entropy_coef_max",
    "entropy_coef_delta",
    "entropy_target",
    "off_policy_mask_threshold",
    "use_bias_correction_kl",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_cap",
    "cast_lm_head_to_fp32",
)


@dataclass
class ListGRPOConfig(GRPOConfig):
    """Settings of `ListGRPOTrainer`: sampling, rewards and training as `trl.GRPOConfig`, and the loss of a list.

    `beta` keeps both its meanings: 0 (TRL's default) runs no reference model; above 0 there is one, and β is also that
    of the objective.

    Raises:
        ValueError: settings of the GRPO loss, or ones that contradict each other; what to do instead.
    """

    # HfArgumentParser parses the option as the second type of the union.
    objective: Objective | str | None = field(
        default="perpo",
        metadata={
            "help": f"What is minimised over the answers to a prompt: {', '.join(PRESETS)}; in Python also an Objective"
        },
    )
    gamma: float | None = field(
        default=None, metadata={"help": "Exponent of the reward margins in perpo's pair weights; default: 0.5."}
    )
    objective_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Its other numbers, as JSON or YAML mapping: {"beta": 0.2} where beta is 0.'}
    )
    reference: str | None = field(
        default=None,
        metadata={
            "help": "What the scores of answers are measured against: 'sampler' (the model as it was when it gave the "
            "answers), 'model' (TRL's reference model; beta above 0) or 'none' (plain log-probs). Default: 'model' "
            "where beta is above 0, else 'sampler'; 'none' for an objective without a reference (simpo).",
            "choices": list(REFERENCES),
        },
    )
    vllm_importance_sampling_correction: bool = field(
        default=False, metadata={"help": "Must stay off: a list's loss has no ratio of tokens to correct."}
    )

    def __post_init__(self) -> None:
        if self.objective is None:
            self.objective = "perpo"
        default = {one.name: one.default for one in dataclasses.fields(GRPOConfig)}
        for name in OF_ITS_LOSS:
            if name in default and getattr(self, name) != default[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} belongs to the GRPO loss, and here the loss is objective="
                    f"{self.objective!r}: leave it out, or train with trl.GRPOTrainer"
                )
        if self.vllm_importance_sampling_correction:
            raise ValueError(
                "vllm_importance_sampling_correction=True corrects ratios of tokens, which a list's loss has none of; "
                "leave it out"
            )
        if self.router_aux_loss_coef not in (None, 0, default["router_aux_loss_coef"]):
            raise ValueError(
                f"router_aux_loss_coef={self.router_aux_loss_coef}: the load-balancing loss of experts is not computed "
                "here; set it to 0.0"
            )
        super().__post_init__()
        self._check_lists()
        self._check_objective()

    def _check_lists(self) -> None:
        if self.per_device_train_batch_size % self.num_generations:
            raise ValueError(
                f"per_device_train_batch_size={self.per_device_train_batch_size} must be a multiple of num_generations="
                f"{self.num_generations}: a forward pass takes whole lists. Smaller lists, or gradient_checkpointing "
                "and a larger batch"
            )
        k = self.num_generations_eval or self.num_generations
        if self.eval_strategy != "no" and self.per_device_eval_batch_size % k:
            raise ValueError(
                f"per_device_eval_batch_size={self.per_device_eval_batch_size} must be a multiple of the {k} answers "
                "to a prompt (num_generations_eval, or num_generations)"
            )

    def _check_objective(self) -> None:
        loss = self.list_objective
        if loss.flips or loss.pairs == "given":
            lacking = "flip_probs" if loss.flips else "pairs of its own"
            raise ValueError(
                f"objective={self.objective!r} needs {lacking}, which sampled answers do not come with; take another, "
                "or train offline with perpo.PerPOTrainer"
            )
        if isinstance(self.objective, Objective) and self.beta not in (0.0, loss.beta):
            raise ValueError(
                f"beta={self.beta}, but objective has beta={loss.beta}: give both the same, or beta=0 for no reference "
                "model"
            )
        if self.reference is None:
            self.reference = "none" if not loss.reference else "model" if self.beta else "sampler"
        if self.reference not in REFERENCES:
            raise ValueError(f"reference must be one of {', '.join(REFERENCES)}; got {self.reference!r}")
        if self.reference != "none" and not loss.reference:
            raise ValueError(
                f"reference={self.reference!r}: objective={self.objective!r} has no reference; leave it out"
            )
        if (self.reference == "model") != bool(self.beta):
            advice = (
                "set beta above 0" if self.reference == "model" else "leave beta at 0, and give it in objective_options"
            )
            raise ValueError(
                f"reference={self.reference!r} with beta={self.beta}: TRL runs a reference model where beta is above "
                f"0; {advice}"
            )

    @property
    def list_objective(self) -> Objective:
        """What `objective`, `beta`, `gamma` and `objective_options` say together."""
        assert self.objective is not None
        beta = None if isinstance(self.objective, Objective) or not self.beta else self.beta
        return named_objective(self.objective, beta, self.gamma, self.objective_options)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if isinstance(self.objective, Objective):
            values["objective"] = dataclasses.asdict(self.objective)
        return values
