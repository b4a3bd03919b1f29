"""python -m benchmarks.report FILE... [--short]: measured rows as Markdown tables, one a question.

Every figure comes from a row; nothing is computed here but ratios that the rows already hold. `--short` prints
one line a case: ours, how far from the floor, and the fastest of the others.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.harness import FLOOR, OURS
from benchmarks.rows import Row, read


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.{digits}g}"


def time_cell(row: Row) -> str:
    t = row["time_ms"]
    if t is None:
        return ""
    low, high = t["quartiles"]
    return f"{number(t['median'])} ({number(low)} to {number(high)})" if t["n"] > 1 else number(t["median"])


def memory_cell(row: Row) -> str:
    peak = row["peak_extra_bytes"]
    return "" if peak is None else number(peak / 2**20)


def note_cell(row: Row) -> str:
    notes = [] if row["ok"] else [row["reason"]]
    notes += [f"{name}: {value}" for name, value in row.get("extra", {}).items() if name != "logits_bytes"]
    return "; ".join(str(note).replace("|", "/") for note in notes)


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "|".join([" --- ", *[" ---: "] * (len(header) - 2), " --- "]) + "|"
    for line in lines:
        yield "| " + " | ".join(line) + " |"


def grouped(rows: Iterable[Row], *keys: str) -> Iterator[tuple[tuple[str, ...], list[Row]]]:
    """Rows with the same keys together, in the order in which the keys were first seen."""

    def key(row: Row) -> tuple[str, ...]:
        return tuple(str(row.get(k)) for k in keys)

    order: dict[tuple[str, ...], int] = {}
    listed = list(rows)
    for row in listed:
        order.setdefault(key(row), len(order))
    for found, group in groupby(sorted(listed, key=lambda row: order[key(row)]), key):
        yield found, list(group)


def full(rows: Iterable[Row]) -> Iterator[str]:
    for (question, device, torch, triton, clock), part in grouped(
        rows, "question", "device", "torch", "triton", "clock"
    ):
        dates = sorted(row["date"] for row in part)
        yield f"\n## {question}\n"
        yield f"{device}; torch {torch}, triton {triton}; {dates[0]} to {dates[-1]}; {clock}, median (quartiles)\n"
        for (case, dtype), group in grouped(part, "case", "dtype"):
            yield f"\n**{case}, {dtype}**\n"
            yield from table(
                ["peer", "ms", "× floor", "× ours", "extra MiB", "notes"],
                [
                    [
                        row["peer"],
                        time_cell(row),
                        number(row["ratio_to_floor"]),
                        number(row["ratio_to_ours"]),
                        memory_cell(row),
                        note_cell(row),
                    ]
                    for row in group
                ],
            )


def short(rows: Iterable[Row]) -> Iterator[str]:
    lines = []
    for (question, case), group in grouped(rows, "question", "case"):
        by_peer = {row["peer"]: row for row in group if row["ok"]}
        ours = by_peer.get(OURS)
        if question == "stage" or ours is None:
            status = "ok" if all(row["ok"] for row in group) else "FAILED: " + str(group[0]["reason"])[-160:]
            lines.append([question, case, "", "", "", status.replace("|", "/").replace("\n", " ")])
            continue
        rivals = [r for name, r in by_peer.items() if not name.startswith((OURS, FLOOR, "bare")) and r["ratio_to_ours"]]
        best = min(rivals, key=lambda row: row["ratio_to_ours"], default=None)
        rival = f"{best['peer']} × {number(best['ratio_to_ours'])}" if best else ""
        ours_ms = number(ours["time_ms"]["median"]) if ours["time_ms"] else ""
        lines.append([question, case, ours_ms, number(ours["ratio_to_floor"]), memory_cell(ours), rival])
    yield from table(["question", "case", "ours ms", "× floor", "extra MiB", "fastest other, × ours"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="measured rows as Markdown tables")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--short", action="store_true", help="one line a case")
    args = parser.parse_args()
    rows = [row for file in args.files for row in read(file)]
    for line in (short if args.short else full)(rows):
        print(line)


if __name__ == "__main__":
    main()
