"""The settings of a training run: `PerPOConfig`, what `transformers.TrainingArguments` has and what PerPO adds."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from transformers import TrainingArguments

REFERENCES = ("precomputed", "adapter_off", "model", "data", "none")


@dataclass
class PerPOConfig(TrainingArguments):
    """Settings of `PerPOTrainer`. Defaults that differ from `TrainingArguments` are those published with PerPO."""

    beta: float = field(
        default=0.1, metadata={"help": "Strength of the pull towards the reference: β in softplus(−β Δs)."}
    )
    gamma: float = field(
        default=0.5,
        metadata={"help": "Exponent of the reward margins in the pair weights; 0 weighs all pairs alike."},
    )
    reference: str = field(
        default="precomputed",
        metadata={
            "help": "Where log-probs under the reference model come from: 'precomputed' (once, by the model as it is "
            "before training, adapters off; kept on disk), 'adapter_off' (the model without its adapters, at every "
            "step), 'model' (a second model, given to the trainer or named by ref_model_name_or_path), 'data' (the "
            "records' ref_log_probs), 'none' (no reference).",
            "choices": list(REFERENCES),
        },
    )
    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The second model of reference='model'."}
    )
    reference_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of precomputed reference log-probs; default: output_dir/reference. Runs with the same "
            "model, processor and max_response_length can share one."
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
    image_root: str | None = field(
        default=None,
        metadata={
            "help": "Folder that image paths of records are under; none may lead out of it. Default: paths as they "
            "are, for records that you trust."
        },
    )
    max_chunk_bytes: int | None = field(
        default=None,
        metadata={
            "help": "Budget for one chunk of logits inside the loss; default: 64 MiB on the CPU, 1 GiB elsewhere."
        },
    )

    # Defaults of TrainingArguments that are set otherwise here
    learning_rate: float = field(default=5e-6, metadata={"help": "Initial learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The schedule of the learning rate."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the lists."})
    per_device_train_batch_size: int = field(
        default=1, metadata={"help": "Lists a device and forward pass; each has k rows."}
    )
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Lists a device and forward pass."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "'true': go on from the last whole checkpoint of output_dir, if any; or a checkpoint's folder."
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
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"beta must be > 0, got {self.beta}")
        if not self.gamma >= 0:
            raise ValueError(f"gamma must be ≥ 0, got {self.gamma}")
        if self.reference not in REFERENCES:
            raise ValueError(f"reference must be one of {', '.join(REFERENCES)}; got {self.reference!r}")
        if self.ref_model_name_or_path is not None and self.reference != "model":
            raise ValueError(
                f"ref_model_name_or_path is given, but reference={self.reference!r} does not use it; set "
                "reference='model'"
            )
        if self.min_candidates < 1:
            raise ValueError(f"min_candidates must be ≥ 1, got {self.min_candidates}")
        if self.max_candidates is not None and self.max_candidates < max(2, self.min_candidates):
            raise ValueError(
                f"max_candidates must be ≥ 2 and ≥ min_candidates={self.min_candidates}, got {self.max_candidates}"
            )
        for name in ("max_prompt_length", "max_response_length", "max_chunk_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be ≥ 1 or left out, got {value}")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must stay off: the collator needs whole records")
        if self.include_num_input_tokens_seen != "no":
            raise ValueError("include_num_input_tokens_seen is not supported; tokens_per_second is logged always")
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor is not part of this loss; leave it 0")

    @property
    def reference_folder(self) -> str:
        return self.reference_cache_dir or os.path.join(self.output_dir, "reference")
