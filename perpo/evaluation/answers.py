"""How a model answers: greedily, by sampling, and with its picture taken away.

Questions of one batch are padded on the left, so that every answer begins where its prompt ends. A sampled answer
depends on the seed and the record, not on what was asked before it, so a run that goes on after being killed gives
what it would have given.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image, ImageStat
from torch import Tensor, nn

from perpo.data.images import open_image
from perpo.data.record import ListRecord
from perpo.encoding.batch import TOKEN_KEYS, collate_lists
from perpo.encoding.encoder import Encoder
from perpo.evaluation.answer_store import Answers


class Answerer:
    """A model ready to be asked.

    Args:
        model: with a `generate`; put on its device and into evaluation mode by the caller.
        encoder: of the same model.
        image_root: the folder of the records' images, see `perpo.data.images.open_image`.
        max_new_tokens: after which an answer is cut.
    """

    def __init__(
        self,
        model: nn.Module,
        encoder: Encoder,
        *,
        image_root: str | os.PathLike[str] | None = None,
        max_new_tokens: int = 128,
    ) -> None:
        self.model: Any = model
        self.encoder = encoder
        self.image_root = image_root
        self.max_new_tokens = max_new_tokens

    def greedy(self, records: Sequence[ListRecord], *, blank: bool = False) -> list[Answers]:
        """The one greedy answer to each record, asked as one batch.

        Args:
            blank: every picture replaced by its mean colour.
        """
        asked = [self._encode(record, blank) for record in records]
        ids = self._generate([prompt for prompt, _ in asked], do_sample=False)
        return [self._answers([row], size) for row, (_, size) in zip(ids, asked, strict=True)]

    def sample(
        self, record: ListRecord, n: int, *, temperature: float, top_p: float, seed: int, batch_size: int
    ) -> Answers:
        """n answers to one record, at most `batch_size` at a time."""
        prompt, size = self._encode(record, blank=False)
        options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        rows: list[Tensor] = []
        with seeded(record_seed(seed, record.id), self.model.device):
            while len(rows) < n:
                rows += self._generate([prompt] * min(batch_size, n - len(rows)), **options)
        return self._answers(rows, size)

    def _encode(self, record: ListRecord, blank: bool) -> tuple[dict[str, Tensor], tuple[int, int] | None]:
        image = None if record.image is None else open_image(record.image, self.image_root)
        if image is not None and blank:
            image = blanked(image)
        prompt: Any = record.prompt
        try:
            encoded = self.encoder.prompt(prompt, image)
        except ValueError as error:
            raise ValueError(f"record {record.id!r}: {error}") from error
        return encoded, None if image is None else self.encoder.seen_size(image.size)

    def _generate(self, prompts: Sequence[dict[str, Tensor]], **options: Any) -> list[Tensor]:
        """Token ids of an answer to each prompt, with its end token if it has one.

        From the model's own distribution: what its generation config would bend it with (Qwen-VL ships a repetition
        penalty, which the digits of a box run into) is set back.
        """
        config = copy.deepcopy(self.model.generation_config)
        plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "num_beams": 1, "max_length": None}
        plain |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": None}
        ends = {"eos_token_id": list(self.encoder.end_ids), "pad_token_id": self.encoder.pad_id}
        config.update(**(plain | ends | {"max_new_tokens": self.max_new_tokens} | options))
        inputs = left_padded(prompts, self.encoder.pad_id)
        inputs = {name: x.to(self.model.device) for name, x in inputs.items()}
        with torch.inference_mode():
            out = self.model.generate(**inputs, generation_config=config)
        return list(out[:, inputs["input_ids"].shape[1] :].cpu())

    def _answers(self, rows: Sequence[Tensor], size: tuple[int, int] | None) -> Answers:
        ends = torch.tensor(self.encoder.end_ids)
        n_cut = sum(not bool(torch.isin(row, ends).any()) for row in rows)
        return Answers(tuple(self.encoder.decode(row) for row in rows), size, n_cut)


def left_padded(prompts: Sequence[dict[str, Tensor]], pad_id: int) -> dict[str, Tensor]:
    """Encoded prompts, each a batch of one, as one batch whose rows all end with their last token."""
    prompts = [{"attention_mask": torch.ones_like(prompt["input_ids"]), **prompt} for prompt in prompts]
    inputs = collate_lists(prompts, [[[]]] * len(prompts), pad_id).inputs  # padded on the right
    width = inputs["input_ids"].shape[1]
    for key in TOKEN_KEYS.keys() & inputs.keys():
        for row, prompt in zip(inputs[key], prompts, strict=True):
            row.copy_(row.roll(width - prompt["input_ids"].shape[1]))
    return inputs


def blanked(image: Image.Image) -> Image.Image:
    """A picture of the same size in the mean colour of this one: what a model knows that does not look."""
    colour = ImageStat.Stat(image.convert("RGB")).mean
    red, green, blue = (round(channel) for channel in colour)
    return Image.new("RGB", image.size, (red, green, blue))


def record_seed(seed: int, record_id: str) -> int:
    """A seed for each record."""
    return int.from_bytes(hashlib.sha256(f"{seed} {record_id}".encode()).digest()[:8]) >> 1


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run the block from this seed, and leave the random numbers outside it as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
