"""The rows: what came of every arm, appended to a file as arms finish."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers.utils import logging

from perpo.demo.race.arms import Arm
from perpo.demo.race.run import run
from perpo.demo.workers import start_worker
from perpo.storage.atomic import atomic_file
from perpo.storage.journal import Journal, read_journals

ROWS, SCORES = "rows.jsonl", "scores"
Rows = dict[str, dict[str, Any]]  # key of an arm -> its row


def run_all(name: str, arms: Iterable[Arm], folder: Path, workers: int) -> None:
    """Run the arms that have no row yet."""
    there = read_rows(folder)
    left = list({arm.key: arm for arm in arms if not _is_there(arm, there)}.values())
    if not left:
        return
    # Spawned, not forked: a fork of a process whose torch already has threads can hang.
    with (
        tqdm(total=len(left), desc=name, unit="arm", file=sys.stdout) as bar,
        Journal(folder / ROWS) as journal,
        ProcessPoolExecutor(min(workers, len(left)), get_context("spawn"), initializer=_start) as pool,
    ):
        futures = [pool.submit(_run, arm, folder) for arm in left]
        try:
            for future in as_completed(futures):
                row = future.result()
                journal.append(row, what=f"the row of {row['arm']}")
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _is_there(arm: Arm, rows: Rows) -> bool:
    row = rows.get(arm.key)
    return row is not None and not (arm.probes and "gap" not in last_metrics(row))


def last_pass(row: dict[str, Any]) -> int:
    return max(map(int, row["metrics"]))


def last_metrics(row: dict[str, Any]) -> dict[str, float]:
    return dict(row["metrics"][str(last_pass(row))])


def _start() -> None:
    start_worker()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*(unreadable|pin_memory).*")


def _run(arm: Arm, folder: Path) -> dict[str, Any]:
    outcomes, spent = run(arm, folder)
    for outcome in outcomes:
        (folder / SCORES).mkdir(exist_ok=True)
        with atomic_file(folder / SCORES / f"{arm.key}-{outcome.after}.npy") as file:
            np.save(file, outcome.scores)
    return {
        "key": arm.key,
        "arm": arm.named(),
        "learning_rate": arm.learning_rate,
        "metrics": {str(outcome.after): outcome.metrics for outcome in outcomes},
        "spent": {name: round(value, 1) for name, value in asdict(spent).items()},
    }


def read_rows(folder: Path) -> Rows:
    if not (folder / ROWS).exists():
        return {}
    return {row["key"]: row for _, row in read_journals([folder / ROWS], "their arms are run again")}
