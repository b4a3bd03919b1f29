"""Models and processors by name: a folder, or a name on the hub."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from perpo.model.adapters import base_of
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

    Where only adapters are saved, as by `perpo train`: their base model with them on it, a `PeftModel`. They are
    frozen; `perpo.model.trainable.TrainableConfig.apply` trains them further.

    Raises:
        DamagedError: a file of its weights is cut off, or not what was saved; the message names it.
    """
    check_weights(name_or_path)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    base = base_of(name_or_path, revision)
    if base is not None:
        check_weights(base[0])
        model = load_whole(base[0], base[1], options)
        return PeftModel.from_pretrained(model, name_or_path, **({} if revision is None else {"revision": revision}))
    return load_whole(name_or_path, revision, options)


def load_whole(name_or_path: str, revision: str | None, options: dict[str, Any]) -> Any:
    """A model of which all weights are saved; `options` are those of transformers' `from_pretrained`."""
    if revision is not None:
        options = {**options, "revision": revision}
    try:
        return AutoModelForImageTextToText.from_pretrained(name_or_path, **options)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        return AutoModelForCausalLM.from_pretrained(name_or_path, **options)
