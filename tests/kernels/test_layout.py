"""Packed layouts: cumulative counts, owners of items, and runs of whole lists."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perpo_kernels import layout

LENGTHS = st.lists(st.integers(0, 5), min_size=0, max_size=8)


@given(lengths=LENGTHS)
def test_cumulative_counts_start_at_zero_and_end_at_the_sum(device, lengths):
    counts = layout.cumulative(lengths, device=device)
    assert counts.dtype == torch.int32
    assert counts.device == device
    assert counts.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def test_cumulative_takes_a_tensor_where_it_is(device):
    lengths = torch.tensor([2, 0, 3], device=device)
    counts = layout.cumulative(lengths)
    assert counts.device == device
    assert counts.tolist() == [0, 2, 2, 5]


def test_equal_lists(device):
    assert layout.equal_lists(3, 4, device).tolist() == [0, 4, 8, 12]
    assert layout.equal_lists(0, 4, device).tolist() == [0]
    assert layout.equal_lists(2, 0, device).tolist() == [0, 0, 0]


@given(lengths=LENGTHS.filter(any))
def test_owner_of_an_item_is_the_segment_it_lies_in(device, lengths):
    expected = [i for i, n in enumerate(lengths) for _ in range(n)]
    owners = layout.owner(layout.cumulative(lengths, device=device), sum(lengths))
    assert owners.tolist() == expected


def test_items_past_the_last_boundary_belong_to_the_last_segment(device):
    assert layout.owner(layout.cumulative([2, 1], device=device), 5).tolist() == [0, 0, 1, 1, 1]


@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 6)),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
    ignored=st.sampled_from([-100, 3]),
)
def test_packed_labels_are_those_of_a_loop_over_rows(device, shape, share, seed, ignored):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, shape, generator=draw)
    labels.masked_fill_(torch.rand(shape, generator=draw) >= share, ignored)
    rows, packed, counts = [], [], []
    for b, row in enumerate(labels.tolist()):
        at = [t for t in range(1, shape[1]) if row[t] != ignored]
        rows += [b * shape[1] + t - 1 for t in at]
        packed += [row[t] for t in at]
        counts.append(len(at))
    ours = layout.pack_labels(labels.to(device), ignore_index=ignored)
    assert ours.rows.device == ours.labels.device == device
    assert ours.rows.tolist() == rows
    assert ours.labels.tolist() == packed
    assert ours.cu_seqlens.equal(layout.cumulative(counts, device="cpu"))


@pytest.mark.parametrize("wrong", ["dtype", "flat", "columns", "list"])
def test_labels_that_are_no_padded_batch_are_refused(wrong):
    labels = {
        "dtype": torch.zeros(2, 3),
        "flat": torch.zeros(3, dtype=torch.int64),
        "columns": torch.zeros(2, 0, dtype=torch.int64),
        "list": [[1, 2]],
    }[wrong]
    with pytest.raises((ValueError, TypeError), match=r"labels must be"):
        layout.pack_labels(labels)


@given(
    lists=st.lists(st.lists(st.integers(0, 6), min_size=0, max_size=4), min_size=1, max_size=6),
    budget=st.integers(1, 20),
)
def test_runs_of_whole_lists_cover_everything_once_within_the_budget(lists, budget):
    cu_seqlens = layout.cumulative([n for lengths in lists for n in lengths])
    cu_lists = layout.cumulative([len(lengths) for lengths in lists])
    sizes = [sum(lengths) for lengths in lists]
    segments = layout.list_segments(cu_seqlens, cu_lists, budget)
    assert segments[0].first_list == 0
    assert segments[-1].last_list == len(lists)
    for before, after in pairwise(segments):
        assert (before.last_list, before.last_token) == (after.first_list, after.first_token)
        # greedy: the next list would not have fitted
        assert before.last_token - before.first_token + sizes[after.first_list] > budget
    for s in segments:
        assert s.last_token - s.first_token == sum(sizes[s.first_list : s.last_list])
        assert s.last_token - s.first_token <= budget or s.last_list - s.first_list == 1
