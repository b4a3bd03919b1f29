"""What is logged of a list: the ranking of its candidates by score against that by reward."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

import perpo_kernels as pk
from perpo_kernels import chunks, metrics
from perpo_kernels.metrics import pick, rank

NAN = math.nan
VALUE = st.integers(-3, 3)  # ties are frequent
LISTS = st.lists(st.lists(st.tuples(VALUE, st.one_of(VALUE, st.just(NAN))), max_size=6), max_size=4)


def by_hand(scores, rewards):
    """(best, worst, pairs right, pairs ranked) of one list, as the names say it."""
    inside = [i for i, r in enumerate(rewards) if r == r]
    if not inside:
        return None, None, 0, 0
    best = max(inside, key=lambda i: rewards[i])
    worst = min(inside, key=lambda i: rewards[i])
    pairs = [(i, j) for i in inside for j in inside if rewards[i] > rewards[j]]
    return best, worst, sum(scores[i] > scores[j] for i, j in pairs), len(pairs)


@pytest.mark.parametrize("block", [metrics.PAIRS_AT_ONCE, 1, 7])
@given(lists=LISTS)
def test_ranking_is_what_its_names_say(device, block, lists):
    flat = torch.tensor([c for each in lists for c in each], dtype=torch.float32, device=device).view(-1, 2)
    cu_lists = pk.layout.cumulative([len(each) for each in lists], device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "PAIRS_AT_ONCE", block)
        ranking = rank(flat[:, 0], flat[:, 1], cu_lists)
    for g, candidates in enumerate(lists):
        scores, rewards = zip(*candidates, strict=True) if candidates else ((), ())
        best, worst, right, ranked = by_hand(scores, rewards)
        start = int(cu_lists[g])
        assert ranking.best[g] == (len(flat) if best is None else start + best)
        assert ranking.worst[g] == (len(flat) if worst is None else start + worst)
        assert ranking.ranked[g] == ranked
        assert ranking.pair_accuracy[g] == pytest.approx(right / max(ranked, 1))
        part = [(s, r) for s, r in candidates if r == r]
        tau = kendalltau(*zip(*part, strict=True)).statistic if len(part) > 1 else 0.0
        assert ranking.kendall_tau[g] == pytest.approx(0.0 if tau != tau else float(tau), abs=1e-6)


def test_equal_scores_are_no_pair_ranked_right(device):
    """Before training, policy and reference agree: every score is 0 and nothing is right yet."""
    rewards, lists = torch.tensor([1.0, 0.5, 0.0], device=device), torch.tensor([0, 3], device=device)
    ranking = rank(torch.zeros(3, device=device), rewards, lists)
    assert ranking.pair_accuracy.tolist() == [0.0]
    assert ranking.kendall_tau.tolist() == [0.0]


def test_pick_takes_nothing_from_a_list_without_candidates(device):
    values = torch.tensor([2.0, 3.0], device=device)
    assert pick(values, torch.tensor([1, 2, 0], device=device)).tolist() == [3.0, 0.0, 2.0]


@pytest.mark.parametrize("k", [3, 200])
def test_metrics_of_one_list_by_hand(backend, device, k):
    """Score differences 0, so that only the log-probs under the reference decide; a tie is not right."""
    hidden, weight = torch.zeros(k, 4, device=device), torch.zeros(7, 4, device=device)
    rewards = torch.linspace(1, 0, k, device=device)
    ref = -rewards.round()  # score = log π − log π_ref: two groups of equal scores, ranked right between the groups
    out = pk.linear_perpo_loss(
        hidden,
        weight,
        torch.zeros(k, dtype=torch.long, device=device),
        rewards,
        cu_seqlens=torch.arange(k + 1, device=device),
        cu_lists=torch.tensor([0, k], device=device),
        ref_log_probs=ref,
        beta=0.5,
        backend=backend,
    )
    high = int((rewards.round() == 1).sum())
    values = {name: value.item() for name, value in out.metrics.items()}
    assert values["rewards/chosen"] == pytest.approx(0.5 * (1 - math.log(7)), rel=1e-5)
    assert values["rewards/rejected"] == pytest.approx(0.5 * -math.log(7), rel=1e-5)
    assert values["rewards/margins"] == pytest.approx(0.5, rel=1e-5)
    assert values["lists/pair_accuracy"] == pytest.approx(high * (k - high) / (k * (k - 1) / 2), rel=1e-6)
    assert values["lists/active"] == 1.0


@pytest.mark.parametrize("lengths", [[], [[]], [[0, 0]], [[1]]], ids=str)
def test_metrics_of_lists_without_a_preference_are_zero(backend, device, lengths):
    flat = [n for each in lengths for n in each]
    out = pk.linear_perpo_loss(
        torch.randn(sum(flat), 4, device=device),
        torch.randn(7, 4, device=device),
        torch.ones(sum(flat), dtype=torch.long, device=device),
        torch.rand(len(flat), device=device),
        cu_seqlens=pk.layout.cumulative(flat, device=device),
        cu_lists=pk.layout.cumulative([len(each) for each in lengths], device=device),
        backend=backend,
    )
    assert {name: value.item() for name, value in out.metrics.items()} == dict.fromkeys(out.metrics, 0.0)


def test_nothing_is_computed_until_metrics_are_asked_for(device, monkeypatch):
    called = []
    monkeypatch.setattr(metrics, "rank", lambda *args: called.append(args) or rank(*args))
    hidden, weight = torch.randn(2, 4, device=device), torch.randn(7, 4, device=device)
    layout = {"cu_seqlens": torch.arange(3, device=device), "cu_lists": torch.tensor([0, 2], device=device)}
    labels, rewards = torch.tensor([1, 2], device=device), torch.tensor([1.0, 0.0], device=device)
    out = pk.linear_perpo_loss(hidden, weight, labels, rewards, **layout)
    assert not called
    assert out.metrics
    assert called


def test_the_defaults_of_a_chunk_are_those_that_the_docs_name():
    text = f"{chunks.CPU_CHUNK_BYTES >> 20} MiB on the CPU, {chunks.DEVICE_CHUNK_BYTES >> 30} GiB elsewhere"
    assert text in pk.linear_token_log_probs.__doc__
