"""Which checkpoint a killed run goes on from, and what to do when one cannot be written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

_TORCH_WRITES = ("inline_container", "PytorchStreamWriter", "iostream error")  # what torch.save says of a full disk


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
