"""An adapter merged into its base model and saved as a model like any other: summed in fp32, rounded once."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors import SafetensorError

from perpo.model.adapters import adapted_layers, base_of, merge_adapters
from perpo.model.load import load_processor, load_whole
from perpo.storage.atomic import atomic_folder
from perpo.storage.checksums import check_weights, weights_of, write_checksums


class Merged(NamedTuple):
    """What `save_merged` did."""

    base: str
    layers: int  # with an adapter
    whole: list[str]  # modules that the adapter's folder holds as a whole (a trained projector)
    dtype: str  # of the saved weights
    processor: str  # whose processor was copied


def save_merged(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    dtype: torch.dtype | str = "auto",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Merged:
    """Merge the adapters in `source` into their base model and write it, with its processor, to `folder`: W + BA·α/r,
    summed in fp32. The folder appears whole or not at all.

    Args:
        dtype: of the saved weights; "auto": that of the base model. Rounding to it comes with a warning of how much of
            the adapters' effect it costs.
        revision: of `source`, on the hub.

    Raises:
        ValueError: `source` holds no adapters, or some that cannot be added to weights; a quantized base model.
        FileExistsError: there is something in `folder`.
        DamagedError: a file of the weights is not what was saved.
        OSError: the folder could not be written.
    """
    source = os.fspath(source)
    found = base_of(source, revision)
    if found is None:
        raise ValueError(f"{source!r} holds no adapters: there is nothing to merge")
    base, base_revision = found
    for one in (source, base):
        check_weights(one)
    with atomic_folder(folder, "output") as draft:
        model = load_whole(base, base_revision, {"dtype": "auto", "trust_remote_code": trust_remote_code})
        if getattr(model, "hf_quantizer", None) is not None:
            raise ValueError(
                f"{base} is quantized, and an adapter cannot be added to rounded integers: write the name of the same "
                f"model without quantization into {source}/adapter_config.json, as base_model_name_or_path"
            )
        wanted = model.dtype if dtype == "auto" else dtype
        options = {} if revision is None else {"revision": revision}
        adapted = PeftModel.from_pretrained(model.float(), source, **options)
        config, layers = adapted.active_peft_config, len(adapted_layers(adapted))
        merged: Any = merge_adapters(adapted, wanted)
        try:
            merged.save_pretrained(draft)
        except SafetensorError as error:
            raise OSError(errno.EIO, f"{folder} could not be written, the disk may be full ({error})") from error
        _copy_card(Path(source), draft)
        owner = _save_processor((source, revision), (base, base_revision), draft, trust_remote_code)
        write_checksums(draft, weights_of(draft))
    whole = list(getattr(config, "modules_to_save", None) or ())
    return Merged(base, layers, whole, str(merged.dtype).removeprefix("torch."), owner)


def _copy_card(source: Path, folder: Path) -> None:
    """The card of the adapter's run, of a model now."""
    file = source / "README.md"
    if not file.is_file():
        return
    card = ModelCard.load(file)
    card.data.library_name = "transformers"
    card.data.tags = [tag for tag in card.data.tags or [] if tag not in ("lora", "peft")] or None
    card.save(folder / "README.md")


def _save_processor(own: Any, of_base: Any, folder: Any, trust_remote_code: bool) -> str:
    """That of the adapter's folder, or else the base model's; returns whose it was."""
    for name, revision in (own, of_base):
        options = {} if revision is None else {"revision": revision}
        try:
            load_processor(name, trust_remote_code=trust_remote_code, **options).save_pretrained(folder)
        except (OSError, ValueError):
            if (name, revision) == of_base:
                raise
        else:
            return name
    raise AssertionError("the loop returns or raises")
