"""python -m benchmarks.report FILE... [--short] [--into DIR]: measured rows as Markdown tables and plots.

The tables are printed and, with the plots (`benchmarks.plots`), written into a folder, docs/benchmarks by default.
Every figure comes from a row; nothing is computed here but quotients of what rows hold. Of a case the machine
that measured it last is shown, and of each peer there its newest row. Where a peer is better than ours
(`benchmarks.losses`) comes first.
`--short` prints one line a case (ours, how far from the floor, and the fastest of the others) and writes nothing.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.harness import OURS
from benchmarks.losses import is_rival, losses
from benchmarks.rows import Row, newest, read

DOCS = Path(__file__).parents[1] / "docs" / "benchmarks"
ERRORS = ("log_probs", "loss", "d_hidden", "d_weight")
# Kept in the rows, left out of the notes in tables.
NO_NOTES = ("logits_bytes", "gradient_bytes", "estimated_bytes", "pairs", "device_lost", *ERRORS)


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


def cells(row: Row) -> dict[str, str]:
    """Figures by their column. `with host`: what a caller waits for from an idle device, launches included."""
    peak, time = row["peak_extra_bytes"], row["time_ms"]
    return {
        "ms": number(time["median"]) if time else "",
        "with host": number(row["extra"].get("with_host_ms")),
        "× floor": number(row["ratio_to_floor"]),
        "× ours": number(row["ratio_to_ours"]),
        "extra MiB": "" if peak is None else number(peak / 2**20),
    }


def error_cells(row: Row) -> list[str]:
    """rms error of a token's log-prob, |error| of the loss, relative errors of the gradients."""
    return [f"{row['extra'][name]:.2e}" if row["extra"].get(name) is not None else "" for name in ERRORS]


def note_cell(row: Row) -> str:
    notes = [] if row["ok"] else [row["reason"]]
    extra = {name: value for name, value in row.get("extra", {}).items() if name not in NO_NOTES}
    notes += [value if name in ("note", "remark") else f"{name}: {value}" for name, value in extra.items()]
    return "; ".join(str(note).replace("|", "/") for note in notes)


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "|".join([" --- ", *[" ---: "] * (len(header) - 2), " --- "]) + "|"
    for line in lines:
        yield "| " + " | ".join(line) + " |"


