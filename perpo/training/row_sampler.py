"""Which lists share a row: as many as a budget of tokens takes, or so many a row, but never some with an image and some
without.

Rows are filled once, from lists in random order, so that every pass over the data has as many; each pass takes them in
an order of its own. The loss sums over the lists of an optimizer step, so it does not matter which of them share a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.trainer_pt_utils import BatchRebalanceSampler

from perpo.training.lists import Sample, records_of

OPEN = 16  # rows that are being filled at the same time


def fill_rows(
    kinds: Sequence[Any],  # of each list: only lists of one kind share a row
    tokens: Sequence[int],  # of each list
    budget: float,
    most: float,
    seed: int,
) -> list[list[int]]:
    """The lists of each row: at most `most` of them and `budget` tokens. A longer list has a row of its own."""
    done: list[list[int]] = []
    filling: dict[Any, list[list[int]]] = {}
    taken: dict[int, int] = {}  # tokens, by a row's first list
    generator = torch.Generator().manual_seed(seed)
    for i in torch.randperm(len(tokens), generator=generator).tolist():
        rows = filling.setdefault(kinds[i], [])
        row = next((row for row in rows if taken[row[0]] + tokens[i] <= budget and len(row) < most), None)
        if row is None:
            if len(rows) == OPEN:
                fullest = max(rows, key=lambda row: taken[row[0]])
                rows.remove(fullest)
                done.append(fullest)
            row = []
            rows.append(row)
        row.append(i)
        taken[row[0]] = taken.get(row[0], 0) + tokens[i]
    return [*done, *(row for rows in filling.values() for row in rows)]


class RowSampler(BatchRebalanceSampler):
    """One rank's rows, in an order of `set_epoch`'s. `Trainer` takes batches of many sizes from this class alone.

    All ranks take equally many rows, so the last `n_filling` ranks end with one that stood in this pass already.
    """

    def __init__(self, rows: list[list[int]], n_ranks: int, rank: int, seed: int) -> None:
        self.rows, self.n_ranks, self.rank, self.seed, self.epoch = rows, n_ranks, rank, seed, 0
        self.n_filling = -len(rows) % n_ranks

    @property
    def ends_with_filling(self) -> bool:
        return self.rank >= self.n_ranks - self.n_filling

    def __len__(self) -> int:
        return (len(self.rows) + self.n_filling) // self.n_ranks

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.rows), generator=generator).tolist()
        for i in range(self.rank, len(self) * self.n_ranks, self.n_ranks):
            yield list(self.rows[order[i % len(order)]])


def row_sampler(trainer: Any) -> RowSampler | None:
    """Of a `PerPOTrainer`'s training lists; None where the trainer's own sampler does."""
    args, samples = trainer.args, trainer.train_dataset
    kinds = [records_of(sample)[0].image is not None for sample in samples]
    budget = args.max_tokens_per_row
    if budget is None and (args.per_device_train_batch_size == 1 or len(set(kinds)) == 1):
        return None
    if budget is None:
        tokens, most = [0] * len(samples), float(args.per_device_train_batch_size)
    else:
        tokens, most = _count_tokens(trainer, samples), float("inf")
    rows = fill_rows(kinds, tokens, budget or 0, most, args.seed)
    return RowSampler(rows, args.world_size, args.process_index, args.seed)


def _count_tokens(trainer: Any, samples: Sequence[Sample]) -> list[int]:
    """What each list feeds, by encoding it once as in a step; shared out over ranks."""
    args = trainer.args
    rank, n_ranks = args.process_index, args.world_size
    mine: list[Sample] = list(samples[rank::n_ranks])
    loader: DataLoader[Any] = DataLoader(
        mine,  # type: ignore[arg-type]
        batch_size=1,
        collate_fn=trainer.data_collator,
        num_workers=args.dataloader_num_workers,
    )
    batches = tqdm(loader, desc="tokens of each list", unit="list", disable=args.disable_tqdm or rank > 0)
    counts = [(rank + i * n_ranks, batch.n_tokens) for i, batch in enumerate(batches)]
    return [n for _, n in sorted(counts if n_ranks == 1 else gather_object(counts))]
