"""The race, resumable: `python -m perpo.demo.race` (or `make race`), hours on one core.

Rows are appended to OUTPUT/rows.jsonl as arms finish; a second run, with more seeds or other questions, goes on where
the first was stopped. `--report` only tables and draws what is there.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from perpo.demo.model import SHIPPED, WEIGHTS
from perpo.demo.race.arms import SFT, SWEPT, VALIDATION_SEEDS, Arm, questions, sweep
from perpo.demo.race.rows import ROWS, Rows, last_metrics, read_rows, run_all
from perpo.demo.race.run import METRICS
from perpo.storage import identity
from perpo.storage.fingerprints import file_fingerprint


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m perpo.demo.race", description=__doc__.split("\n\n")[0])
    names = list(questions([0]))
    parser.add_argument("--questions", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="default: 0 1 2 3 4")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("race_output"), help="folder (%(default)s)")
    parser.add_argument("--report", action="store_true", help="run nothing; tables and figures of the rows there are")
    parser.add_argument("--quick", action="store_true", help="to see that all works; its figures mean nothing")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    folder: Path = options.output
    made = questions(list(dict.fromkeys(options.seeds)))
    asked = {name: made[name] for name in options.questions}
    tasks = sorted({arm.task for arms in asked.values() for arm in arms})
    tuned = sweep(tasks)
    if options.quick:
        asked = {name: [_small(arm) for arm in arms] for name, arms in asked.items()}
        tuned = [_small(arm) for arm in tuned if arm.learning_rate in SWEPT[:1]]
    if not options.report:
        identity.claim(
            folder, {"model": file_fingerprint(SHIPPED / WEIGHTS)}, setting="output", contents="runs", pattern=ROWS
        )
        run_all("learning rates", tuned, folder, options.workers)
        while more := [] if options.quick else beyond(tuned, read_rows(folder)):
            tuned += more
            run_all("more learning rates", more, folder, options.workers)
        run_all("the best learning rates, more seeds", finalists(tuned, read_rows(folder)), folder, options.workers)
        best = learning_rates(read_rows(folder))
        for name, arms in asked.items():
            run_all(name, [tuned_arm(arm, best) for arm in arms], folder, options.workers)
    from perpo.demo.race.report import report  # matplotlib is only needed here

    rows = read_rows(folder)
    report(folder, rows, learning_rates(rows))


Kind = tuple[str, str, int]  # task, objective, rounds


def of_rates(rows: Rows) -> dict[Kind, dict[float, list[float]]]:
    """The first metric on validation pictures, by rate and seed."""
    found: dict[Kind, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows.values():
        arm = Arm.of_row(row["arm"])
        if arm.split == "validation" and arm.learning_rate is not None:
            value = last_metrics(row)[next(iter(METRICS[arm.task]))]
            found[arm.task, arm.objective, arm.rounds][arm.learning_rate].append(value)
    return found


def learning_rates(rows: Rows) -> dict[Kind, float]:
    """The rate with the best mean, of those that were run with the most seeds."""
    best = {}
    for kind, of_rate in of_rates(rows).items():
        most = max(map(len, of_rate.values()))
        means = {rate: fmean(values) for rate, values in of_rate.items() if len(values) == most}
        best[kind] = max(sorted(means), key=lambda rate: means[rate])
    return best


def finalists(tuned: Sequence[Arm], rows: Rows) -> list[Arm]:
    """The two best rates of each kind, with the other seeds: what one seed tells apart may be chance."""
    first = of_rates({arm.key: rows[arm.key] for arm in tuned})
    return [
        replace(arm, seed=seed)
        for arm in tuned
        for of_rate in [first[arm.task, arm.objective, arm.rounds]]
        if arm.learning_rate in sorted(of_rate, key=lambda rate: of_rate[rate])[-2:]
        for seed in VALIDATION_SEEDS[1:]
    ]


def beyond(tuned: Sequence[Arm], rows: Rows) -> list[Arm]:
    """Rates next to the best where that is the smallest or the largest that was tried."""
    best, tried = learning_rates({arm.key: rows[arm.key] for arm in tuned}), defaultdict(list)
    for arm in tuned:
        tried[arm.task, arm.objective, arm.rounds].append(arm)
    more = []
    for kind, arms in tried.items():
        rates = [float(arm.learning_rate or 0) for arm in arms]
        at_end = {min(rates): best[kind] / 2, max(rates): best[kind] * 2}
        if best[kind] in at_end:
            more.append(replace(arms[0], learning_rate=at_end[best[kind]]))
    return more


def tuned_arm(arm: Arm, best: dict[tuple[str, str, int], float]) -> Arm:
    """With the learning rate of its task, objective and rounds: two rounds take that of one, eight that of four."""
    if arm.learning_rate is not None or arm.objective == SFT:
        return arm
    return replace(arm, learning_rate=best[arm.task, arm.objective, 1 if arm.rounds <= 2 else 4])


def _small(arm: Arm) -> Arm:
    return replace(arm, pictures=16, k=4, held_out=24, passes=min(arm.passes, 2), measured=arm.measured[:1])


if __name__ == "__main__":
    main()
