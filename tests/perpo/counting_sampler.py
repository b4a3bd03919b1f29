"""A sampler without a model, and what `generate` makes of it: for the tests of candidates and shards."""

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from perpo.data.record import ListRecord
from perpo.sampling.candidates import CandidateConfig, Outcome, generate
from perpo.sampling.sampler import Answer, Question


class Counting:
    """Answers "how many?" by a hash of record and attempt; stops after `stop` records as if killed."""

    def __init__(self, batch_size: int = 1, stop: int | None = None, **settings: str) -> None:
        self.encoder: Any = SimpleNamespace(seen_size=lambda size: size, opened="")
        self.batch_size = batch_size
        self.stop = stop
        self.settings = settings
        self.asked: list[str] = []

    def identity(self) -> dict[str, str]:
        return self.settings

    def sample(self, questions: Any, n: int, attempt: int = 0) -> list[list[Answer]]:
        return [self.one(question, n, attempt) for question in questions]

    def one(self, question: Question, n: int, attempt: int) -> list[Answer]:
        if question.prompt == "too long":
            raise ValueError("this prompt has 9 tokens")
        if attempt == 0 and len(self.asked) == self.stop:
            raise KeyboardInterrupt
        if attempt == 0:
            self.asked.append(question.id)
        numbers = hashlib.sha256(f"{question.id} {attempt}".encode()).digest()
        return [Answer(str(number % 7), number % 2 == 0) for number in numbers[:n]]


def records(n: int = 7) -> list[ListRecord]:
    return [ListRecord(f"r{i}", None, "How many?", 3, "counting") for i in range(n)]


def run(folder: Path, data: list[ListRecord] | None = None, made: Counting | None = None, **options: Any) -> Outcome:
    config = CandidateConfig(
        **({"k": 4} | {k: options.pop(k) for k in list(options) if k not in ("rank", "world_size")})
    )
    return generate(records() if data is None else data, made or Counting(), folder / "out.jsonl", config, **options)
