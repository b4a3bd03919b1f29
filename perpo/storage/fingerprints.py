"""Short hashes that tell one value, file or model from another."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

DIGITS = 16  # hexadecimal: 64 bits
# What lies beside a model without changing its answers.
_NO_PART = re.compile(
    r".*\.(md|png|jpg)|\..*|(checksums|optimizer|scheduler|scaler|rng_state|training_args|trainer_state).*"
)
SAMPLES = 256  # elements of each parameter that enter `weights_fingerprint`


def fingerprint(value: Any) -> str:
    """Of a text; of anything else as JSON, whatever the order of its keys (what JSON cannot hold, as `str`)."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, sort_keys=True)
    return bytes_fingerprint(text.encode("utf-8", "surrogatepass"))


def bytes_fingerprint(*parts: bytes) -> str:
    """Of bytes, however they are divided."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:DIGITS]


def file_fingerprint(path: Path) -> str:
    """Of all bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGITS]


def model_fingerprints(folder: Path) -> dict[str, str]:
    """Name -> fingerprint of each file in a folder that a model's answers may depend on."""
    files = [file for file in folder.iterdir() if file.is_file() and not _NO_PART.fullmatch(file.name)]
    return {file.name: file_fingerprint(file) for file in files}


def seed_from(text: str, bits: int = 64) -> int:
    """A number below 2 ** bits that depends on the text alone, as a seed."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), "big") >> (256 - bits)


def is_partitioned(tensor: Tensor) -> bool:
    """Whether it is a parameter that DeepSpeed ZeRO-3 has spread over processes: it looks empty, on all of them."""
    return hasattr(tensor, "ds_id")


def gathered(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A block in which a parameter under ZeRO-3 is whole. All processes have to enter it."""
    if not is_partitioned(tensor):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor])


def tensors_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Of names, shapes, types and all elements."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        with gathered(tensor):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().double().cpu().numpy().tobytes())
    return digest.hexdigest()[:DIGITS]


def weights_fingerprint(model: nn.Module) -> str:
    """Of the names, shapes, types and evenly spaced elements of all parameters that belong to no adapter.

    Reads a few hundred numbers of each parameter, so it takes no time; training changes far too many elements to hide.
    Under ZeRO-3 all processes have to call it.
    """
    import torch  # records are read without it

    digest = hashlib.sha256(type(model).__name__.encode())
    sampled: dict[torch.dtype, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        if "lora_" in name or "modules_to_save." in name:
            continue
        with gathered(parameter):
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            flat = parameter.detach().reshape(-1)
            few = flat[:: max(1, flat.numel() // SAMPLES)]
            sampled.setdefault(parameter.dtype, []).append(few.clone() if is_partitioned(parameter) else few)
    for parts in sampled.values():  # one copy from the device for each type
        digest.update(torch.cat(parts).double().cpu().numpy().tobytes())
    return digest.hexdigest()[:DIGITS]
