"""PerPO for vision-language models: sample, score, train, evaluate.

The rooms, from the bottom up; each imports only what stands above it in this list:

    storage      what lies on disk: is it ours, and whole?
    data         list records: the schema, reading, checking, files, images
    rewards      one file a perception task, the ways model families write boxes, scoring
    prefix       attention over a shared prompt
    encoding     prompt and answers -> tokens, batches, packed rows
    model        loading, the language head, what is trained, whether prompts may be shared
    sampling     drawing k answers a question (transformers, vLLM) and scoring them
    training     configuration, reference log-probs, metrics, checkpoints, the trainer, what a step costs
    integrations the loss in other people's trainers
    evaluation   did it work? Metrics, intervals, the report
    cli          one file a command
    demo         the whole of it on a small model, through the commands

The names below are imported when they are first asked for, so that `import perpo` stays light.
"""

import importlib
from typing import Any

_HOME = {
    "ListRecord": "perpo.data.record",
    "read_records": "perpo.data.read",
    "write_records": "perpo.data.record",
    "Encoder": "perpo.encoding.encoder",
    "load_model": "perpo.model.load",
    "load_processor": "perpo.model.load",
    "Sampling": "perpo.sampling.sampler",
    "PerPOConfig": "perpo.training.config",
    "PerPOTrainer": "perpo.training.trainer",
    "language_lora": "perpo.model.trainable",
    "list_loss": "perpo.integrations.list_loss",
    "sequence_log_probs": "perpo.integrations.list_loss",
    "ListDPOConfig": "perpo.integrations.trl_dpo_config",
    "ListDPOTrainer": "perpo.integrations.trl_dpo",
    "ListGRPOConfig": "perpo.integrations.trl_grpo_config",
    "ListGRPOTrainer": "perpo.integrations.trl_grpo",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'perpo' has no attribute {name!r}; it has {', '.join(_HOME)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
