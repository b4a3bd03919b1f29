"""Which models are compared: how they are named, told apart and loaded.

    base=Qwen/Qwen2.5-VL-3B-Instruct    aligned=runs/merged    "adapted=models/base + runs/lora"    runs/lora

A folder with an adapter alone names its base model itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig

from perpo.encoding.encoder import Encoder
from perpo.model.adapters import base_of
from perpo.model.settings import LoadSettings, check_place
from perpo.storage.checksums import check_weights
from perpo.storage.fingerprints import fingerprint, model_fingerprints

_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ModelSource:
    """A model to compare: `base`, with the adapter in `adapter` on it if there is one."""

    name: str
    base: str
    adapter: str | None = None

    @property
    def shown(self) -> str:
        return self.base if self.adapter is None else f"{self.base} + {self.adapter}"

    def identity(self, options: Mapping[str, Any]) -> str:
        """Hash of all files of the model and of `options`. A name on the hub stands for the commit it means today."""
        self.check()
        trust = bool(options.get("trust_remote_code"))
        contents = [place and _content(place, trust) for place in (self.base, self.adapter)]
        return fingerprint([dict(options), contents])

    def check(self) -> None:
        """Raises as `check_place`."""
        for place in (self.base, self.adapter):
            if place is not None:
                check_place(place)

    def load(self, settings: LoadSettings, device: str | None = None) -> tuple[nn.Module, Encoder]:
        """The model on its device, in evaluation mode, and its encoder. The adapter's own processor goes first."""
        model: nn.Module = settings.load_model(self.base)
        if self.adapter is not None:
            check_weights(self.adapter)
            model = PeftModel.from_pretrained(model, self.adapter)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if place.type == "cuda" and place.index is not None:
            torch.cuda.set_device(place)  # or what makes tensors on "cuda" takes memory on the first GPU too
        return model.to(place).eval(), Encoder.for_model(self.load_processor(settings), model)

    def load_processor(self, settings: LoadSettings) -> Any:
        """The adapter's own, if it has one, otherwise the base model's."""
        of_adapter = self.adapter is not None and any((Path(self.adapter) / name).is_file() for name in _PROCESSORS)
        return settings.load_processor(self.adapter if of_adapter and self.adapter else self.base)


def parse_models(given: Sequence[str] | Mapping[str, str]) -> list[ModelSource]:
    """`name=path`, `name=base + adapter` or a path alone, the first being what the others are compared with.

    Raises:
        ValueError: nothing given, an empty name or path, a name given twice.
    """
    texts = [f"{name}={path}" for name, path in given.items()] if isinstance(given, Mapping) else list(given)
    sources = [_parse(text) for text in texts]
    if not sources:
        raise ValueError("models: name at least one, as name=path")
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"models: {twice[0]!r} is the name of two models; give them names of their own: name=path")
    return sources


def _parse(text: str) -> ModelSource:
    name, equals, path = text.partition("=")
    if not equals or "/" in name:  # a path that holds "="
        name, path = "", text
    base, plus, adapter = (part.strip() for part in path.partition(" + "))
    if not base or (plus and not adapter) or (equals and not name and path != text):
        raise ValueError(f"models: expected name=path or 'name=base + adapter', got {text!r}")
    if not plus and Path(base).is_dir() and (found := base_of(base)) is not None:
        base, adapter = found[0], base
    return ModelSource(name.strip() or Path(adapter or base).name, base, adapter or None)


def _content(place: str, trust_remote_code: bool) -> str | dict[str, str]:
    folder = Path(place)
    if not folder.is_dir():
        commit = getattr(AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code), "_commit_hash", None)
        return f"{place}@{commit}"
    return model_fingerprints(folder)
