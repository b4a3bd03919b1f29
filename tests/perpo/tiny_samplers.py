"""Samplers of tiny models, for the tests of sampling."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from perpo.encoding.encoder import Encoder
from perpo.sampling.sampler import Question, Sampling
from perpo.sampling.with_transformers import TransformersSampler

from . import tiny_models

ALMOST_GREEDY = Sampling(temperature=1e-5, max_new_tokens=8)  # still runs through the sampling of k rows
PICTURE = tiny_models.picture((60, 44))
ASKED = Question("a", "Where is the glass?", PICTURE)


def sampler(
    family: str = "llava", sampling: Sampling = ALMOST_GREEDY, *, seed: int = 0, **options: Any
) -> TransformersSampler:
    model, processor = tiny_models.build(family, seed=seed)
    return TransformersSampler(model, Encoder.for_model(processor, model), sampling, **options)


def ids_of(made: TransformersSampler, questions: Sequence[Question], n: int) -> list[list[list[int]]]:
    """`sample`, but token ids in the place of texts, up to the end."""

    def decode(ids: Any) -> str:
        stop = next((i for i, token in enumerate(ids) if token in made.encoder.end_ids), len(ids))
        return json.dumps(ids[: stop + 1])

    made.encoder.decode = decode
    return [[json.loads(answer.text) for answer in answers] for answers in made.sample(questions, n)]
