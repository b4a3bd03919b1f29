"""Records as questions to a sampler: with their images, or with the images blanked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageStat

from perpo.data.images import open_image
from perpo.data.record import ListRecord
from perpo.evaluation.answer_store import Answers
from perpo.sampling.sampler import Question, Sampler


def ask(
    sampler: Sampler,
    records: Sequence[ListRecord],
    n: int,
    image_root: str | os.PathLike[str] | None = None,
    *,
    blank: bool = False,
) -> list[Answers]:
    """n answers to each record, all records given to the sampler at once; with the thought that the template opens.

    Args:
        image_root: the folder of the records' images, see `perpo.data.images.open_image`.
        blank: every image is replaced by its mean colour.
    """
    questions: list[Question] = []
    for record in records:
        image = None if record.image is None else open_image(record.image, image_root)
        prompt: Any = record.prompt
        questions.append(Question(record.id, prompt, blanked(image) if image is not None and blank else image))
    return [
        Answers(
            tuple(sampler.encoder.opened + answer.text for answer in answers),
            None if question.image is None else sampler.encoder.seen_size(question.image.size),
            sum(not answer.complete for answer in answers),
        )
        for question, answers in zip(questions, sampler.sample(questions, n), strict=True)
    ]


def blanked(image: Image.Image) -> Image.Image:
    """An image of the same size in the mean colour of this one: it shows what a model answers without looking."""
    colour = ImageStat.Stat(image.convert("RGB")).mean
    red, green, blue = (round(channel) for channel in colour)
    return Image.new("RGB", image.size, (red, green, blue))
