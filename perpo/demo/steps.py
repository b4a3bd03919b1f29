"""One task with one seed, start to end, with the three commands of `perpo` and nothing else.

    perpo generate    lists of sampled, scored answers: once, and every objective trains on the same lists
    perpo train       one model per objective
    perpo evaluate    all models on held-out records, with and without the picture, and a report

The commands run in this process; their command lines are kept in commands.sh, what they print in log.txt. A second run
skips the steps that are finished.
"""

import contextlib
import inspect
import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from perpo.cli import main as cli
from perpo.demo.model import SHIPPED, WEIGHTS
from perpo.demo.tasks import TASKS, make_records
from perpo.storage import identity
from perpo.storage.fingerprints import file_fingerprint
from perpo_kernels.objectives import PRESETS

SFT = "sft"
FREE = ("objectives", "resamples", "examples")  # settings that runs in one folder may differ in


@dataclass(frozen=True)
class Recipe:
    """What all objectives share: the lists, the budget of steps and the optimiser's settings.

    One pass over lists sampled once, as published. The learning rate is the best of 5e-5, 1e-4 and 2e-4 for each of the
    default objectives in grounding, on validation pictures (`--split validation --seeds 100`): AP@50 0.58, 0.66, 0.62
    for DPO, 0.65, 0.70, 0.56 for uniform pairs, 0.65, 0.70, 0.60 for PerPO. In ocr twice as much gains 0.006 more.
    """

    objectives: tuple[str, ...] = ("dpo", "uniform_pairs", "perpo")
    lists: int = 256  # pictures that answers are sampled for
    k: int = 16  # answers per picture
    held_out: int = 600  # pictures that the models are evaluated on
    split: str = "test"  # of the held-out pictures' digits
    batch: int = 16  # lists per optimiser step
    learning_rate: float = 1e-4
    beta: float | None = None  # of every objective; None: each as published
    gamma: float | None = None  # of the objectives that have one
    resamples: int = 500  # of the bootstrap in the report
    examples: int = 8  # pictures in the report


@dataclass(frozen=True)
class Job:
    task: str
    seed: int
    recipe: Recipe
    output: Path
    no_image_test: bool = False  # doubles the number of questions

    @property
    def folder(self) -> Path:
        return self.output / self.task / f"seed{self.seed}"

    @property
    def n_steps(self) -> int:
        return 2 + len(self.recipe.objectives)


def claim(output: Path, recipe: Recipe) -> None:
    """Take a folder for runs with these settings; more objectives and seeds may be added to it later.

    Raises:
        StaleError: it holds runs with other settings.
    """
    shared = {name: str(value) for name, value in asdict(recipe).items() if name not in FREE}
    shared["model"] = file_fingerprint(SHIPPED / WEIGHTS)
    identity.claim(output, shared, setting="output", contents="runs", pattern="*/seed*")


def run(job: Job, done: Callable[[str], None] = lambda step: None) -> None:
    """All steps of a job; `done` is called with the name of each finished step.

    Raises:
        RuntimeError: a command failed; the message says where its log is.
    """
    task, recipe, folder = TASKS[job.task], job.recipe, job.folder
    make_records(task, recipe.lists, "train", job.seed, folder, "train")
    make_records(task, recipe.held_out, recipe.split, job.seed, folder, "held_out")
    (folder / "commands.sh").write_text("")
    if not (folder / "lists.jsonl").exists():
        _perpo(folder, generate(job))
    done("generate")
    for objective in recipe.objectives:
        if not (folder / objective / "trainer_state.json").exists():  # the last file that training writes
            _perpo(folder, train(job, objective))
        done(objective)
    _perpo(folder, evaluate(job))
    done("evaluate")


def generate(job: Job) -> list[str]:
    recipe, folder = job.recipe, job.folder
    return _command(
        "generate",
        model=SHIPPED,
        records=folder / "train.jsonl",
        image_root=folder,
        output=folder / "lists.jsonl",
        k=recipe.k,
        max_samples=recipe.k,  # as they come: repeats are kept
        max_new_tokens=TASKS[job.task].max_new_tokens,
        seed=job.seed,
    )


def train(job: Job, objective: str) -> list[str]:
    recipe, folder = job.recipe, job.folder
    given = {name: value for name in ("beta", "gamma") if (value := getattr(recipe, name)) is not None}
    return _command(
        "train",
        model_name_or_path=SHIPPED,
        train_file=folder / "lists.jsonl",
        image_root=folder,
        output_dir=folder / objective,
        reference_cache_dir=folder / "reference",
        objective=objective,
        **{name: given[name] for name in inspect.signature(PRESETS[objective]).parameters if name in given},
        lora=False,
        learning_rate=recipe.learning_rate,
        per_device_train_batch_size=recipe.batch,
        seed=job.seed,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )


def evaluate(job: Job) -> list[str]:
    recipe, folder = job.recipe, job.folder
    return _command(
        "evaluate",
        models=[f"{SFT}={SHIPPED}", *(f"{objective}={folder / objective}" for objective in recipe.objectives)],
        records=folder / "held_out.jsonl",
        image_root=folder,
        output=folder / "evaluation",
        max_new_tokens=TASKS[job.task].max_new_tokens,
        n=0,
        blank_test=job.no_image_test,
        batch_size=100,
        resamples=recipe.resamples,
        examples=recipe.examples,
        seed=job.seed,
    )


def _command(name: str, **settings: object) -> list[str]:
    words = [name]
    for setting, value in settings.items():
        values = value if isinstance(value, list) else [str(value).lower() if isinstance(value, bool) else value]
        words += [f"--{setting}", *map(str, values)]
    return words


def _perpo(folder: Path, arguments: list[str]) -> None:
    """Run `perpo ARGUMENTS` in this process, its output in the folder's log."""
    with (folder / "commands.sh").open("a") as commands:
        commands.write(shlex.join(["perpo", *arguments]) + "\n")
    with _output_to(folder / "log.txt"):
        try:
            code: object = cli.main(arguments)
        except SystemExit as stop:  # settings that cannot be read
            code = stop.code
    if code:
        raise RuntimeError(f"perpo {arguments[0]} failed; its output is in {folder / 'log.txt'}")


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    with log.open("a", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield
