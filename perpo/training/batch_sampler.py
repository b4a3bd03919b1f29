"""Which lists share a forward pass: as many as fit a budget of tokens, or a fixed number, but never some with an image
and some without.

Batches are filled once, from lists in random order, so that every pass over the data has as many; each pass takes them
in an order of its own. The loss sums over the lists of an optimizer step, so it does not matter which of them share a
batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.trainer_pt_utils import BatchRebalanceSampler

from perpo.encoding.collator import Sample, has_image
from perpo.training.failures import of_all

OPEN = 16  # batches that are being filled at the same time


def fill_batches(
    kinds: Sequence[Any],  # of each list: only lists of one kind share a batch
    tokens: Sequence[int],  # of each list
    budget: float,
    most: float,
    seed: int,
) -> list[list[int]]:
    """The lists of each batch: at most `most` of them and `budget` tokens. A longer list has a batch of its own."""
    done: list[list[int]] = []
    filling: dict[Any, list[list[int]]] = {}
    taken: dict[int, int] = {}  # tokens, by a batch's first list
    generator = torch.Generator().manual_seed(seed)
    for i in torch.randperm(len(tokens), generator=generator).tolist():
        batches = filling.setdefault(kinds[i], [])
        batch = next((b for b in batches if taken[b[0]] + tokens[i] <= budget and len(b) < most), None)
        if batch is None:
            if len(batches) == OPEN:
                fullest = max(batches, key=lambda batch: taken[batch[0]])
                batches.remove(fullest)
                done.append(fullest)
            batch = []
            batches.append(batch)
        batch.append(i)
        taken[batch[0]] = taken.get(batch[0], 0) + tokens[i]
    return [*done, *(batch for batches in filling.values() for batch in batches)]


class ListBatchSampler(BatchRebalanceSampler):
    """One rank's batches, in an order of `set_epoch`'s. `Trainer` takes batches of different sizes from this class
    alone.

    All ranks take equally many batches, so the last `n_filling` ranks end with one that this pass has had already.
    """

    def __init__(self, batches: list[list[int]], n_ranks: int, rank: int, seed: int) -> None:
        self.batches, self.n_ranks, self.rank, self.seed, self.epoch = batches, n_ranks, rank, seed, 0
        self.n_filling = -len(batches) % n_ranks

    @property
    def ends_with_filling(self) -> bool:
        return self.rank >= self.n_ranks - self.n_filling

    def __len__(self) -> int:
        return (len(self.batches) + self.n_filling) // self.n_ranks

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.batches), generator=generator).tolist()
        for i in range(self.rank, len(self) * self.n_ranks, self.n_ranks):
            yield list(self.batches[order[i % len(order)]])


def batch_sampler(
    trainer: Any, samples: Sequence[Sample], batch_size: int, budget: int | None = None
) -> ListBatchSampler | None:
    """Of a `PerPOTrainer`'s lists; None where the trainer's own sampler does.

    Args:
        batch_size: lists in a batch, if there is no budget.
        budget: tokens in a batch.
    """
    args = trainer.args
    kinds = [has_image(sample) for sample in samples]
    if budget is None and (batch_size == 1 or len(set(kinds)) == 1):
        return None
    if budget is None:
        tokens, most = [0] * len(samples), float(batch_size)
    else:
        tokens, most = _count_tokens(trainer, samples), float("inf")
    batches = fill_batches(kinds, tokens, budget or 0, most, args.seed)
    return ListBatchSampler(batches, args.world_size, args.process_index, args.seed)


def _count_tokens(trainer: Any, samples: Sequence[Sample]) -> list[int]:
    """What each list feeds, by encoding it once as in a step; shared out over ranks."""
    args = trainer.args
    rank, n_ranks = args.process_index, args.world_size
    loader: DataLoader[Any] = DataLoader(
        samples[rank::n_ranks],  # type: ignore[arg-type]  # a sequence is all that it needs
        batch_size=1,
        collate_fn=trainer.data_collator,
        num_workers=args.dataloader_num_workers,
    )
    batches = tqdm(loader, desc="tokens of each list", unit="list", disable=args.disable_tqdm or rank > 0)
    counts = of_all(n_ranks, lambda: [(rank + i * n_ranks, batch.n_tokens) for i, batch in enumerate(batches)])
    return [n for _, n in sorted(counts)]
