"""The objectives side by side: runs every task with every seed, spread over processes, and collects the results.

A seed decides everything random in its runs: the training pictures, the sampled answers, the order of the batches, and
the held-out pictures, on which all models of that seed are evaluated.
"""

import json
import multiprocessing
import os
import queue
import statistics
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from perpo.data.read import read_records
from perpo.demo.steps import Job, run
from perpo.demo.tasks import TASKS
from perpo.demo.workers import start_worker
from perpo.evaluation.metrics import AP_THRESHOLD, STRICT_THRESHOLD

BEST_OF_K = "best of k"


@dataclass(frozen=True)
class Result:
    """The metrics of one model: a row of results.json.

    Attributes:
        model: "sft", an objective, or "best of k": the best answer in each list that was trained on, the head-room.
        metrics: of the task; `gap`, of its first metric with pictures over without, where it was measured.
    """

    task: str
    seed: int
    model: str
    metrics: dict[str, float]


def compare(jobs: list[Job], workers: int | None = None) -> list[Result]:
    """Run all jobs on `workers` processes (default: one per core), with a progress bar, and return their results."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers or cores, len(jobs))
    with tqdm(total=sum(job.n_steps for job in jobs), desc="perpo generate, train, evaluate", unit="step") as bar:
        if workers == 1:
            for job in jobs:
                run(job, partial(_show, bar, job))
        else:
            _run_in_processes(jobs, workers, max(1, cores // workers), bar)
    return [result for job in jobs for result in results(job)]


def results(job: Job) -> list[Result]:
    """The results in the files of a finished job."""
    evaluated = json.loads((job.folder / "evaluation" / "evaluation.json").read_text())
    (figures,) = evaluated["tasks"]
    found = []
    for model in evaluated["models"]:
        measured = figures["models"][model["name"]]["metrics"]
        values = {name: measured[name]["greedy"]["value"] for name in measured}
        first = next(iter(measured.values()))
        values |= {"gap": first["gap"]["value"]} if first["gap"] else {}
        if job.task == "ocr":
            values["edit_similarity"] = 1 - values["edit_distance"]
            values |= {"gap": -values["gap"]} if "gap" in values else {}
        kept = [name for name in (*TASKS[job.task].metrics, "gap") if name in values]
        found.append(Result(job.task, job.seed, model["name"], {name: values[name] for name in kept}))
    return [*found, Result(job.task, job.seed, BEST_OF_K, _best_of_k(job))]


def answers(job: Job, identity: str) -> dict[str, str]:
    """Record -> the greedy answer of the model with that identity in evaluation.json."""
    lines = (job.folder / "evaluation" / "answers.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["model"] == identity]
    return {row["record"]: row["texts"][0] for row in rows if row["condition"].startswith("greedy/")}


def _best_of_k(job: Job) -> dict[str, float]:
    """Of the best answer in each list that was sampled for training."""
    records, _ = read_records(job.folder / "lists.jsonl")
    best = [max(record.rewards or ()) for record in records]
    if job.task == "ocr":
        return {"edit_similarity": statistics.mean(best), "exact": statistics.mean(float(r == 1) for r in best)}
    above = {
        name: statistics.mean(float(r > least) for r in best)
        for name, least in (("ap50", AP_THRESHOLD), ("ap75", STRICT_THRESHOLD))
    }
    return above | {"mean_iou": statistics.mean(best)}


def _show(bar: tqdm, job: Job, step: str) -> None:
    bar.set_postfix_str(f"{job.task}, seed {job.seed}: {step}", refresh=False)
    bar.update()


def _run_in_processes(jobs: list[Job], workers: int, threads: int, bar: tqdm) -> None:
    # Spawned, not forked: a fork of a process whose torch already has threads can hang.
    context = multiprocessing.get_context("spawn")
    ticks = context.Queue()
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(ticks, threads)) as pool:
        futures: list[Future[None]] = [pool.submit(_run_in_worker, job) for job in jobs]
        while not all(future.done() for future in futures):
            try:
                _show(bar, *ticks.get(timeout=0.5))
            except queue.Empty:
                continue
        for future in futures:
            future.result()
    while not ticks.empty():
        _show(bar, *ticks.get())


_report: Callable[[tuple[Job, str]], None] | None = None  # from a worker to its parent's progress bar


def _start_worker(ticks: "multiprocessing.Queue[tuple[Job, str]]", threads: int) -> None:
    global _report
    _report = ticks.put
    start_worker(threads)


def _run_in_worker(job: Job) -> None:
    assert _report is not None
    tell = _report
    run(job, lambda step: tell((job, step)))
