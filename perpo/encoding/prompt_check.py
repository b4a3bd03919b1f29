"""Whether a processor accepts the prompt and image of a record, before a run begins."""

from __future__ import annotations

import copy
import threading
from functools import cached_property
from typing import Any

from PIL import Image

from perpo.data.record import ListRecord
from perpo.encoding.encoder import Encoder

SMALL = 64  # pixels of the shorter side; below it,
NARROW = 8  # and beyond this ratio of the sides, an image is encoded to see whether the processor accepts it


class PromptCheck:
    """See `perpo.data.read.PromptCheck`. Every prompt is rendered; those that may fail are encoded.

    Processors refuse very narrow or small images, and prompts with special tokens (those of a video, say) or too many
    tokens.

    Args:
        processor: as for `Encoder`.
        max_prompt_length, max_length: as for `Encoder`; every prompt is encoded to count its tokens.
        every: encode every prompt with its image, as a step does: whatever a processor refuses is found. Takes as long
            as the data loader takes for one pass.
    """

    def __init__(
        self,
        processor: Any,
        max_prompt_length: int | None = None,
        max_length: int | None = None,
        *,
        every: bool = False,
    ) -> None:
        limits = {"max_prompt_length": max_prompt_length, "max_length": max_length}
        self.encoder = Encoder(processor, [0], **limits)  # answers are not encoded
        self._counts = any(limit is not None for limit in limits.values())
        self.sees_images = self.encoder.sees_images
        self.every = every
        self._lock = threading.Lock()  # callers use threads, and tokenizers are not thread-safe
        self._own = threading.local()  # an encoder a thread, where each record is encoded

    def __call__(self, record: ListRecord, image: Image.Image | None) -> None:
        with self._lock:
            self._check(record, image)
            if self.every and not hasattr(self._own, "encoder"):
                self._own.encoder = copy.deepcopy(self.encoder)
        if self.every:
            self._own.encoder.prompt(record.prompt, image)

    def _check(self, record: ListRecord, image: Image.Image | None) -> None:
        # For the type checker: a prompt was checked as the record was made.
        text = self.encoder.render(record.prompt, image is not None)  # type: ignore[arg-type]
        if image is not None:
            self.encoder.check_frame(image.size)
        odd = image is not None and (min(image.size) < SMALL or max(image.size) > NARROW * min(image.size))
        written = str(record.prompt)
        for token in self._video:
            if token in written:
                raise ValueError(f"prompt: {token!r} stands for a video, and records have none; remove it")
        if odd or self._counts or any(token in written for token in self._special):
            # For the type checker: a prompt was checked as the record was made.
            encoded = self.encoder.prompt(record.prompt, image)  # type: ignore[arg-type]
            self.encoder.response_limit(encoded["input_ids"].shape[1])
        else:
            self.encoder.tokenizer(text, add_special_tokens=False)

    @cached_property
    def _video(self) -> list[str]:
        holders = (self.encoder.processor, self.encoder.tokenizer)
        return [token for holder in holders if isinstance(token := getattr(holder, "video_token", None), str)]

    @cached_property
    def _special(self) -> list[str]:
        return [str(token) for token in self.encoder.tokenizer.added_tokens_decoder.values()]
