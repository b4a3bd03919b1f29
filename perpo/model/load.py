"""Models and processors by name: a folder, or a name on the hub."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from perpo.storage.checksums import check_weights


def load_processor(name_or_path: str, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """`AutoProcessor` (a tokenizer for text models). Options such as max_pixels go to the image processor."""
    return AutoProcessor.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **options)


def load_model(
    name_or_path: str,
    *,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> nn.Module:
    """A vision-language model with its language head, or a causal language model if it is not one.

    Raises:
        DamagedError: a file of its weights is cut off, or not what was saved; the message names it.
    """
    check_weights(name_or_path)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if revision is not None:
        options["revision"] = revision
    try:
        return AutoModelForImageTextToText.from_pretrained(name_or_path, **options)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        return AutoModelForCausalLM.from_pretrained(name_or_path, **options)
