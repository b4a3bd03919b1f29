"""Packed and padded layouts: which tokens belong to which candidate, which candidates to which list.

Packed is the native form. `cu_seqlens` [S + 1] and `cu_lists` [G + 1] are cumulative int32 counts that start at 0:
candidate i owns tokens cu_seqlens[i] .. cu_seqlens[i + 1], list g owns candidates cu_lists[g] .. cu_lists[g + 1].
Padded [G, k] tensors are the same numbers with equally long lists and a mask, so they need no copy to become packed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def cumulative(lengths: Sequence[int] | Tensor, device: torch.device | str | None = None) -> Tensor:
    """Lengths [n] -> cumulative counts int32 [n + 1], starting at 0.

    >>> cumulative([3, 1, 2])
    tensor([0, 3, 4, 6], dtype=torch.int32)
    """
    counts = torch.as_tensor(lengths, dtype=torch.int32, device=device)
    out = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=counts.device)
    torch.cumsum(counts, 0, dtype=torch.int32, out=out[1:])
    return out


def equal_lists(n_lists: int, k: int, device: torch.device) -> Tensor:
    """`cu_lists` int32 [n_lists + 1] of `n_lists` lists of `k` candidates each."""
    if k == 0:
        return torch.zeros(n_lists + 1, dtype=torch.int32, device=device)
    return torch.arange(0, n_lists * k + 1, k, dtype=torch.int32, device=device)


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
