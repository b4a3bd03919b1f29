"""Which lists of a data set, and which of their candidates, a run trains on."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from transformers.utils import logging

from perpo.data.read import read_records, without_pictures
from perpo.data.record import ListRecord
from perpo.data.spool import Spool
from perpo.encoding.collator import Sample
from perpo.encoding.corruption import with_corrupted_image
from perpo.training.config import PerPOConfig

logger = logging.get_logger(__name__)


def training_lists(name: str, source: Any, args: PerPOConfig, sees_images: bool) -> Spool[Sample]:
    """The lists of a run, on disk, with what its objective and its reference need and nothing that they do not use.

    Args:
        name: of the argument that `source` is, for errors.
        source: records, or what `perpo.data.read.read_records` reads.
        sees_images: the model takes images; lists of which none has one are then warned of.

    Raises:
        ValueError: no list is left; a record lacks what the settings need, by name.
    """
    place: str = name
    like_picture: Collection[str] = ()
    if not (isinstance(source, Sequence) and all(isinstance(record, ListRecord) for record in source)):
        source, report = read_records(source, root=args.image_root, check_images=True)
        place, like_picture = report.source, report.like_picture
        logger.info(report.summary())
    if sees_images and (problem := without_pictures(place, source, like_picture)):
        logger.warning(problem)
    needed = {"rewards": "; score it first"}
    if args.reference == "data":
        needed["ref_log_probs"] = ", which reference='data' takes; use reference='precomputed'"
    if args.list_objective.flips:
        needed["flip_probs"] = (
            f", which objective={args.objective!r} takes: for each response the probability that a preference over it "
            "is wrong; for one probability for all, use objective='cdpo'"
        )
    lists: Spool[Sample] = Spool()
    any_preference = False
    for record in source:
        if record.k < args.min_candidates:
            continue
        for field, advice in needed.items():
            if getattr(record, field) is None:
                raise ValueError(f"{name} record {record.id!r} has no {field}{advice}")
        any_preference |= record.has_preference
        lists.append(_sample(name, record, args))
    if not len(lists):
        raise ValueError(f"{name}: no list has min_candidates={args.min_candidates} candidates or more")
    if len(lists) < len(source):
        logger.warning(f"{len(source) - len(lists)} lists with fewer than {args.min_candidates} candidates left out")
    if not any_preference:
        raise ValueError(
            f"{name}: in none of {len(lists)} lists has one response a higher reward than another: there is nothing to "
            "learn; see that the rewards can read the responses"
        )
    return lists


def _sample(name: str, record: ListRecord, args: PerPOConfig) -> Sample:
    record = _only_what_is_used(record, args)
    if args.max_candidates is not None:
        record = thin_out(record, args.max_candidates)
    if args.image_corruption is None:
        return record
    try:
        return with_corrupted_image(record, args.image_corruption, args.seed)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _only_what_is_used(record: ListRecord, args: PerPOConfig) -> ListRecord:
    unused = [] if args.list_objective.flips else ["flip_probs"]
    unused += ["ref_log_probs"] if args.reference == "none" else []
    given = [name for name in unused if getattr(record, name) is not None]
    # For the type checker: fields by name.
    return dataclasses.replace(record, **dict.fromkeys(given)) if given else record  # type: ignore[arg-type]


def thin_out(record: ListRecord, max_candidates: int) -> ListRecord:
    """At most `max_candidates` candidates: best and worst by reward, and evenly spaced ranks between them."""
    if record.k <= max_candidates:
        return record
    rewards = record.rewards or (0.0,) * record.k
    ranked = sorted(range(record.k), key=lambda i: -rewards[i])
    step = (record.k - 1) / (max_candidates - 1)
    return record.picked(sorted(ranked[round(j * step)] for j in range(max_candidates)))
