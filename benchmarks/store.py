"""How fast are records sampled, scored and kept when the model takes no time?

    python -m benchmarks.store --records 10000 --processes 1 4

Hypothesis. What `perpo generate` does beside the model (reading records, opening images, scoring, one fsync a record)
takes the same for each record, however many there are, and far less than a model. `perpo score` likewise.

How. A sampler gives 20 boxes at once; all else is what the commands run: records in a file, images on the disk, the
journal with its fsync, the merge into the output. Each process is killed (SIGKILL) after 99 % of its records, and the
run resumed. Times are without imports, memory is the peak above what imports take.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image

from perpo.data.read import read_records
from perpo.sampling.candidates import CandidateConfig, generate
from perpo.sampling.existing import score_existing
from perpo.sampling.sampler import Answer, Question

IMAGES = 100  # files, shared by the records
K = 20


class AtOnce:
    """Answers with boxes that depend on the record, in no time; kills its process after `last` records."""

    batch_size = 1

    def __init__(self, last: int | None = None) -> None:
        self.encoder: Any = SimpleNamespace(seen_size=lambda size: size, opened="")
        self.left = last

    def identity(self) -> dict[str, str]:
        return {"engine": "none"}

    def sample(self, questions: Sequence[Question], n: int, attempt: int = 0) -> list[list[Answer]]:
        if self.left is not None:
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1
        return [[Answer(box(question.id, attempt, i), True) for i in range(n)] for question in questions]


def box(record_id: str, attempt: int, i: int) -> str:
    x, y = divmod(zlib.crc32(f"{record_id} {attempt} {i}".encode()) % 250_000, 500)
    return f"[{x / 1000}, {y / 1000}, {x / 1000 + 0.3:.3f}, {y / 1000 + 0.4:.3f}]"


def write_records(folder: Path, n: int) -> None:
    """`n` questions with images, and the same with answers that exist."""
    (folder / "images").mkdir(parents=True)
    for i in range(IMAGES):
        Image.effect_noise((64, 48), 50 + i).save(folder / "images" / f"{i}.png")
    with (folder / "records.jsonl").open("w") as asked, (folder / "answers.jsonl").open("w") as answered:
        for i in range(n):
            record = {"id": f"r{i}", "image": f"images/{i % IMAGES}.png", "prompt": "Where is the glass?"}
            record |= {"answer": "[0.1, 0.1, 0.5, 0.5]", "task": "grounding"}
            asked.write(json.dumps(record) + "\n")
            answered.write(json.dumps(record | {"responses": [box(f"r{i}", 0, j) for j in range(K)]}) + "\n")


def sample(folder: Path, output: str, rank: int = 0, world_size: int = 1, last: int | None = None) -> None:
    records, _ = read_records(folder / "records.jsonl", require=("answer",), root=folder, check_images=True)
    config = CandidateConfig(k=K, image_root=str(folder))
    generate(records, AtOnce(last), folder / output, config, rank=rank, world_size=world_size)


def score(folder: Path, output: str) -> None:
    records, _ = read_records(folder / "answers.jsonl", require=("answer", "responses"))
    score_existing(records, folder / output, image_root=folder)


# ------------------------------------------------------------------------------------------------------- measuring


def measured(results: Any, function: Callable[..., None], arguments: Sequence[Any]) -> None:
    """Puts seconds, those of the CPU, and MiB."""
    before, start, cpu = _peak(), time.perf_counter(), time.process_time()
    function(*arguments)
    results.put((time.perf_counter() - start, time.process_time() - cpu, _peak() - before))


def run(function: Callable[..., None], calls: Sequence[Sequence[Any]]) -> tuple[float, float, float] | None:
    """In processes at once: the seconds of the slowest, those of the CPU of all, the MiB of the largest; None if they
    were killed."""
    forked = multiprocessing.get_context("fork")  # what is imported is imported once
    results = forked.SimpleQueue()
    processes = [forked.Process(target=measured, args=(results, function, call)) for call in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"{function.__name__} failed, see above")
    found = [results.get() for process in processes if process.exitcode == 0]
    if not found:
        return None
    seconds, cpu, memory = zip(*found, strict=True)
    return max(seconds), sum(cpu), max(memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[10000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 4])
    given = parser.parse_args()
    print("| | records | processes | seconds | records a second | CPU seconds | MiB a process |")
    print("|---|---|---|---|---|---|---|")
    for n in given.records:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "data"
            write_records(place, n)
            for ways in given.processes:
                share = n // ways
                done = share - share // 100
                row("sampled", n, ways, run(sample, [(place, f"{ways}.jsonl", r, ways) for r in range(ways)]), n)
                killed = [(place, f"killed-{ways}.jsonl", r, ways, done) for r in range(ways)]
                if run(sample, killed) is not None:
                    raise RuntimeError("no process was killed")
                resumed = run(sample, [call[:4] for call in killed])
                row(f"resumed after {done * ways} were done", n, ways, resumed, n - done * ways)
                first, second = ((place / f"{name}.jsonl").read_bytes() for name in (ways, f"killed-{ways}"))
                if first != second:
                    raise RuntimeError("resuming changed the output")
            row("scored, `perpo score`", n, 1, run(score, [(place, "scored.jsonl")]), n)
            row("scored, all done before", n, 1, run(score, [(place, "scored.jsonl")]), 0)


def row(name: str, n: int, ways: int, found: tuple[float, float, float] | None, done: int) -> None:
    assert found is not None
    seconds, cpu, memory = found
    rate = f"{done / seconds:.0f}" if done else ""
    print(f"| {name} | {n} | {ways} | {seconds:.1f} | {rate} | {cpu:.1f} | {memory:.0f} |", flush=True)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
