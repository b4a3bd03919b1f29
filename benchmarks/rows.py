"""How a measurement is recorded: one dict per case, with the machine, the versions and the date.

    {question, case, peer, time_ms: {median, min, max, quartiles, n} | None, ratio_to_floor, ratio_to_ours,
     peak_extra_bytes, shapes, dtype, clock, device, driver, load, torch, triton, python, packages, commit, date, ok,
     reason, extra}

`load` is that of the machine in the last minute: what is above the number of threads is others'. `packages` holds the
versions of the peers and of transformers; `commit` ends in +dirty if the measured code differs from it.

Ratios are medians of ratios of neighbours in time (the same round of an interleaved run), so that a machine that slows
down halfway slows both sides. A case that could not run is a row too: ok is false and `reason` says why.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from perpo.storage.atomic import atomic_file

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    *("transformers", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "flash-attn"),
    "nvidia-cutlass-dsl",
)


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's model with its cores (as the number of threads that PyTorch may use)."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} of {os.cpu_count()} cores"


@cache
def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def stdout_of(*command: str) -> str | None:
    """What a command prints, or None if it can't be run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@cache
def driver() -> str | None:
    listed = stdout_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return listed.splitlines()[0] if listed else None


@cache
def commit() -> str | None:
    """Of the code that is measured; PERPO_BENCH_COMMIT where the tree was copied without its history."""
    short = stdout_of("git", "rev-parse", "--short", "HEAD")
    if short is None:
        return os.environ.get("PERPO_BENCH_COMMIT")
    code = ("perpo", "perpo_kernels", "benchmarks/*.py")
    return short + ("+dirty" if stdout_of("git", "status", "--porcelain", "--untracked-files=no", "--", *code) else "")


def machine(device: str) -> Row:
    """What every row says about where and when it was taken."""
    return {
        "device": device_name(device),
        "driver": driver() if device == "cuda" else None,
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES if version(name)},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ"),
    }


def read(path: str | Path) -> list[Row]:
    """The rows of a file; none if it is not there yet."""
    path = Path(path)
    return json.loads(path.read_text()) if path.exists() else []


def kind_of_device(row: Row) -> str:
    """ "cpu" for every CPU, else the name of the GPU."""
    device = row["device"]
    return "cpu" if device.endswith("cores") else device.lower().replace(" ", "-")


def case_of(row: Row) -> tuple[str, ...]:
    return row["question"], row["case"], row["dtype"], kind_of_device(row)


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of each case the machine that measured it last, and of each peer there its newest row; in the order in which
    they first came. Rows of two machines never stand beside each other in a case."""
    rows = list(rows)
    last: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if row["date"] >= last.get(case_of(row), row)["date"]:
            last[case_of(row)] = row
    kept: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = (*case_of(row), row["peer"])
        if row["device"] == last[case_of(row)]["device"] and row["date"] >= kept.get(key, row)["date"]:
            kept[key] = row
    return list(kept.values())


def append(path: str | Path, rows: Iterable[Row]) -> None:
    """Add rows to a file. A crash leaves the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    everything: Sequence[Row] = [*read(path), *rows]
    text = "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in everything) + "\n]\n"
    with atomic_file(path) as file:
        file.write(text.encode())


def default_path(device: str) -> Path:
    """benchmarks/results/<date>-<gpu or cpu>.json"""
    name = torch.cuda.get_device_name().lower().replace(" ", "-") if device == "cuda" else "cpu"
    return RESULTS / f"{datetime.date.today().isoformat()}-{name}.json"


def stage(name: str, seconds: float, status: int, log: Path) -> Row:
    """The row of one stage of benchmarks/gpu.sh: how it ended, and the lines of its log that say why."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    errors = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  ")) or "Error" in line][-12:]
    summary = next((line for line in reversed(lines) if line.strip()), "")
    reason = "out of time" if status in (124, 137) else f"exit status {status}"
    figures = ("time_ms", "ratio_to_floor", "ratio_to_ours", "peak_extra_bytes")
    return {
        "question": "stage",
        "case": name,
        "peer": "perpo_kernels",
        **dict.fromkeys(figures),
        "shapes": {},
        "dtype": "",
        "clock": "wall",
        **machine("cuda" if torch.cuda.is_available() else "cpu"),
        "ok": status == 0,
        "reason": None if status == 0 else "\n".join([reason, *errors, summary]),
        "extra": {"seconds": seconds, "summary": summary},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="the path of this machine's results, or with --stage a row added to it"
    )
    parser.add_argument("--file", type=Path)
    parser.add_argument("--stage")
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--status", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path(os.devnull))
    args = parser.parse_args()
    path = args.file or default_path("cuda" if torch.cuda.is_available() else "cpu")
    if args.stage:
        append(path, [stage(args.stage, args.seconds, args.status, args.log)])
    else:
        print(path)


if __name__ == "__main__":
    main()
