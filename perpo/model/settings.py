"""How models and their processors are loaded: the settings that every command which loads one shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from perpo.data.documents import mapping
from perpo.model.load import load_model, load_processor


@dataclass(kw_only=True)
class LoadSettings:
    """How a model and its processor are loaded."""

    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the weights: 'auto' (as they were saved), 'float32', 'bfloat16' or 'float16'.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention: 'sdpa', 'eager', 'flash_attention_2', …; default: the model's."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that comes with the model. Only for sources that you trust."}
    )
    processor_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Passed to the processor, as JSON or YAML mapping: {"max_pixels": 401408}.'}
    )

    def __post_init__(self) -> None:
        self.processor_options = mapping("processor_options", self.processor_options)

    def load_model(self, name_or_path: str, revision: str | None = None) -> nn.Module:
        return load_model(
            name_or_path,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
            revision=revision,
        )

    def load_processor(self, name_or_path: str, revision: str | None = None) -> Any:
        options = mapping("processor_options", self.processor_options)
        if revision is not None:
            options["revision"] = revision
        return load_processor(name_or_path, trust_remote_code=self.trust_remote_code, **options)
