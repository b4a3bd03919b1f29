"""Settings of `perpo evaluate`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from perpo.data.read import ReadSettings
from perpo.model.settings import LoadSettings
from perpo.rewards.formats import box_format
from perpo.rewards.scoring import find_task
from perpo.sampling.sampler import Sampling


@dataclass
class EvaluationConfig(LoadSettings, ReadSettings):
    """Which models, on which records, and what is measured."""

    models: list[str] = field(
        metadata={
            "help": "name=path, 'name=base + adapter', or paths alone; the others are compared with the first one."
        }
    )
    records: str = field(
        metadata={"help": "Held-out records with answers: .jsonl, .json or .parquet, or hf://owner/name:split."}
    )
    output: str = field(metadata={"help": "Folder for answers.jsonl, evaluation.json and report.html."})
    image_root: str | None = field(default=None, metadata={"help": "Folder that the records' images are under."})
    reward: str | None = field(
        default=None, metadata={"help": "Task or reward of all records; default: each record's own task."}
    )
    box_formats: list[str] = field(
        default_factory=list,
        metadata={
            "help": "How boxes are written: one format for all models, or name=format for each; default: the task's."
        },
    )
    n: int = field(default=16, metadata={"help": "Sampled answers a record for best-of-n; 0 leaves it out."})
    blank_test: bool = field(
        default=True, metadata={"help": "Ask everything once more with the images blanked: the no-image test."}
    )
    batch_size: int = field(default=8, metadata={"help": "Answers generated at a time."})
    max_new_tokens: int = field(default=128, metadata={"help": "Tokens after which an answer is cut."})
    temperature: float = field(default=1.0, metadata={"help": "Of the sampled answers."})
    top_p: float = field(default=1.0, metadata={"help": "Of the sampled answers."})
    seed: int = field(default=0, metadata={"help": "Of sampling, of the bootstrap and of the examples shown."})
    limit: int | None = field(default=None, metadata={"help": "Take only the first so many records."})
    resamples: int = field(default=2000, metadata={"help": "Draws of the bootstrap."})
    confidence: float = field(default=0.95, metadata={"help": "Of the intervals."})
    examples: int = field(default=12, metadata={"help": "Example pictures a task in the report."})
    bleu_tokenize: str = field(default="13a", metadata={"help": "sacrebleu's tokenizer: 13a, zh, char, intl, …"})
    device: str | None = field(default=None, metadata={"help": "cuda, cuda:1, cpu, …; default: a GPU if there is one."})

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least = {"n": 0, "batch_size": 1, "max_new_tokens": 1, "resamples": 1, "examples": 0, "limit": 1, "seed": 0}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be ≥ {least}, got {value}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be > 0, got {self.temperature}; n=0 leaves sampling out")
        for name in ("top_p", "confidence"):
            value = getattr(self, name)
            if not 0 < value <= 1 or (name == "confidence" and value == 1):
                raise ValueError(f"{name} must be in (0, 1{')' if name == 'confidence' else ']'}, got {value}")
        if self.reward is not None:
            find_task(self.reward)
        if isinstance(self.box_formats, str):
            self.box_formats = [self.box_formats]

    def box_format_of(self, model: str) -> str | None:
        """The box format that this model writes, or None for that of the task.

        Raises:
            ValueError: a format that is not known.
        """
        found = None
        for text in self.box_formats:
            name, equals, form = text.partition("=")
            if not equals:
                form = name
            box_format(form)
            if not equals or name == model:
                found = form
        return found

    def sampling(self, kind: str) -> Sampling:
        """How answers of a kind ("greedy", "blank", "sampled") are drawn."""
        if kind == "sampled":
            return Sampling(self.temperature, self.top_p, self.max_new_tokens, self.seed)
        return Sampling(temperature=0, max_new_tokens=self.max_new_tokens)

    def condition(self, kind: str) -> str:
        """What, beside model and record, the answers of a kind depend on."""
        shaped = self.sampling(kind).identity()
        if kind == "sampled":
            shaped |= {"n": str(self.n), "answers_at_once": str(min(self.batch_size, self.n))}
        return "/".join([kind, *(f"{name}={value}" for name, value in shaped.items())])
