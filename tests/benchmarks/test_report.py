"""What the report says of rows: the newest counts, and where a peer is better is told."""

import pytest

from benchmarks import report
from benchmarks.losses import losses
from benchmarks.rows import newest


def row(peer, ms=10.0, mib=10, case="c", date="2026-11-24T06:00Z", ours=None, **extra):
    return {
        "question": "q", "case": case, "peer": peer, "dtype": "float32", "device": "d", "date": date, "ok": True,
        "time_ms": {"median": ms, "quartiles": [ms, ms], "n": 3}, "ratio_to_ours": ours, "ratio_to_floor": None,
        "peak_extra_bytes": mib << 20, "reason": None, "extra": extra, "torch": "2", "triton": "3", "clock": "wall",
        "shapes": {}, "file": "f.json",
    }  # fmt: skip


def test_of_rows_that_measure_the_same_the_newest_counts_whatever_the_order_of_files():
    old, new = row("peer", 1), row("peer", 2, date="2026-11-25T06:00Z")
    other = row("peer", 3, case="another")
    for order in ([old, other, new], [new, other, old]):
        assert sorted(r["time_ms"]["median"] for r in newest(order)) == [2, 3]


def test_a_case_is_of_the_machine_that_measured_it_last():
    """Ours of one CPU beside a peer of another says nothing."""
    first = [row(peer) | {"device": "A, 1 of 2 cores"} for peer in ("ours", "peer", "gone")]
    last = [row(p, date="2026-11-25T06:00Z") | {"device": "B, 2 of 2 cores"} for p in ("ours", "peer")]
    gpu, elsewhere = (
        row("ours") | {"device": "NVIDIA H200"},
        row("ours", case="another") | {"device": "A, 1 of 2 cores"},
    )
    for order in ([*first, *last, gpu, elsewhere], [elsewhere, gpu, *last, *first]):
        found = newest(order)
        assert len(found) == 4
        assert all(r in found for r in (*last, gpu, elsewhere))


def test_every_measure_in_which_a_peer_is_better_is_told():
    rows = [
        row("perpo_kernels", 10, 10, ours=1.0, log_probs=1e-3),
        row("faster", 5, 20, ours=0.5, log_probs=2e-3),
        row("leaner", 20, 5, ours=2.0, log_probs=1e-3),
        row("nearer", 20, 20, ours=2.0, log_probs=1e-4),
        row("worse", 20, 20, ours=2.0, log_probs=1e-2),
    ]
    found = {(loss.peer, loss.measure): loss.ratio for loss in losses(rows)}
    assert found == {
        ("faster", "time"): pytest.approx(0.5),
        ("leaner", "memory"): pytest.approx(0.5),
        ("nearer", "error of log_probs"): pytest.approx(0.1),
    }
    printed = "\n".join(report.full(rows))
    for peer in ("faster", "leaner", "nearer"):
        assert f"| q | c | float32 | {peer} |" in printed
    assert "| q | c | float32 | worse |" not in printed


def test_a_peer_is_compared_with_ours_of_the_same_kind():
    rows = [
        row("perpo_kernels", 10, ours=1.0),
        row("perpo_kernels in place", 5, ours=0.5),
        row("peer in place", 6, ours=0.6),
        row("floor", 1, ours=0.1),
        row("bare GEMMs, in chunks", 1, ours=0.1),
        row("another job", 1, ours=0.1, note="no list loss"),
    ]
    assert losses(rows) == []
    assert "Nowhere in these rows." in "\n".join(report.full(rows))


def test_time_with_the_hosts_is_a_measure_of_its_own():
    rows = [row("perpo_kernels", 1, ours=1.0, with_host_ms=3.0), row("peer", 2, ours=2.0, with_host_ms=1.0)]
    assert [(loss.measure, loss.ratio) for loss in losses(rows)] == [("time with the host's", pytest.approx(1 / 3))]