def grouped(rows: Iterable[Row], *keys: str) -> Iterable[tuple[tuple[str, ...], list[Row]]]:
    """Rows with the same keys together, in the order in which the keys were first seen."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row.get(k)) for k in keys), []).append(row)
    return groups.items()


def better(rows: Sequence[Row]) -> Iterator[str]:
    """Where a peer is better, by how much."""
    lines = [
        [loss.question, loss.case, loss.dtype, loss.peer, loss.measure, number(loss.ratio), loss.note]
        for loss in losses(rows)
    ]
    yield "\n## Where a peer is better\n"
    yield "Its figure over ours, below 1 in every line: times by more than 2 %, memory and errors by more than 1 %."
    yield ""
    header = ["question", "case", "dtype", "peer", "measure", "× ours", "notes"]
    yield from table(header, lines) if lines else ["Nowhere in these rows."]


def full(rows: Sequence[Row]) -> Iterator[str]:
    yield from better(rows)
    timed = [row for row in rows if row["question"] != "stage"]
    yield from questions(timed)


def questions(rows: Iterable[Row]) -> Iterator[str]:
    for (question, device, torch, triton, clock), part in grouped(
        rows, "question", "device", "torch", "triton", "clock"
    ):
        dates = sorted(row["date"] for row in part)
        timed = any(row["time_ms"] for row in part)
        how = f"; {clock}, median (quartiles)" if timed else ""
        files = ", ".join(dict.fromkeys(row["file"] for row in part))
        yield f"\n## {question}\n"
        yield f"{device}; torch {torch}, triton {triton}; {dates[0]} to {dates[-1]}{how}; {versions(part)}rows: {files}"
        for (case, dtype), group in grouped(part, "case", "dtype"):
            yield f"\n**{case}, {dtype}**\n"
            yield from accuracy(group) if question == "accuracy" else times(group)


def versions(rows: Iterable[Row]) -> str:
    """Driver, commits and packages of these rows; older rows do not say."""
    rows = list(rows)
    packages = {f"{name} {number}" for row in rows for name, number in row.get("packages", {}).items()}
    found = [f"{name} {x}" for name in ("driver", "commit") for x in sorted({r[name] for r in rows if r.get(name)})]
    return "".join(f"{x}; " for x in (*found, ", ".join(sorted(packages))) if x)


def times(rows: Sequence[Row]) -> Iterator[str]:
    host = any("with_host_ms" in row["extra"] for row in rows)
    columns = [name for name in cells(rows[0]) if host or name != "with host"]
    lines = [(row, cells(row) | {"ms": time_cell(row)}) for row in rows]
    yield from table(
        ["peer", *columns, "notes"],
        [[row["peer"], *(found[name] for name in columns), note_cell(row)] for row, found in lines],
    )


def accuracy(rows: Iterable[Row]) -> Iterator[str]:
    yield from table(
        ["peer", "log-probs", "loss", "d hidden", "d weight", "notes"],
        [[row["peer"], *error_cells(row), note_cell(row)] for row in rows],
    )


def short(rows: Sequence[Row]) -> Iterator[str]:
    lines = []
    for (question, case), group in grouped(rows, "question", "case"):
        by_peer = {row["peer"]: row for row in group if row["ok"]}
        ours = by_peer.get(OURS)
        if question == "stage" or ours is None:
            status = "ok" if all(row["ok"] for row in group) else "FAILED: " + str(group[0]["reason"])[-160:]
            lines.append([question, case, "", "", "", status.replace("|", "/").replace("\n", " ")])
            continue
        rivals = [row for row in by_peer.values() if is_rival(row) and row["ratio_to_ours"]]
        best = min(rivals, key=lambda row: row["ratio_to_ours"], default=None)
        rival = f"{best['peer']} × {number(best['ratio_to_ours'])}" if best else ""
        figures = cells(ours)
        lines.append([question, case, figures["ms"], figures["× floor"], figures["extra MiB"], rival])
    yield from table(["question", "case", "ours ms", "× floor", "extra MiB", "fastest other, × ours"], lines)


def terminal(rows: Iterable[Row]) -> Iterator[str]:
    """What was measured, for a reader of a terminal: a block per case with ours, the floor and every peer."""
    columns = ("ms", "with host", "× ours", "× floor", "extra MiB")
    for (question, case, dtype), group in grouped(rows, "question", "case", "dtype"):
        errors = question == "accuracy"
        yield ""
        yield f"{f'{question}: {case}, {dtype}':<54}" + "".join(f"{x:>10}" for x in (ERRORS if errors else columns))
        for row in group:
            if not row["ok"]:
                yield f"  {row['peer']:<42} {row['reason']}"
                continue
            figures = error_cells(row) if errors else [cells(row)[name] for name in columns]
            yield f"  {row['peer']:<52}" + "".join(f"{cell:>10}" for cell in figures)


def write(rows: Sequence[Row], into: Path) -> list[Path]:
    """Tables and plots; without matplotlib the tables alone."""
    into.mkdir(parents=True, exist_ok=True)
    tables = into / "tables.md"
    tables.write_text("\n".join(["# Measured rows", *full(rows)]) + "\n")
    try:
        from benchmarks import plots
    except ImportError as error:
        print(f"no plots: {error}", file=sys.stderr)
        return [tables]
    return [tables, *plots.draw(rows, into)]


def main() -> None:
    parser = argparse.ArgumentParser(description="measured rows as Markdown tables and plots")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--short", action="store_true", help="one line a case; write nothing")
    parser.add_argument("--into", type=Path, default=DOCS, help="folder of the tables and plots")
    args = parser.parse_args()
    rows = newest(row | {"file": file.name} for file in args.files for row in read(file))
    for line in (short if args.short else full)(rows):
        print(line)
    if not args.short:
        for path in write(rows, args.into):
            print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
