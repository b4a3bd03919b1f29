"""The methods side by side: one SFT checkpoint, one budget, several seeds, and held-out scenes of held-out digits.

A seed decides everything random in its column of runs: the scenes trained on, the answers sampled, the order of the
batches, and the held-out scenes, which all methods of that seed are judged on. The runs are spread over the
processor's cores.

AP@50 is the share of scenes whose one greedy answer reaches IoU 0.5 with the exact box; there are no confidences to
rank by.
"""

import multiprocessing
import os
import queue
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from perpo.demo.align import METHODS, PERPO, Advance, Recipe, align, sample_lists, score
from perpo.demo.model import load_model, sample_answers
from perpo.demo.scenes import Scenes, make_scenes
from perpo.demo.vocabulary import box_texts
from perpo.rewards import parse_box

SFT, BEST_OF_K = "SFT", "best of k (head-room)"
ROWS = (SFT, *METHODS, BEST_OF_K)  # in the order of the table
EVALUATION_BATCH = 128
KEPT_ANSWERS = 32  # scenes whose boxes are kept for the pictures


@dataclass(frozen=True)
class Job:
    method: str  # SFT stands for judging the checkpoint as it is, greedily and by the best of k samples
    seed: int
    recipe: Recipe
    checkpoint: Path
    scenes: int  # held-out ones to judge on

    @property
    def work(self) -> int:
        """Scenes that `run_job` will report: those evaluated, and in training those sampled and those trained on."""
        return 2 * self.scenes if self.method == SFT else 2 * self.recipe.rounds * self.recipe.lists + self.scenes


@dataclass(frozen=True)
class Result:
    method: str
    seed: int
    ap50: float
    mean_iou: float
    boxes: list[tuple[float, float, float, float] | None]  # the answers to the first held-out scenes


def held_out_scenes(count: int, seed: int) -> Scenes:
    return make_scenes(count, "test", 777_000_000 + seed)


def evaluate(model: LlavaForConditionalGeneration, scenes: Scenes, advance: Advance) -> tuple[Tensor, list[str]]:
    """IoU [N] of the greedy answer to each scene, and the answers' texts."""
    answers = []
    for start in range(0, len(scenes), EVALUATION_BATCH):
        part = scenes[start : start + EVALUATION_BATCH]
        answers.append(sample_answers(model, part, k=1)[0])
        advance(len(part))
    ids = torch.cat(answers)
    return score(scenes, ids).squeeze(1), box_texts(ids.squeeze(1))


def run_job(job: Job, advance: Advance) -> list[Result]:
    """Train (but for SFT) and judge one method with one seed."""
    sft = load_model(job.checkpoint).eval()
    held_out = held_out_scenes(job.scenes, job.seed)
    model = sft if job.method == SFT else align(sft, job.method, job.recipe, job.seed, advance)
    iou, texts = evaluate(model, held_out, advance)
    results = [_result(job.method, job.seed, iou, texts)]
    if job.method == SFT:
        generator = torch.Generator().manual_seed(job.seed)
        lists = sample_lists(sft, held_out, job.recipe.k, generator, advance)
        best = lists.rewards.max(1)
        texts = box_texts(lists.answers[torch.arange(len(held_out)), best.indices])
        results.append(_result(BEST_OF_K, job.seed, best.values, texts))
    return results


def compare(
    seeds: list[int], recipe: Recipe, checkpoint: Path, scenes: int, workers: int | None = None
) -> list[Result]:
    """All methods with all seeds, on `workers` processes (one a core unless told otherwise), with a progress bar."""
    # The longest first, so that no core is left with one at the end.
    methods = sorted((SFT, *METHODS), key=lambda method: (PERPO, *METHODS[::-1], SFT).index(method))
    jobs = [Job(method, seed, recipe, checkpoint, scenes) for method in methods for seed in seeds]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers or cores, len(jobs))
    with tqdm(total=sum(job.work for job in jobs), desc="aligning and judging", unit="scene", smoothing=0.05) as bar:
        if workers == 1:
            nested = [run_job(job, bar.update) for job in jobs]
        else:
            nested = _run_in_processes(jobs, workers, max(1, cores // workers), bar)
    return [result for results in nested for result in results]


def _result(method: str, seed: int, iou: Tensor, texts: list[str]) -> Result:
    boxes = [parse_box(text) for text in texts[:KEPT_ANSWERS]]
    return Result(method, seed, (iou >= 0.5).float().mean().item(), iou.mean().item(), boxes)


def _run_in_processes(jobs: list[Job], workers: int, threads: int, bar: tqdm) -> list[list[Result]]:
    # Spawned, not forked: a fork of a process whose torch already has threads can hang.
    context = multiprocessing.get_context("spawn")
    ticks = context.Queue()
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(ticks, threads)) as pool:
        futures: list[Future[list[Result]]] = [pool.submit(_run_job_in_worker, job) for job in jobs]
        while not all(future.done() for future in futures):
            try:
                bar.update(ticks.get(timeout=0.5))
            except queue.Empty:
                continue
        results = [future.result() for future in futures]
    while not ticks.empty():
        bar.update(ticks.get())
    return results


_ticks: "multiprocessing.Queue[int] | None" = None  # a worker's way to its parent's progress bar


def _start_worker(ticks: "multiprocessing.Queue[int]", threads: int) -> None:
    global _ticks
    _ticks = ticks
    torch.set_num_threads(threads)


def _run_job_in_worker(job: Job) -> list[Result]:
    assert _ticks is not None
    return run_job(job, _ticks.put)
