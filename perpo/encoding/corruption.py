"""The image that mDPO sets against the true one: nearly nothing of it left, and always the same for one record.

mDPO (arXiv 2406.11839): an answer that is right for an image should be likelier under it than under another. The best
answer of a list under the corrupted image is one more candidate; it has its own record beside that of the list.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, fields

from PIL import Image

from perpo.data.record import ListRecord
from perpo.storage.fingerprints import seed_from

CROP_AREA = (0.01, 0.2)  # of the image; as published
CROP_RATIO = (3 / 4, 4 / 3)  # width to height
GREY = (127, 127, 127)


def crop(image: Image.Image, rng: random.Random) -> Image.Image:
    """A random part of 0.01 to 0.2 of the area, enlarged to the size of the whole."""
    area = rng.uniform(*CROP_AREA) * image.width * image.height
    ratio = math.exp(rng.uniform(*map(math.log, CROP_RATIO)))
    width = min(max(round(math.sqrt(area * ratio)), 1), image.width)
    height = min(max(round(area / width), 1), image.height)
    width = min(max(round(area / height), 1), image.width)  # of a long strip, more of its length
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    box = (left, top, left + width, top + height)
    return image.resize(image.size, Image.Resampling.BICUBIC, box=box)


def blank(image: Image.Image, rng: random.Random) -> Image.Image:
    """Grey all over."""
    return Image.new("RGB", image.size, GREY)


def noise(image: Image.Image, rng: random.Random) -> Image.Image:
    """Every colour of every pixel drawn anew."""
    return Image.frombytes("RGB", image.size, rng.randbytes(3 * image.width * image.height))


CORRUPTIONS: dict[str, Callable[[Image.Image, random.Random], Image.Image]] = {
    "crop": crop,
    "blank": blank,
    "noise": noise,
}


@dataclass(frozen=True)
class CorruptedRecord(ListRecord):
    """Answers to a record's prompt under its image after `corruption`, with random numbers from `seed`."""

    corruption: str = "crop"
    seed: int = 0

    def corrupt(self, image: Image.Image) -> Image.Image:
        """The image to show instead: RGB, of the same size."""
        return CORRUPTIONS[self.corruption](image.convert("RGB"), random.Random(self.seed))


def with_corrupted_image(record: ListRecord, corruption: str, seed: int) -> tuple[ListRecord, CorruptedRecord]:
    """The list, and its best answer (the first of equals) under the corrupted image.

    That answer has the reward of the worst, so it is never the best of a list that has a preference.

    Raises:
        ValueError: the record has no image.
    """
    if record.image is None:
        raise ValueError(
            f"record {record.id!r} has no image, but the objective sets answers against themselves under a corrupted "
            "one; leave out lists about text alone, or use objective='dpo'"
        )
    assert record.rewards is not None
    best = max(range(record.k), key=record.rewards.__getitem__)
    values = {field.name: getattr(record, field.name) for field in fields(ListRecord)}
    values |= {"responses": record.responses[best : best + 1], "rewards": (min(record.rewards),), "ref_log_probs": None}
    for name in ("flip_probs", "complete"):
        values[name] = values[name] and values[name][best : best + 1]
    return record, CorruptedRecord(**values, corruption=corruption, seed=seed_from(f"{seed} {record.id}"))


def image_pairs(rewards: tuple[float, ...]) -> list[list[float]]:  # [k + 1, k + 1]
    """Weights of the preferences among k candidates and the best of them under a corrupted image.

    The best against the worst, ties in equal shares of 1; the best (the first of equals) against the corrupted, 1.
    Without any preference there is no pair.
    """
    k = len(rewards)
    best = [i for i in range(k) if rewards[i] == max(rewards)]
    worst = [j for j in range(k) if rewards[j] == min(rewards)]
    weights = [[0.0] * (k + 1) for _ in range(k + 1)]
    if len(best) == k:
        return weights
    for i in best:
        for j in worst:
            weights[i][j] = 1 / (len(best) * len(worst))
    weights[best[0]][k] = 1.0
    return weights
