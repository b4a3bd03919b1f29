"""Every image of a data set decoded once before training, so that a damaged one stops no run half-way.

Training decodes all of them anyway, once a pass; this is one time more, in threads, shared by the processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from perpo.data.images import open_image
from perpo.data.record import ListRecord

THREADS = 4


def unreadable_images(
    records: Sequence[ListRecord], image_root: str | None = None, *, show: bool = True
) -> dict[int, str]:
    """Number of each record whose image cannot be opened -> why. Every process must call it, with the same records."""
    state = PartialState()
    mine = range(state.process_index, len(records), state.num_processes)
    with ThreadPoolExecutor(THREADS) as threads:
        problems: Iterable[str | None] = threads.map(partial(_problem, image_root), (records[i] for i in mine))
        shown = tqdm(problems, desc="images", total=len(mine), disable=not show or not state.is_main_process)
        found = [(i, problem) for i, problem in zip(mine, shown, strict=True) if problem is not None]
    return dict(sorted(gather_object(found) if state.num_processes > 1 else found))


def _problem(image_root: str | None, record: ListRecord) -> str | None:
    if record.image is None:
        return None
    try:
        open_image(record.image, image_root)
    except (ValueError, OSError) as error:
        return str(error)
    return None
