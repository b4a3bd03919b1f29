"""Which lists of a data set, and which of their candidates, a run trains on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from transformers.utils import logging

from perpo.data.read import read_records
from perpo.data.record import ListRecord
from perpo.encoding.collator import Sample
from perpo.encoding.corruption import with_corrupted_image
from perpo.training.config import PerPOConfig

logger = logging.get_logger(__name__)


def training_lists(name: str, source: Any, args: PerPOConfig) -> list[Sample]:
    """The lists of a run, with what its objective and its reference need and nothing that they do not use.

    Args:
        name: of the argument that `source` is, for errors.
        source: records, or what `perpo.data.read.read_records` reads.

    Raises:
        ValueError: no list is left; a record lacks what the settings need, by name.
    """
    if not (isinstance(source, Sequence) and all(isinstance(record, ListRecord) for record in source)):
        source, report = read_records(source, root=args.image_root)
        logger.info(report.summary())
    lists = [record for record in source if record.k >= args.min_candidates]
    if not lists:
        raise ValueError(f"{name}: no list has min_candidates={args.min_candidates} candidates or more")
    if len(lists) < len(source):
        logger.warning(f"{len(source) - len(lists)} lists with fewer than {args.min_candidates} candidates left out")
    _require(name, lists, "rewards", "; score it first")
    if not any(record.has_preference for record in lists):
        raise ValueError(
            f"{name}: in none of {len(lists)} lists has one response a higher reward than another: there is nothing to "
            "learn; see that the rewards can read the responses"
        )
    if args.reference == "data":
        _require(name, lists, "ref_log_probs", ", which reference='data' takes; use reference='precomputed'")
    if args.list_objective.flips:
        _require(
            name,
            lists,
            "flip_probs",
            f", which objective={args.objective!r} takes: for each response the probability that a preference over it "
            "is wrong; for one probability for all, use objective='cdpo'",
        )
    lists = [_only_what_is_used(record, args) for record in lists]
    if args.max_candidates is not None:
        lists = [thin_out(record, args.max_candidates) for record in lists]
    if args.image_corruption is None:
        return list(lists)
    try:
        return [with_corrupted_image(record, args.image_corruption, args.seed) for record in lists]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _require(name: str, records: Sequence[ListRecord], field: str, advice: str) -> None:
    lacking = next((record for record in records if getattr(record, field) is None), None)
    if lacking is not None:
        raise ValueError(f"{name} record {lacking.id!r} has no {field}{advice}")


def _only_what_is_used(record: ListRecord, args: PerPOConfig) -> ListRecord:
    return dataclasses.replace(
        record,
        ref_log_probs=None if args.reference == "none" else record.ref_log_probs,
        flip_probs=record.flip_probs if args.list_objective.flips else None,
    )


def thin_out(record: ListRecord, max_candidates: int) -> ListRecord:
    """At most `max_candidates` candidates: best and worst by reward, and evenly spaced ranks between them."""
    if record.k <= max_candidates:
        return record
    rewards = record.rewards or (0.0,) * record.k
    ranked = sorted(range(record.k), key=lambda i: -rewards[i])
    step = (record.k - 1) / (max_candidates - 1)
    return record.picked(sorted(ranked[round(j * step)] for j in range(max_candidates)))
