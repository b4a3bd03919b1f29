"""The lists on which a trainer compares packed rows with separate ones before it trusts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from perpo.data.record import ListRecord
from perpo.encoding.batch import ListBatch
from perpo.encoding.collator import ListCollator, Sample, has_image, records_of
from perpo.model import sharing

AMONG = 64  # first samples of the data


def check_sharing(
    models: Sequence[nn.Module],
    samples: Sequence[Sample],
    collate: ListCollator,
    prepare: Callable[[ListBatch], ListBatch],
) -> None:
    """Compare packed with separate rows on every model.

    Args:
        samples: the data; two of them are encoded.
        collate: of packed rows.
        prepare: what moves a batch to the models' device.

    Raises:
        SharingNotExact: they differ by more than rounding.
    """
    few = lists_to_compare(samples)
    packed = prepare(collate(few))
    separate = prepare(ListCollator(collate.encoder, collate.image_root)(few))
    for model in models:
        sharing.check_exact(model, packed, separate)


def lists_to_compare(samples: Sequence[Sample]) -> list[Sample]:
    """The two lists whose second longest response is longest, each with its two longest responses.

    Answers of one token would show nothing: the prompt predicts that token, and packing does not change the
    prompt. Both have an image, or none has: a row holds lists of one kind.
    """
    first = list(samples[:AMONG])
    kind = any(has_image(sample) for sample in first)
    candidates = [sample for sample in first if has_image(sample) == kind]
    chosen = sorted(candidates, key=_second_longest, reverse=True)[:2]
    return [tuple(_longest(record) for record in records_of(sample)) for sample in chosen]


def _second_longest(sample: Sample) -> int:
    lengths = sorted(map(len, records_of(sample)[0].responses))
    return lengths[-2] if len(lengths) > 1 else 0


def _longest(record: ListRecord) -> ListRecord:
    return record.picked(sorted(range(record.k), key=lambda i: -len(record.responses[i]))[:2])
