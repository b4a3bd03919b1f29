"""Whose checkpoints a folder holds, which of them a killed run goes on from, and what to do when one cannot be written.

`identity.json` beside the checkpoints says what their run computes (`perpo.training.run_identity`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from perpo.storage.identity import IDENTITY, difference, known_identity

logger = logging.get_logger(__name__)

_TORCH_WRITES = ("inline_container", "PytorchStreamWriter", "iostream error")  # what torch.save says of a full disk


class StaleCheckpointsError(ValueError):
    """The checkpoints are of another run."""


def last_complete_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest `checkpoint-N` of a run that was written to its end; None if there is none.

    The trainer writes its state after everything else, so a checkpoint whose state can be read is whole.
    """
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if step and _is_json(path / "trainer_state.json"):
            found.append((int(step[1]), path))
    return str(max(found)[1]) if found else None


def check_free(folder: str | os.PathLike[str]) -> None:
    """That no run has left whole checkpoints in a folder: a new one would delete them, or later go on from them.

    Raises:
        ValueError: there are some.
    """
    if last_complete_checkpoint(folder) is not None:
        raise ValueError(
            f"output_dir: {folder} holds checkpoints; go on from them with resume_from_checkpoint=true, name another "
            "folder, or delete it to begin again"
        )


def claim(folder: str | os.PathLike[str], identity: Mapping[str, str], checkpoint: str | None) -> None:
    """Take a folder for the checkpoints of a run.

    Args:
        identity: name -> value of what the run computes.
        checkpoint: what the run goes on from, in this folder or another; None: it begins.

    Raises:
        ValueError: it begins where there are whole checkpoints.
        StaleCheckpointsError: these or the given one are of another run; the message says in what it differs.
    """
    folder = Path(folder).absolute()
    if checkpoint is None:
        check_free(folder)
    taken = last_complete_checkpoint(folder) is not None
    places = {folder} if taken else set()
    if checkpoint is not None:
        places.add(Path(checkpoint).absolute().parent)
    for place in sorted(places):
        if not known_identity(place):
            logger.warning(f"{place} does not say what run its checkpoints are of; taken to be of this one")
        elif different := difference(place, identity):
            raise StaleCheckpointsError(
                f"resume_from_checkpoint: {place} holds checkpoints of another run; different: {different}. Go on with "
                "the same settings and lists, or name another output_dir and leave resume_from_checkpoint out"
            )
    folder.mkdir(parents=True, exist_ok=True)
    if not taken:
        (folder / IDENTITY).unlink(missing_ok=True)
    difference(folder, identity)


@contextlib.contextmanager
def names_of_model(model: nn.Module) -> Iterator[None]:
    """A block that saves a checkpoint of a whole model: under the names that its parameters have.

    `save_pretrained` writes the names that the family had in older versions of transformers, which `from_pretrained`
    maps and `Trainer` does not: it would go on with the weights that the run began with.
    """
    if not isinstance(model, PreTrainedModel):
        yield
        return
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del model.save_pretrained


def check_loaded(model: nn.Module, missing: Collection[str]) -> None:
    """That a checkpoint held all weights of a model.

    Raises:
        ValueError: some are missing, by name.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    lacking = [name for name in missing if name not in tied]
    if lacking:
        raise ValueError(
            f"resume_from_checkpoint: the checkpoint lacks {len(lacking)} weights of {type(model).__name__} "
            f"({', '.join(lacking[:3])}, …): it is of another model"
        )


@contextlib.contextmanager
def clear_disk_errors(folder: str | os.PathLike[str]) -> Iterator[None]:
    """A block that saves into `folder`: what each library says of a disk that is full becomes one OSError.

    Raises:
        OSError: a file could not be written; the message says what a run can go on from.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        torch_writes = isinstance(error, RuntimeError) and any(words in str(error) for words in _TORCH_WRITES)
        saving = isinstance(error, SafetensorError) and "I/O error" in str(error)
        if not (full or torch_writes or saving):
            raise
        last = last_complete_checkpoint(folder)
        rest = (
            f"{last} is whole: set resume_from_checkpoint=true to go on from it" if last else "no checkpoint is whole"
        )
        first_line = str(error).partition("\n")[0]
        raise OSError(
            errno.ENOSPC, f"{folder} could not be written, the disk may be full ({first_line}); free some space. {rest}"
        ) from error


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
