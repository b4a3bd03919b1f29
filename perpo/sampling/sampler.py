"""Answers of a model to questions about pictures: what every sampler offers, whatever runs the model.

`with_transformers` runs any Hugging Face model in this process and encodes image and prompt once for all answers;
`with_vllm` hands whole batches of questions to vLLM.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple, Protocol

from PIL import Image

from perpo.encoding.encoder import Encoder, Prompt


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn: from softmax(logits / temperature), cut to its top_p, with nothing else in between.

    Penalties, top-k and the like in a model's generation config are left aside: training computes the probabilities
    of the answers without them.

    Attributes:
        temperature: 0 takes the likeliest token.
        max_new_tokens: after which an answer is cut.
        seed: of all records; a record's own random numbers come from this, its id and the attempt, and from nothing
            else, so that order, batches and processes do not matter.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be ≥ 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be ≥ 1, got {self.max_new_tokens}")

    def seed_of(self, record_id: str, attempt: int) -> int:
        """A seed below 2⁵⁶ for one record's answers."""
        digest = hashlib.sha256(f"{self.seed}\0{attempt}\0{record_id}".encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:7], "big")

    def identity(self) -> dict[str, str]:
        return {name: str(value) for name, value in asdict(self).items()}


class Question(NamedTuple):
    """What the model is asked."""

    id: str
    prompt: Prompt
    image: Image.Image | None


class Answer(NamedTuple):
    """What it says."""

    text: str
    complete: bool  # it ended by itself, and was not cut after max_new_tokens


class Sampler(Protocol):
    """Anything that answers questions.

    Attributes:
        encoder: of the model that answers.
        batch_size: questions that are best given at once.
    """

    encoder: Encoder
    batch_size: int

    def sample(self, questions: Sequence[Question], n: int, attempt: int = 0) -> list[list[Answer]]:
        """n answers to each question; another attempt draws others.

        Raises:
            ValueError: a question that cannot be asked. Which one is only clear where a single one was given.
        """
        ...

    def identity(self) -> dict[str, str]:
        """Name -> value or hash of everything that the answers depend on, except the questions."""
        ...


def distinct_answers(
    sampler: Sampler, questions: Sequence[Question], k: int, max_samples: int
) -> list[list[Answer]]:  # k for each question
    """k answers to each question, different ones as far as max_samples drawn answers go, then repeats of them.

    Up to k are drawn at a time: on an accelerator a few answers take as long as many.
    """
    different: list[dict[str, Answer]] = [{} for _ in questions]
    repeats: list[list[Answer]] = [[] for _ in questions]
    for attempt, drawn in enumerate(range(0, max_samples, k)):
        missing = [i for i, answers in enumerate(different) if len(answers) < k]
        if not missing:
            break
        n = min(k, max_samples - drawn)
        for i, answers in zip(missing, sampler.sample([questions[i] for i in missing], n, attempt), strict=True):
            for answer in answers:
                if answer.text in different[i]:
                    repeats[i].append(answer)
                else:
                    different[i][answer.text] = answer
    return [[*kept.values(), *again][:k] for kept, again in zip(different, repeats, strict=True)]
