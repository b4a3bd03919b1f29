"""Packed and padded layouts: which tokens belong to which candidate, which candidates to which list.

Packed is the native form. `cu_seqlens` [S + 1] and `cu_lists` [G + 1] are cumulative int32 counts that start at 0:
candidate i owns tokens cu_seqlens[i] .. cu_seqlens[i + 1], list g owns candidates cu_lists[g] .. cu_lists[g + 1].
Padded [G, k] tensors are the same numbers with equally long lists and a mask, so they need no copy to become packed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from perpo_kernels import checks


def cumulative(lengths: Sequence[int] | Tensor, device: torch.device | str | None = None) -> Tensor:
    """Lengths [n] -> cumulative counts int32 [n + 1], starting at 0.

    >>> cumulative([3, 1, 2])
    tensor([0, 3, 4, 6], dtype=torch.int32)
    """
    counts = torch.as_tensor(lengths, dtype=torch.int32, device=device)
    out = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=counts.device)
    torch.cumsum(counts, 0, dtype=torch.int32, out=out[1:])
    return out


class PackedLabels(NamedTuple):
    """The labelled tokens of a padded batch, packed."""

    rows: Tensor  # int64 [T], in the flattened [B · L], of the states that predict them: hidden.flatten(0, 1)[rows]
    labels: Tensor  # int64 [T]
    cu_seqlens: Tensor  # int32 [B + 1], on the CPU


def pack_labels(labels: Tensor, *, ignore_index: int = -100) -> PackedLabels:
    """Labels [B, L] as every trainer has them -> what the loss takes. They are shifted here, once.

    labels[b, t] is the token at position t of row b, or `ignore_index` where no token is trained on; the state at
    position t − 1 predicts it. What stands in the first column is predicted by nothing, and left out, as in
    transformers. A row without a label is a candidate of no tokens: it takes part in no pair.

    Labels on the CPU cost no synchronisation. For labels on a device the host waits once, for the B numbers of
    tokens: without them nobody knows how long the result is.

    Raises:
        ValueError, TypeError: labels that are not int64 [B, L].

    >>> pack_labels(torch.tensor([[-100, -100, 5, 6], [-100, 7, -100, -100]]))
    PackedLabels(rows=tensor([1, 2, 4]), labels=tensor([5, 6, 7]), cu_seqlens=tensor([0, 2, 3], dtype=torch.int32))
    """
    checks.padded_labels(labels)
    n_columns = labels.shape[1]
    predicted = labels[:, 1:] != ignore_index  # [B, L − 1]
    counts = predicted.sum(1).tolist()
    nth = torch.arange(1, sum(counts) + 1, device=labels.device)
    at = torch.searchsorted(predicted.flatten().cumsum(0), nth)  # where the n-th labelled token stands in [B · (L − 1)]
    rows = at + at // max(n_columns - 1, 1)
    return PackedLabels(rows, labels.flatten()[rows + 1], cumulative(counts))


def equal_lists(n_lists: int, k: int, device: torch.device) -> Tensor:
    """`cu_lists` int32 [n_lists + 1] of `n_lists` lists of `k` candidates each."""
    return torch.arange(n_lists + 1, dtype=torch.int32, device=device) * k


def owner(cumulative_counts: Tensor, n: int) -> Tensor:
    """For each of n items the index of the segment that it lies in, int64 [n]; no host synchronisation.

    Items past the last boundary get the last segment: callers give them a zero coefficient.
    """
    items = torch.arange(n, dtype=cumulative_counts.dtype, device=cumulative_counts.device)
    segments = torch.searchsorted(cumulative_counts[1:], items, right=True)
    return segments.clamp_(max=max(cumulative_counts.numel() - 2, 0))


class Segment(NamedTuple):
    """A run of whole lists that is processed together."""

    first_list: int
    last_list: int  # exclusive
    first_token: int
    last_token: int  # exclusive


def list_segments(cu_seqlens: Tensor, cu_lists: Tensor, max_tokens: int) -> list[Segment]:
    """Cut T tokens into runs of whole lists of at most `max_tokens` tokens each (a longer list is a run of its own).

    Both tensors must be on the CPU: reading boundaries from a device would stall it.
    """
    n_lists = cu_lists.numel() - 1
    bounds = cu_seqlens[cu_lists.long()].tolist()  # token boundary of every list
    segments = []
    start = 0
    while start < n_lists:
        end = start + 1
        while end < n_lists and bounds[end + 1] - bounds[start] <= max_tokens:
            end += 1
        segments.append(Segment(start, end, bounds[start], bounds[end]))
        start = end
    return segments
