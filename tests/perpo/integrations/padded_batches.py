"""Padded batches as a trainer has them, and the loss of them through all logits, written out in float64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

CU_LISTS = [0, 3, 5]


def batch(seed: int = 0, n_vocab: int = 64, cu_lists: Sequence[int] = CU_LISTS) -> dict[str, Any]:
    """`inputs`, `labels` and `rewards` of ragged answers, padded on the right; the answers of a list share a prompt."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, n_vocab, (cu_lists[-1], 9), generator=draw)
    labels, mask = ids.clone(), torch.ones_like(ids)
    for n_list, (start, end) in enumerate(pairwise(cu_lists)):
        n_prompt = 3 + n_list
        ids[start:end, :n_prompt] = ids[start, :n_prompt]
        labels[start:end, :n_prompt] = -100
    for row in range(0, cu_lists[-1], 2):
        mask[row, 7 - row // 2 :] = 0
    labels.masked_fill_(mask == 0, -100)
    ids.masked_fill_(mask == 0, 0)
    rewards = torch.rand(cu_lists[-1], generator=draw)
    return {"inputs": {"input_ids": ids, "attention_mask": mask}, "labels": labels, "rewards": rewards}


def plain_log_probs(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:  # [B]
    logits = model(**inputs, use_cache=False).logits.double()
    chosen = logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:, None].clamp(min=0)).squeeze(2)
    return (chosen * (labels[:, 1:] != -100)).sum(1)


def plain_loss(
    log_probs: Tensor, rewards: Tensor, ref_log_probs: Tensor | None = None, cu_lists: Sequence[int] = CU_LISTS
) -> Tensor:
    """PerPO by its formula, pair by pair: β 0.1, γ 0.5, mean over lists."""
    scores = log_probs if ref_log_probs is None else log_probs - ref_log_probs.double()
    rewards = rewards.double()
    losses = []
    for start, end in pairwise(cu_lists):
        pairs = [(i, j) for i in range(start, end) for j in range(start, end) if rewards[i] > rewards[j]]
        weights = torch.stack([(rewards[i] - rewards[j]).sqrt() for i, j in pairs])
        terms = torch.stack([softplus(-0.1 * (scores[i] - scores[j])) for i, j in pairs])
        losses.append((weights * terms).sum() / weights.sum())
    return torch.stack(losses).mean()


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found
