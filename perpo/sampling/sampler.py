"""What every sampler offers: answers of a model to questions about images.

`with_transformers` runs any Hugging Face model in this process, one greedy answer each for a batch of questions or k
sampled answers from one prefill; `with_vllm` hands batches of questions to vLLM, `with_openai` single ones to a server.
All draw from the distribution that training computes: softmax(logits / temperature) cut to top_p, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from PIL import Image

from perpo.encoding.encoder import Encoder, Prompt
from perpo.storage.fingerprints import seed_from


@dataclass(frozen=True)
class Sampling:
    """The distribution that answers are drawn from.

    A model's generation config takes no part in it: training computes the probabilities of answers without penalties,
    top-k, suppressed tokens and the like.

    Attributes:
        temperature: 0 takes the most likely token at every step.
        top_p: the smallest set of most likely tokens with at least this probability.
        max_new_tokens: an answer is cut after this many tokens.
        seed: of all records. A record's random numbers come from this, its id and the attempt alone, so order, batches
            and processes do not matter.
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
        return seed_from(f"{self.seed}\0{attempt}\0{record_id}", bits=56)

    def identity(self) -> dict[str, str]:
        """Name -> value of what shapes the answers; greedy ones depend on no top_p and no seed."""
        drawn = {"top_p": str(float(self.top_p)), "seed": str(self.seed)} if self.temperature > 0 else {}
        return {"temperature": str(float(self.temperature)), "max_new_tokens": str(self.max_new_tokens), **drawn}


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
        batch_size: how many questions are best given at once.
        in_flight: how many calls of `sample` are best made at once, in threads. A sampler without it takes one.
    """

    encoder: Encoder

    @property
    def batch_size(self) -> int: ...

    def sample(self, questions: Sequence[Question], n: int, attempt: int = 0) -> list[list[Answer]]:
        """n answers to each question; another attempt draws other answers.

        Raises:
            ValueError: a question that cannot be asked. Give the questions one by one to learn which.
        """
        ...

    def identity(self) -> dict[str, str]:
        """Name -> value or hash of everything that the answers depend on, except the questions."""
        ...


def distinct_answers(
    sampler: Sampler, questions: Sequence[Question], k: int, max_samples: int
) -> list[list[Answer]]:  # k for each question
    """k answers to each question: distinct ones as far as max_samples drawn answers reach, then repeats of them.

    Up to k answers are drawn at a time, since on an accelerator a few take as long as many.
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
