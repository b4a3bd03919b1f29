"""PerPO on real handwritten digits, start to end, by the commands that a user runs: `python -m perpo.demo`.

A LLaVA of a million parameters was trained on cheap annotation to say where a digit is (grounding) and to read a number
(ocr). Each task is then aligned on the rewards of the model's own answers: `perpo generate` samples and scores lists of
them once, `perpo train` trains on these lists with every objective under one budget, `perpo evaluate` compares.
"""

import argparse
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from perpo.demo.compare import compare
from perpo.demo.report import draw_chart, draw_examples, table, write_json
from perpo.demo.steps import Job, Recipe, claim
from perpo.demo.tasks import SEEDS, TASKS
from perpo_kernels.objectives import PRESETS

PICTURES = {"grounding": "boxes.png", "ocr": "pages.png"}
# RosePO needs the probability that each answer is wrongly rejected, which is not known of these pictures.
OBJECTIVES = [name for name, preset in PRESETS.items() if not preset().flips]
QUICK = Recipe(lists=16, k=4, held_out=24, batch=8, resamples=20, examples=2)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    recipe = Recipe()
    parser = argparse.ArgumentParser("python -m perpo.demo", description=__doc__.split("\n\n")[1])
    parser.add_argument("--tasks", type=_names(TASKS), default=",".join(TASKS), help="default: %(default)s")
    parser.add_argument(
        "--objectives",
        type=_names(OBJECTIVES),
        default=",".join(recipe.objectives),
        help=f"of {', '.join(OBJECTIVES)}; default: %(default)s",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="default: 0 1 2 3 4")
    parser.add_argument("--lists", type=int, default=recipe.lists, help="pictures to sample answers for (%(default)s)")
    parser.add_argument("--k", type=int, default=recipe.k, help="answers per picture (%(default)s)")
    parser.add_argument("--held-out", type=int, default=recipe.held_out, help="pictures to evaluate on (%(default)s)")
    parser.add_argument(
        "--split",
        choices=[s for s in SEEDS if s != "train"],
        default=recipe.split,
        help="split of the digits in those pictures (%(default)s)",
    )
    parser.add_argument("--lr", type=float, default=recipe.learning_rate, help="learning rate (%(default)s)")
    parser.add_argument("--beta", type=float, help="of every objective; default: each as published")
    parser.add_argument("--gamma", type=float, help="of PerPO; default: as published")
    parser.add_argument(
        "--quick", action="store_true", help="a short run, to see that everything works; its figures mean nothing"
    )
    parser.add_argument("--workers", type=int, help="processes; default: one per core")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for all results (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    started = time.perf_counter()
    seeds = list(dict.fromkeys(options.seeds))
    recipe = Recipe(
        objectives=options.objectives,
        lists=options.lists,
        k=options.k,
        held_out=options.held_out,
        split=options.split,
        learning_rate=options.lr,
        beta=options.beta,
        gamma=options.gamma,
    )
    if options.quick:
        chosen = {"objectives": options.objectives, "beta": options.beta, "gamma": options.gamma}
        recipe, seeds = replace(QUICK, **chosen), seeds[:1]
    claim(options.output, recipe)
    jobs = [Job(task, seed, recipe, options.output, seed == seeds[0]) for seed in seeds for task in options.tasks]
    results = compare(jobs, options.workers)

    print(
        f"\n{len(seeds)} seeds; {recipe.lists} lists of {recipe.k} answers, {recipe.held_out} held-out pictures each; "
        f"learning rate {recipe.learning_rate:g}. Mean ± standard error over seeds; the gap is of the first seed."
    )
    for task in options.tasks:
        print(f"\n{task}\n{table(task, results, recipe)}")
        draw_examples(options.output / PICTURES[task], next(job for job in jobs if job.task == task))
    draw_chart(options.output / "methods.png", results, recipe)
    seconds = time.perf_counter() - started
    write_json(options.output / "results.json", results, recipe, seconds)
    pictures = ", ".join(["results.json", "methods.png", *(PICTURES[task] for task in options.tasks)])
    reports = ", ".join(str(job.folder / "evaluation" / "report.html") for job in jobs if job.seed == seeds[0])
    print(f"\n{seconds:.0f} s. In {options.output}: {pictures}\nreports of `perpo evaluate`: {reports}")
    print(f"the commands that were run: {jobs[0].folder / 'commands.sh'}, and one such file per task and seed")


def _names(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """The type of an option that lists names with commas."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split(",")))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return names

    return read


if __name__ == "__main__":
    main()
