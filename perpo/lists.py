"""Records as a training set: choosing candidates, and encoding a few lists into a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from perpo.collate import ListBatch, collate_lists
from perpo.data import ListRecord
from perpo.images import open_image
from perpo.vlm import Encoder


def thin_out(record: ListRecord, max_candidates: int) -> ListRecord:
    """At most `max_candidates` candidates: best and worst by reward, and evenly spaced ranks between them."""
    if record.k <= max_candidates:
        return record
    rewards = record.rewards or (0.0,) * record.k
    ranked = sorted(range(record.k), key=lambda i: -rewards[i])
    step = (record.k - 1) / (max_candidates - 1)
    kept = sorted(ranked[round(j * step)] for j in range(max_candidates))

    def pick(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
        return None if values is None else tuple(values[i] for i in kept)

    return dataclasses.replace(
        record,
        responses=tuple(record.responses[i] for i in kept),
        rewards=pick(record.rewards),
        ref_log_probs=pick(record.ref_log_probs),
    )


class ListCollator:
    """Records -> one `ListBatch`. Opens and encodes images, so it belongs into the workers of a data loader."""

    def __init__(self, encoder: Encoder, image_root: str | None = None) -> None:
        self.encoder = encoder
        self.image_root = image_root

    def __call__(self, records: Sequence[ListRecord]) -> ListBatch:
        prompts, responses = [], []
        for record in records:
            try:
                image = None if record.image is None else open_image(record.image, self.image_root)
                prompts.append(self.encoder.prompt(_messages(record), image))
            except ValueError as error:
                raise ValueError(f"record {record.id!r}: {error}") from error
            responses.append([self.encoder.response(text) for text in record.responses])
        known = all(record.ref_log_probs is not None for record in records)
        return collate_lists(
            prompts,
            responses,
            self.encoder.pad_id,
            [record.rewards or (0.0,) * record.k for record in records],
            [record.ref_log_probs or () for record in records] if known else None,
        )


def _messages(record: ListRecord) -> str | list[dict]:
    return record.prompt if isinstance(record.prompt, str) else [dict(message) for message in record.prompt]
