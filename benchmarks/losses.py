"""Where a peer is better than ours: less time, less memory, a smaller error. Found in the rows, so that no such case is
left out.

A peer is compared with ours of the same kind: one that works in place with ours in place, a graph's replay with a
graph's replay. A row with a note does another job and is not compared; nor are the floor and our own variants.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from benchmarks.harness import BARE, FLOOR, OURS
from benchmarks.rows import Row

KINDS = (" in place", ", graph", ", from logits")
NO_RIVALS = (OURS, FLOOR, BARE, "rounding")
TIME, OTHER = 0.98, 0.99  # of ours: what is above could be chance


class Loss(NamedTuple):
    question: str
    case: str
    dtype: str
    peer: str
    measure: str
    ratio: float  # the peer's over ours
    note: str


def is_rival(row: Row) -> bool:
    return (
        row["ok"]
        and not row["peer"].startswith(NO_RIVALS)
        and "note" not in row["extra"]
        and not row["question"].startswith(("tune", "stage"))
    )


def kind(peer: str) -> str:
    return next((kind for kind in KINDS if peer.endswith(kind)), "")


def figures(row: Row) -> Iterator[tuple[str, float, float]]:
    """(measure, value, below which share of ours it is a loss)."""
    if row["time_ms"]:
        yield "time", row["time_ms"]["median"], TIME
    if "with_host_ms" in row["extra"]:
        yield "time with the host's", row["extra"]["with_host_ms"], TIME
    if row["peak_extra_bytes"] is not None:
        yield "memory", row["peak_extra_bytes"], OTHER
    for name in ("log_probs", "loss", "d_hidden", "d_weight"):
        if name in row["extra"]:
            yield f"error of {name}", row["extra"][name], OTHER


def losses(rows: Iterable[Row]) -> list[Loss]:
    rows = list(rows)
    places = [tuple(str(row[name]) for name in ("question", "case", "dtype", "device")) for row in rows]
    ours = {
        (place, row["peer"].removeprefix(OURS)): row
        for place, row in zip(places, rows, strict=True)
        if row["ok"] and row["peer"].startswith(OURS)
    }
    found = []
    for place, row in zip(places, rows, strict=True):
        base = ours.get((place, kind(row["peer"])))
        if base is None or not is_rival(row):
            continue
        known = {measure: value for measure, value, _ in figures(base)}
        for measure, value, share in figures(row):
            ratio = value / known[measure] if known.get(measure) else None
            if measure == "time" and row["ratio_to_ours"] and not kind(row["peer"]):
                ratio = row["ratio_to_ours"]  # of neighbours in time
            if ratio is not None and ratio < share:
                note = row["extra"].get("remark", "")
                found.append(Loss(place[0], place[1], place[2], row["peer"], measure, ratio, note))
    return found
