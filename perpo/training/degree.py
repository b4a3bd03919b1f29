"""Awareness of degree: a head that tells from the hidden states of an answer how good it is (SPO, arXiv 2409.17791).

    loss of a list = ω (list loss + λ / k Σ_i −log softmax(W h̄_i + b)[d_i])

with ω the list's own weight, 1 if it has none. h̄_i [H] is the mean of the last hidden states that predict the tokens of
answer i, and d_i the degree of its reward, one of D levels of equal width between the list's worst and best:

    d_i = min(⌊D (r_i − min r) / (max r − min r)⌋, D − 1)

As in the paper, the loss of alignment and the cross-entropy of the degrees are added with a weight. Its degrees are
made without rewards, from answers of which more and more key words were left out; here each answer has a reward, and
levels of its range take their place. Chosen where the paper leaves it open: a linear head on the mean, begun at 0 and
kept in fp32; a list of which all rewards are equal has no degrees, as it has no preferences. The head is for training
alone: it lies beside the adapter, in a file of its own, and nothing else reads it.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perpo.encoding.batch import ListBatch
from perpo.model.language_head import causal_lm
from perpo_kernels.layout import owner

NAME = "degree_head"  # of the module in the model
FILE = f"{NAME}.pt"
IGNORED = -100


class DegreeHead(nn.Linear):
    """W [D, H] and b [D]."""

    def sums(self, hidden: Tensor, batch: ListBatch) -> Tensor:  # hidden [T, H'], H' > H where the head has LoRA
        """[3]: Σ over lists of their mean cross-entropy (with a gradient) and of their share of degrees that are
        right, and how many lists have degrees; each list as often as its weight says."""
        device = hidden.device
        cu_seqlens, cu_lists = (x.to(device, non_blocking=True) for x in (batch.cu_seqlens, batch.cu_lists))
        lengths = cu_seqlens.diff()
        targets = degrees(batch.rewards, cu_lists, self.out_features)
        not_judged = (lengths == 0) if batch.added is None else (lengths == 0) | batch.added
        targets = targets.masked_fill(not_judged, IGNORED)
        with torch.autocast(device.type, enabled=False):
            states = hidden[:, : self.in_features].to(self.weight.dtype)
            sums = states.new_zeros(lengths.numel(), self.in_features)
            sums = sums.index_add(0, owner(cu_seqlens, states.shape[0]), states)
            logits = self(sums / lengths.clamp(min=1)[:, None])  # [S, D]
            losses = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        judged = (targets != IGNORED).to(losses.dtype)
        right = (logits.argmax(1) == targets).to(losses.dtype)
        lists = owner(cu_lists, targets.numel())
        n = losses.new_zeros(batch.n_lists).index_add(0, lists, judged)
        weights = torch.ones_like(n) if batch.list_weights is None else batch.list_weights.to(n.dtype)
        each = (weights / n.clamp(min=1))[lists]
        return torch.stack([(losses * each).sum(), (right * each).sum(), (weights * (n > 0)).sum()])


def degrees(rewards: Tensor, cu_lists: Tensor, levels: int) -> Tensor:
    """The level of each reward within its list, int64 [S]; IGNORED in a list without any preference or reward.

    Args:
        rewards: [S]. cu_lists: [G + 1], on the same device.
    """
    lists = owner(cu_lists, rewards.numel())
    ends = [
        rewards.new_full((cu_lists.numel() - 1,), start).scatter_reduce(0, lists, rewards, how)[lists]
        for start, how in ((math.inf, "amin"), (-math.inf, "amax"))
    ]
    share = (rewards - ends[0]) / (ends[1] - ends[0])  # NaN where all are equal or one is NaN
    level = (share.nan_to_num() * levels).long().clamp(max=levels - 1)
    return level.masked_fill(share.isnan(), IGNORED)


def put_on(model: nn.Module, levels: int, device: torch.device) -> DegreeHead:
    """A head at 0 as a part of the model, so that its gradients are exchanged as the model's are."""
    core: Any = causal_lm(model)
    head = DegreeHead(core.config.get_text_config().hidden_size, levels, device=device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    core.register_module(NAME, head)
    names = {f"{NAME}.{name}" for name, _ in head.named_parameters()}
    core._keys_to_ignore_on_save = names.union(core._keys_to_ignore_on_save or ())
    return head


def take_off(model: nn.Module) -> None:
    """The head that an earlier trainer has put on the model, if any."""
    core = causal_lm(model)
    if hasattr(core, NAME):
        delattr(core, NAME)


def save(head: DegreeHead, folder: str | os.PathLike[str]) -> None:
    torch.save(head.state_dict(), Path(folder) / FILE)


def load(head: DegreeHead, folder: str | os.PathLike[str]) -> None:
    """Raises:
    ValueError: the checkpoint holds none."""
    file = Path(folder) / FILE
    if not file.exists():
        raise ValueError(
            f"resume_from_checkpoint: {file} is missing, which a run with degree_weight > 0 writes; train anew, into "
            "another output_dir"
        )
    head.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
