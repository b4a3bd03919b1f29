"""Records as a training set: which lists and candidates a run takes, and encoding a few lists into a batch.

A sample is a record, or for mDPO two: the list, and its best answer under the corrupted image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from perpo.data.images import open_image
from perpo.data.record import ListRecord, read_records
from perpo.encoding.batch import ListBatch, candidate_rows, candidate_tensors
from perpo.encoding.corruption import CorruptedRecord, image_pairs, with_corrupted_image
from perpo.encoding.encoder import Encoder
from perpo.encoding.packed import PromptPositions, packed_row
from perpo.training.config import PerPOConfig

logger = logging.get_logger(__name__)

Sample = ListRecord | tuple[ListRecord, ...]


class SampleError(ValueError):
    """A record that cannot be encoded: which one, and why.

    A worker of a data loader sends an error as its traceback, of which only the message is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition("SampleError: ")[2].rstrip())


def training_lists(name: str, source: Any, args: PerPOConfig) -> list[Sample]:
    """The lists of a run, with what its objective and its reference need and nothing that they do not use.

    Args:
        name: of the argument that `source` is, for errors.
        source: records, or what `perpo.data.record.read_records` reads.

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


class ListCollator:
    """Samples -> one `ListBatch`. Opens and encodes images, so it belongs into the workers of a data loader.

    Args:
        positions: of a model that shares prompts (`perpo.model.sharing.prepare`): one packed row. None: a row for
            every candidate.
    """

    def __init__(
        self, encoder: Encoder, image_root: str | None = None, positions: PromptPositions | None = None
    ) -> None:
        self.encoder = encoder
        self.image_root = image_root
        self.positions = positions

    def __call__(self, samples: Sequence[Sample]) -> ListBatch:
        lists = [records_of(sample) for sample in samples]
        records = [record for one_list in lists for record in one_list]
        prompts = [self._prompt(record) for record in records]
        responses = [self._responses(record) for record in records]
        known = candidate_tensors(
            responses,
            [record.rewards or (0.0,) * record.k for record in records],
            _of_all(records, "ref_log_probs"),
            prompts_per_list=[len(one_list) for one_list in lists],
            flip_probs=_of_all(records, "flip_probs"),
            pair_weights=[image_pairs(one_list[0].rewards or ()) for one_list in lists]
            if all(len(one_list) == 2 for one_list in lists)
            else None,
        )
        if self.positions is None:
            inputs, rows, n_tokens = candidate_rows(prompts, responses, self.encoder.pad_id, self.encoder.answer_values)
            return ListBatch(inputs, rows, **known, n_tokens=n_tokens)
        inputs, rows, layout = packed_row(prompts, responses, self.positions, self.encoder.answer_values)
        return ListBatch(inputs, rows, **known, layout=layout, n_tokens=layout.n_tokens)

    def _responses(self, record: ListRecord) -> list[list[int]]:
        ended = record.complete or (True,) * record.k
        return [self.encoder.response(text, whole) for text, whole in zip(record.responses, ended, strict=True)]

    def _prompt(self, record: ListRecord) -> dict[str, Tensor]:
        try:
            image = None if record.image is None else open_image(record.image, self.image_root)
            if image is not None and isinstance(record, CorruptedRecord):
                image = record.corrupt(image)
            return self.encoder.prompt(_messages(record), image)
        except ValueError as error:
            raise SampleError(f"record {record.id!r}: {error}") from error


def leave_out(batch: ListBatch, n_kept: int) -> ListBatch:
    """The batch with only its first lists in loss and metrics: candidates without a reward take part in nothing.

    The ranks must take equally many steps, so data loaders fill up the last one with lists that were there already.
    """
    rewards = batch.rewards.clone()
    rewards[int(batch.cu_lists[n_kept]) :] = torch.nan
    return dataclasses.replace(batch, rewards=rewards)


def records_of(sample: Sample) -> tuple[ListRecord, ...]:
    return (sample,) if isinstance(sample, ListRecord) else sample


def _of_all(records: Sequence[ListRecord], name: str) -> list[tuple[float, ...]] | None:
    """A field of each record, if all have it."""
    values = [getattr(record, name) for record in records]
    return None if any(value is None for value in values) else values


def _messages(record: ListRecord) -> str | list[dict]:
    return record.prompt if isinstance(record.prompt, str) else [dict(message) for message in record.prompt]
