"""`ListDPOConfig`: the settings of TRL's DPOConfig for lists. Every one of its names works here or is refused in one
sentence; none is ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from perpo.training.config import PerPOConfig
from perpo_kernels import objectives
from perpo_kernels.objectives import PRESETS, Objective


def _sigmoid_norm(beta: float) -> Objective:
    return dataclasses.replace(objectives.dpo(beta), length_normalized=True)


def _nca_pair(beta: float) -> Objective:
    return objectives.nca(beta, target_temperature=0.0)


# TRL's name of a loss -> the objective that is equal to it on a pair. Over a longer list it compares best and worst;
# nca_pair takes all: the best against the rest.
LOSSES: dict[str, Callable[..., Objective]] = {
    "sigmoid": objectives.dpo,
    "hinge": objectives.hinge,
    "ipo": objectives.ipo,
    "robust": objectives.robust_dpo,
    "nca_pair": _nca_pair,
    "sigmoid_norm": _sigmoid_norm,
}
OF_MODEL = ("dtype", "attn_implementation", "trust_remote_code", "revision")  # of `perpo.load_model`

# What TRL has and this has not: name -> (values that ask for nothing, what to do instead).
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "loss_weights": ((None,), "one loss_type is trained at a time; objective='rpo' is DPO with a likelihood term"),
    "ld_alpha": (
        (None,),
        "tokens beyond the shared length are not weighed; objective='ipo' and 'simpo' divide by length",
    ),
    "f_divergence_type": (("reverse_kl",), "scores are log-ratios; leave it out"),
    "f_alpha_divergence_coef": ((0.5,), "scores are log-ratios; leave it out"),
    "use_weighting": ((False,), "pairs are weighted by their rewards (objective='perpo'); leave it out"),
    "discopop_tau": ((0.05,), "there is no loss_type 'discopop' here; leave it out"),
    "activation_offloading": ((False,), "gradient_checkpointing=True saves more; leave it out"),
    "sync_ref_model": ((False,), "the reference is fixed; start a second run from the trained model"),
    "ref_model_mixup_alpha": ((0.6,), "the reference is fixed; leave it out"),
    "ref_model_sync_steps": ((512,), "the reference is fixed; leave it out"),
    "padding_free": ((False,), "prefix_sharing packs a list into one row; leave it out"),
    "pad_to_multiple_of": (("auto", None), "rows are as long as they are; leave it out"),
    "truncation_mode": (("keep_start",), "responses are cut at their end and prompts never; leave it out"),
    "dataset_num_proc": ((None,), "lists are encoded as they are needed; set dataloader_num_workers"),
    "precompute_ref_batch_size": ((None,), "reference log-probs are computed a list at a time; leave it out"),
    "pad_token": ((None,), "set tokenizer.pad_token"),
    "router_aux_loss_coef": ((None, 0), "the load-balancing loss of experts is not computed here; set it to 0.0"),
}


@dataclass
class ListDPOConfig(PerPOConfig):
    """Settings of `ListDPOTrainer`: those of `PerPOConfig`, and the names of TRL's `DPOConfig`.

    Defaults are those published with PerPO where the two differ: learning_rate 5e-6, a cosine schedule, no
    gradient_checkpointing, bf16 only where the model's weights are, max_length without a limit, one pass.

    Raises:
        ValueError: a setting of TRL that is not supported, or two that contradict each other; what to do instead.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *PerPOConfig._VALID_DICT_FIELDS,
        "model_init_kwargs",
    ]  # JSON on the command line

    objective: Objective | str | None = field(
        default=None,
        metadata={
            "help": f"What is minimised over a list: {', '.join(PRESETS)}; default: perpo, which is DPO on pairs."
        },
    )
    loss_type: list[str] | None = field(
        default=None,
        metadata={
            "help": f"TRL's name of a loss, in place of objective: {', '.join(LOSSES)}.",
            "choices": list(LOSSES),
        },
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Of loss_type='robust': the probability that a preference is wrong."}
    )
    reference_free: bool = field(default=False, metadata={"help": "No reference, as reference='none'."})
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata={
            "help": "True: reference log-probs are computed once and kept on disk, as reference='precomputed', for "
            "vision-language models too. False: at every step. Default: once, unless a ref_model is given."
        },
    )
    max_completion_length: int | None = field(default=None, metadata={"help": "As max_response_length."})
    disable_dropout: bool = field(default=True, metadata={"help": "Turn off the dropout layers, adapters' included."})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": f"Of a model given by name: {', '.join(OF_MODEL)}."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Of a model and processor given by name."})

    # Not supported: see _REFUSED
    loss_weights: list[float] | None = None
    ld_alpha: float | None = None
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    use_weighting: bool = False
    discopop_tau: float = 0.05
    activation_offloading: bool = False
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512
    padding_free: bool = False
    pad_to_multiple_of: int | str | None = "auto"
    truncation_mode: str = "keep_start"
    dataset_num_proc: int | None = None
    precompute_ref_batch_size: int | None = None
    pad_token: str | None = None
    router_aux_loss_coef: float | None = None

    def __post_init__(self) -> None:
        for name, (nothing, advice) in _REFUSED.items():
            if getattr(self, name) not in nothing:
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported for lists: {advice}")
        self._check_loss_type()
        if self.max_completion_length is not None:
            if self.max_response_length not in (self.max_completion_length, ListDPOConfig.max_response_length):
                raise ValueError(
                    f"max_completion_length={self.max_completion_length} and max_response_length="
                    f"{self.max_response_length} are two names of one setting; give one"
                )
            self.max_response_length = self.max_completion_length
        # Whether the user says where the reference comes from; else the trainer decides, which knows the models.
        self.reference_is_given = self._name_reference()
        super().__post_init__()
        self.max_completion_length = self.max_response_length
        if self.loss_type is not None:
            self.objective = None  # so that a config of these values can be made again
        if isinstance(self.model_init_kwargs, str):
            raise ValueError(f"model_init_kwargs must be a mapping, got {self.model_init_kwargs!r}")
        if unknown := sorted(set(self.model_init_kwargs or {}) - set(OF_MODEL)):
            raise ValueError(
                f"model_init_kwargs: {', '.join(unknown)} not known (known: {', '.join(OF_MODEL)}); load the model "
                "yourself and give it to the trainer"
            )

    def _check_loss_type(self) -> None:
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        smoothing = self.label_smoothing
        if self.loss_type is None:
            if smoothing:
                raise ValueError(
                    f"label_smoothing={smoothing} belongs to loss_type='robust'; for an objective give "
                    f"objective='cdpo' with objective_options={{'epsilon': {smoothing}}}"
                )
            return
        if len(self.loss_type) != 1:
            raise ValueError(
                f"loss_type={self.loss_type}: one loss is trained at a time; objective='rpo' is DPO with a likelihood "
                "term, and docs/objectives.md has the others"
            )
        (name,) = self.loss_type
        if name not in LOSSES:
            raise ValueError(
                f"loss_type={name!r} is not supported for lists; of TRL's there are {', '.join(LOSSES)}, and "
                f"objective={'|'.join(PRESETS)}"
            )
        if smoothing and name != "robust":
            raise ValueError(
                f"label_smoothing={smoothing}: loss_type={name!r} does not use it (nor does TRL); give "
                f"loss_type='robust', or objective='cdpo' with objective_options={{'epsilon': {smoothing}}}"
            )
        given = {one: getattr(self, one) for one in ("objective", "gamma", "objective_options")}
        if twice := [one for one, value in given.items() if value is not None]:
            raise ValueError(f"{', '.join(twice)}: loss_type={name!r} says what is minimised; leave one of them out")

    def _name_reference(self) -> bool:
        asked = {"reference_free": "none"} if self.reference_free else {}
        if self.precompute_ref_log_probs:
            asked["precompute_ref_log_probs"] = "precomputed"
        for name, reference in asked.items():
            if self.reference not in (None, reference):
                raise ValueError(f"{name}=True means reference={reference!r}, but {self.reference!r} is given as well")
            self.reference = reference
        return self.reference is not None

    @property
    def list_objective(self) -> Objective:
        if self.loss_type is None:
            return super().list_objective
        (name,) = self.loss_type
        options = {"epsilon": self.label_smoothing} if name == "robust" else {}
        return LOSSES[name](0.1 if self.beta is None else self.beta, **options)  # TRL's default for all of them
