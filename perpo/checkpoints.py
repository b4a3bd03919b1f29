"""Which checkpoint a killed run goes on from."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path


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


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
