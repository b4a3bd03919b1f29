"""The settings of a training run: `PerPOConfig`, what `transformers.TrainingArguments` has and what PerPO adds."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from perpo.encoding.corruption import CORRUPTIONS
from perpo.model.sharing import SHARING
from perpo.training.objective import named_objective
from perpo.training.sharding import check_deepspeed, join_deepspeed
from perpo_kernels.chunks import CPU_CHUNK_BYTES, DEVICE_CHUNK_BYTES
from perpo_kernels.objectives import PRESETS, Objective
from perpo_kernels.references import TOLERANCE

REFERENCES = ("precomputed", "start", "adapter_off", "model", "data", "none")


@dataclass
class PerPOConfig(TrainingArguments):
    """Settings of `PerPOTrainer`. Defaults that differ from `TrainingArguments` are those published with PerPO."""

    # HfArgumentParser parses the option as the second type of the union.
    objective: Objective | str | None = field(
        default="perpo",
        metadata={
            "help": f"What is minimised over a list: {', '.join(PRESETS)}; see docs/objectives.md. In Python also an "
            "Objective."
        },
    )
    beta: float | None = field(
        default=None,
        metadata={"help": "Strength of the pull towards the reference; default: that of the objective, as published."},
    )
    gamma: float | None = field(
        default=None,
        metadata={
            "help": "Exponent of the reward margins in perpo's pair weights; 0 weighs all pairs alike; default: 0.5."
        },
    )
    objective_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Its other numbers, as JSON or YAML mapping: {"epsilon": 0.2}.'},
    )
    image_corruption: str | None = field(
        default=None,
        metadata={
            "help": "What mdpo does to the image that it sets against the true one; default: 'crop' (a random 0.01 to "
            "0.2 of the area).",
            "choices": list(CORRUPTIONS),
        },
    )
    degree_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the cross-entropy of a second head, which tells the level of an answer's reward from "
            "its hidden states (SPO); 0: none."
        },
    )
    degree_levels: int | None = field(
        default=None, metadata={"help": "Levels between a list's worst and best reward for degree_weight; default: 3."}
    )
    reference: str | None = field(
        default=None,
        metadata={
            "help": "Where log-probs under the reference model come from: 'precomputed' (once, by the model as it is "
            "before training, adapters off; kept on disk), 'start' (the same with the adapters that training begins "
            "with), 'adapter_off' (the model without its adapters, at every step), 'model' (a second model, given to "
            "the trainer or named by ref_model_name_or_path), 'data' (the records' ref_log_probs), 'none' (no "
            "reference). Default: 'precomputed'; 'none' for an objective without a reference (simpo); 'start' for one "
            "that takes ratios to the policy that sampled (gspo).",
            "choices": list(REFERENCES),
        },
    )
    ref_model_name_or_path: list[str] | None = field(
        default=None,
        metadata={
            "help": "The second model of reference='model', which is run at every step; or several, which are one "
            "reference together (MRPO). Several are run once before training, one after another, and what each gives "
            "is kept on disk."
        },
    )
    ref_model_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "How much each of several reference models counts: numbers ≥ 0 that add up to 1, in their order. "
            "Default: all the same."
        },
    )
    reference_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of precomputed reference log-probs; default: output_dir/reference. Runs with the same "
            "model, processor, max_response_length and max_length can share one."
        },
    )
    max_candidates: int | None = field(
        default=None,
        metadata={"help": "Use at most this many candidates of a list: best, worst and evenly spaced ranks between."},
    )
    min_candidates: int = field(
        default=2,
        metadata={"help": "Leave out lists with fewer candidates: one alone has nothing to be compared with."},
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "A prompt with more tokens, image included, is an error. Prompts are never cut."},
    )
    max_response_length: int | None = field(
        default=1024, metadata={"help": "Responses are cut after this many tokens, and then have no end-of-turn token."}
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Responses are also cut where prompt, image included, and response have this many tokens. A prompt "
            "that leaves none for a response is an error."
        },
    )
    image_root: str | None = field(
        default=None,
        metadata={
            "help": "Folder that image paths of records are under; none may lead out of it. Default: paths as they "
            "are, for records that you trust."
        },
    )
    max_tokens_per_row: int | None = field(
        default=None,
        metadata={
            "help": "Budget of tokens for a forward pass: it takes as many lists, each with its k candidates, as fit. "
            "A longer list is fed alone. Every list is encoded once before training to count its tokens. Default: "
            "per_device_train_batch_size lists."
        },
    )
    prefix_sharing: str = field(
        default="auto",
        metadata={
            "help": "Feed image and prompt once a list instead of once a candidate: 'auto' (for architectures known "
            "to be exact), 'on' (any; what it gives is compared with separate rows first), 'off'.",
            "choices": list(SHARING),
        },
    )
    flash_attention_impl: str | None = field(
        default=None,
        metadata={
            "help": "Another flash attention in the place of PyTorch's own, by its name in "
            "torch.nn.attention.list_flash_attention_impls(): FA4 (flash-attn-4; Hopper, Blackwell). It needs shared "
            "prompts on a GPU, and is compared with PyTorch's own before the first step."
        },
    )
    max_chunk_bytes: int | None = field(
        default=None,
        metadata={
            "help": f"Bytes of one chunk of logits inside the loss; default: {CPU_CHUNK_BYTES >> 20} MiB on the CPU, "
            f"{DEVICE_CHUNK_BYTES >> 30} GiB elsewhere."
        },
    )

    # Settings of TrainingArguments that have another default or effect here
    bf16: bool = field(
        default=False,
        metadata={
            "help": "Compute in bf16; trained weights stay in fp32. Always on for a model whose weights are bf16."
        },
    )
    learning_rate: float = field(default=5e-6, metadata={"help": "Initial learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The schedule of the learning rate."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the lists."})
    per_device_train_batch_size: int = field(
        default=1, metadata={"help": "Lists a device and forward pass, each with its k candidates."}
    )
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Lists a device and forward pass."})
    logging_steps: float = field(default=10, metadata={"help": "Log every this many optimizer steps."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "'true': resume from the last whole checkpoint of output_dir, if any; or a checkpoint's folder."
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the collator needs whole records."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={
            "help": "Turn on only if vision tower or projector are trained and some lists have no image. On, it does "
            "not go together with reentrant gradient checkpointing."
        },
    )

    def __post_init__(self) -> None:
        check_deepspeed(self)
        super().__post_init__()
        join_deepspeed(self)
        self._check_objective()
        self._check_ref_models()
        if not 0 <= self.degree_weight < math.inf:
            raise ValueError(f"degree_weight must be a finite number ≥ 0, got {self.degree_weight}")
        if self.degree_weight:
            self.degree_levels = 3 if self.degree_levels is None else self.degree_levels
        elif self.degree_levels is not None:
            raise ValueError("degree_levels is given, but degree_weight=0 does not use it; set degree_weight")
        if self.degree_levels is not None and self.degree_levels < 2:
            raise ValueError(f"degree_levels must be ≥ 2, got {self.degree_levels}")
        if self.prefix_sharing not in SHARING:
            raise ValueError(f"prefix_sharing must be one of {', '.join(SHARING)}; got {self.prefix_sharing!r}")
        if self.min_candidates < 1:
            raise ValueError(f"min_candidates must be ≥ 1, got {self.min_candidates}")
        if self.max_candidates is not None and self.max_candidates < max(2, self.min_candidates):
            raise ValueError(
                f"max_candidates must be ≥ 2 and ≥ min_candidates={self.min_candidates}, got {self.max_candidates}"
            )
        for name in ("max_prompt_length", "max_response_length", "max_length", "max_tokens_per_row", "max_chunk_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be ≥ 1 or left out, got {value}")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must stay off: the collator needs whole records")
        if self.include_num_input_tokens_seen != "no":
            raise ValueError("include_num_input_tokens_seen is not supported; tokens_per_second is logged always")
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor is not part of this loss; leave it 0")

    def _check_ref_models(self) -> None:
        for name in ("ref_model_name_or_path", "ref_model_weights"):
            if getattr(self, name) is not None and self.reference != "model":
                raise ValueError(
                    f"{name} is given, but reference={self.reference!r} does not use it; set reference='model'"
                )
        if isinstance(self.ref_model_name_or_path, str | os.PathLike):
            self.ref_model_name_or_path = [str(self.ref_model_name_or_path)]
        names, weights = self.ref_model_name_or_path, self.ref_model_weights
        if names is not None and (not names or len(set(names)) < len(names)):
            raise ValueError(
                f"ref_model_name_or_path must name a model, or several that differ; got {names}. How much each "
                "counts is said by ref_model_weights"
            )
        if weights is None:
            return
        if not isinstance(weights, list | tuple) or not all(type(weight) in (int, float) for weight in weights):
            raise TypeError(f"ref_model_weights must be a list of numbers, got {weights!r}")
        if not all(weight >= 0 for weight in weights) or not abs(sum(weights) - 1) <= TOLERANCE:
            raise ValueError(f"ref_model_weights must be numbers ≥ 0 that add up to 1, got {weights}")
        if names is not None and len(weights) != len(names):
            raise ValueError(
                f"ref_model_weights must hold one number for each model of ref_model_name_or_path, {names}; got "
                f"{weights}"
            )

    def _check_objective(self) -> None:
        if self.objective is None:
            self.objective = "perpo"
        loss = self.list_objective
        if self.reference is None:
            ratios = loss.pointwise == "clipped"
            self.reference = "start" if ratios else "precomputed" if loss.reference else "none"
        if self.reference not in REFERENCES:
            raise ValueError(f"reference must be one of {', '.join(REFERENCES)}; got {self.reference!r}")
        if self.reference != "none" and not loss.reference:
            raise ValueError(
                f"reference={self.reference!r}: objective={self.objective!r} is defined without a reference model; "
                "leave reference out, or set reference='none'"
            )
        if self.reference == "none" and loss.pointwise == "clipped":
            raise ValueError(
                f"reference='none': objective={self.objective!r} takes ratios to the policy that sampled; use 'start' "
                "if the model sampled these answers as it is now, 'data' if the records hold their log-probs as "
                "ref_log_probs, or objective='grpo', which takes no ratios"
            )
        if loss.pairs != "given":
            if self.image_corruption is not None:
                raise ValueError(
                    f"image_corruption is given, but objective={self.objective!r} does not use it; set objective='mdpo'"
                )
            return
        self.image_corruption = self.image_corruption or "crop"
        if self.image_corruption not in CORRUPTIONS:
            raise ValueError(f"image_corruption must be one of {', '.join(CORRUPTIONS)}; got {self.image_corruption!r}")
        if self.reference == "data":
            raise ValueError(
                f"reference='data': objective={self.objective!r} also needs the reference log-probs of answers under a "
                "corrupted image, which no record holds; use 'precomputed', 'adapter_off' or 'model'"
            )

    @property
    def list_objective(self) -> Objective:
        """What `objective`, `beta`, `gamma` and `objective_options` say together."""
        assert self.objective is not None
        return named_objective(self.objective, self.beta, self.gamma, self.objective_options)

    def to_dict(self) -> dict[str, Any]:
        """As `TrainingArguments.to_dict`, with an `Objective` as a mapping of its fields, which `objective` accepts."""
        values = super().to_dict()
        if isinstance(self.objective, Objective):
            values["objective"] = dataclasses.asdict(self.objective)
        return values

    @property
    def reference_folder(self) -> str:
        return self.reference_cache_dir or os.path.join(self.output_dir, "reference")
