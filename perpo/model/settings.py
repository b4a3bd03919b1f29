"""Settings of loading a model and its processor, shared by all commands."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from perpo.data.documents import mapping
from perpo.model.load import load_model, load_processor

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_place(name_or_path: str) -> None:
    """
    Raises:
        ValueError: there is no such folder, and no model on the hub can have such a name. (Without a
            network, asking the hub takes minutes.)
    """
    path = Path(name_or_path)
    if path.is_dir() or HUB_NAME.fullmatch(name_or_path):
        return
    beside = [one.name for one in path.parent.iterdir() if one.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, 1)
    hint = f"; did you mean {str(path.with_name(near[0]))!r}?" if near else ""
    raise ValueError(f"model: there is no folder {name_or_path!r}{hint} (a model on the hub is named owner/name)")


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
        check_place(name_or_path)
        return load_model(
            name_or_path,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
            revision=revision,
        )

    def load_processor(self, name_or_path: str, revision: str | None = None) -> Any:
        check_place(name_or_path)
        options = mapping("processor_options", self.processor_options)
        if revision is not None:
            options["revision"] = revision
        return load_processor(name_or_path, trust_remote_code=self.trust_remote_code, **options)
