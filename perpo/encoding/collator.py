"""Lists of records as batches: images opened, prompts and responses encoded.

A sample is a record, or for mDPO two: the list, and its best answer under the corrupted image.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import islice

from torch import Tensor

from perpo.data.images import open_image
from perpo.data.read import reason_of
from perpo.data.record import ListRecord
from perpo.encoding.batch import ListBatch, candidate_tensors, separate_rows
from perpo.encoding.corruption import CorruptedRecord, image_pairs
from perpo.encoding.encoder import Encoder
from perpo.encoding.packed import packed_row
from perpo.encoding.positions import PromptPositions

Sample = ListRecord | tuple[ListRecord, ...]


class SampleError(ValueError):
    """A record that cannot be encoded: which one, and why.

    A worker of a data loader sends an error as its traceback, of which only the message is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition("SampleError: ")[2].rstrip())


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
        whole = [self._responses(record) for record in records]
        limits = [self._limit(*pair) for pair in zip(records, prompts, strict=True)]
        responses = [[ids[:limit] for ids in of_record] for of_record, limit in zip(whole, limits, strict=True)]
        records = [_level_cut(*one) for one in zip(records, whole, limits, strict=True)]
        each = iter(records)
        lists = [tuple(islice(each, len(one_list))) for one_list in lists]
        known = candidate_tensors(
            responses,
            [record.rewards or (0.0,) * record.k for record in records],
            _of_all(records, "ref_log_probs"),
            prompts_per_list=[len(one_list) for one_list in lists],
            flip_probs=_of_all(records, "flip_probs"),
            pair_weights=[image_pairs(one_list[0].rewards or ()) for one_list in lists]
            if all(len(one_list) == 2 for one_list in lists)
            else None,
            list_weights=_weights([one_list[0] for one_list in lists]),
        )
        known["n_cut"] = sum(
            _is_cut(ids, limit) for of_record, limit in zip(whole, limits, strict=True) for ids in of_record
        )
        if self.positions is None:
            inputs, rows, n_tokens = separate_rows(prompts, responses, self.encoder.pad_id, self.encoder.answer_values)
            return ListBatch(inputs, rows, **known, n_tokens=n_tokens)
        inputs, rows, layout = packed_row(prompts, responses, self.positions, self.encoder.answer_values)
        inputs, host = self.positions.without_waits(inputs)
        return ListBatch(inputs, rows, **known, layout=layout, n_tokens=layout.n_tokens, host=host)

    def _responses(self, record: ListRecord) -> list[list[int]]:
        """Not cut yet."""
        ended = record.complete or (True,) * record.k
        return [self.encoder.whole_response(text, end) for text, end in zip(record.responses, ended, strict=True)]

    def _limit(self, record: ListRecord, prompt: dict[str, Tensor]) -> int | None:
        try:
            return self.encoder.response_limit(prompt["input_ids"].shape[1])
        except ValueError as error:
            raise SampleError(f"record {record.id!r}: {error}") from error

    def _prompt(self, record: ListRecord) -> dict[str, Tensor]:
        try:
            image = None if record.image is None else open_image(record.image, self.image_root)
            if image is not None and isinstance(record, CorruptedRecord):
                image = record.corrupt(image)
            return self.encoder.prompt(_messages(record), image)
        except Exception as error:  # processors and decoders raise errors of any type
            raise SampleError(f"record {record.id!r}: {reason_of(error)}") from error


def _is_cut(ids: Sequence[int], limit: int | None) -> bool:
    return limit is not None and len(ids) > limit


def _level_cut(record: ListRecord, responses: Sequence[Sequence[int]], limit: int | None) -> ListRecord:
    """The record with one reward, their mean, for cut responses of which the same is left.

    They have the same log-probs, so no preference between them can be learnt: they must be no pair.
    """
    rewards = list(record.rewards or ())
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, ids in enumerate(responses):
        if rewards and _is_cut(ids, limit):
            groups.setdefault(tuple(ids[:limit]), []).append(i)
    for group in groups.values():
        mean = math.fsum(rewards[i] for i in group) / len(group)
        for i in group if len(group) > 1 else ():
            rewards[i] = mean
    return record if tuple(rewards) == (record.rewards or ()) else dataclasses.replace(record, rewards=tuple(rewards))


def records_of(sample: Sample) -> tuple[ListRecord, ...]:
    return (sample,) if isinstance(sample, ListRecord) else sample


def has_image(sample: Sample) -> bool:
    return records_of(sample)[0].image is not None


def _of_all(records: Sequence[ListRecord], name: str) -> list[tuple[float, ...]] | None:
    """A field of each record, if all have it."""
    values = [getattr(record, name) for record in records]
    return None if any(value is None for value in values) else values


def _weights(records: Sequence[ListRecord]) -> list[float] | None:
    """What each list counts, 1 where its record says nothing; None where none of them does."""
    if all(record.weight is None for record in records):
        return None
    return [1.0 if record.weight is None else record.weight for record in records]


def _messages(record: ListRecord) -> str | list[dict]:
    return record.prompt if isinstance(record.prompt, str) else [dict(message) for message in record.prompt]
