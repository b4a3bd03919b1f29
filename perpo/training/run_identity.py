"""What a training run computes, as far as its settings and data decide it: what a checkpoint of it may go on with.

Left out is what a run may change when it goes on: how many processes share a step's lists, how long it takes, how often
it logs, evaluates and saves, and where model, data and pictures are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from typing import Any

from peft import PeftModel
from torch import nn

from perpo.data.record import ListRecord
from perpo.encoding.collator import Sample, records_of
from perpo.encoding.encoder import Encoder
from perpo.model.language_head import causal_lm
from perpo.training.config import PerPOConfig
from perpo.training.reference_cache import weights_fingerprint

SETTINGS = (
    "reference",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "neftune_noise_alpha",
    "seed",
    "data_seed",
    "max_tokens_per_row",
)
OF_ADAPTERS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias")


def run_identity(
    model: nn.Module,
    args: PerPOConfig,
    encoder: Encoder,
    samples: Iterable[Sample],
    ref_model: nn.Module | None = None,
) -> dict[str, str]:
    """name -> value or hash, see `perpo.storage.identity.difference`. Of the model as it is before training."""
    settings = args.to_dict()
    n_lists = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    trained = [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    adapters = model.peft_config.values() if isinstance(model, PeftModel) else ()
    kinds = [[str(getattr(one, name, None)) for name in OF_ADAPTERS] for one in adapters]
    return {
        "model class": type(causal_lm(model)).__name__,
        "weights": weights_fingerprint(causal_lm(model)),
        "trained weights": _hash([trained, kinds]),
        "reference weights": "none" if ref_model is None else weights_fingerprint(causal_lm(ref_model)),
        **encoder.fingerprint(),
        "lists": _hash([_content(record, args) for sample in samples for record in records_of(sample)]),
        "lists a step": str(n_lists),
        "objective": str(args.list_objective),
        "precision": args.mixed_precision,
        **{name: str(settings[name]) for name in SETTINGS},
    }


def _content(record: ListRecord, args: PerPOConfig) -> list[Any]:
    """All of a record that training takes, but for the pixels, which would all have to be read."""
    unused = {"image", "answer", "task", "columns"} | (set() if args.reference == "data" else {"ref_log_probs"})
    names = [f.name for f in dataclasses.fields(record) if f.name not in unused]
    return [record.image is None, *(getattr(record, name) for name in names)]


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, default=str, sort_keys=True).encode()).hexdigest()[:16]
