"""Whether a processor takes a record's prompt and image, without encoding all of them twice."""

from __future__ import annotations

import threading
from functools import cached_property
from typing import Any

from PIL import Image

from perpo.data.record import ListRecord
from perpo.encoding.encoder import Encoder

SMALL = 64  # pixels of a shorter side, and
NARROW = 8  # longer sides to a shorter one, beyond which processors are known to fail


class PromptCheck:
    """See `perpo.data.read.PromptCheck`. Every prompt is rendered; encoded are only those that are likely to fail.

    What a processor refuses are pictures that are very narrow or small, and prompts that hold special tokens (those
    of a video, say) or are too long.

    Args:
        processor: as for `Encoder`.
        max_prompt_length: as for `Encoder`; every prompt is encoded to count its tokens.
    """

    def __init__(self, processor: Any, max_prompt_length: int | None = None) -> None:
        self.encoder = Encoder(processor, [0], max_prompt_length=max_prompt_length)  # no answer here, so no end of one
        self.sees_images = self.encoder.sees_images
        self._lock = threading.Lock()  # images are decoded in threads, and tokenizers cannot be shared by them

    def __call__(self, record: ListRecord, image: Image.Image | None) -> None:
        with self._lock:
            self._check(record, image)

    def _check(self, record: ListRecord, image: Image.Image | None) -> None:
        text = self.encoder.render(record.prompt, image is not None)  # type: ignore[arg-type]
        odd = image is not None and (min(image.size) < SMALL or max(image.size) > NARROW * min(image.size))
        written = str(record.prompt)
        for token in self._video:
            if token in written:
                raise ValueError(f"prompt: {token!r} is the place of a video, and a record has none; leave it out")
        if odd or self.encoder.max_prompt_length is not None or any(token in written for token in self._special):
            self.encoder.prompt(record.prompt, image)  # type: ignore[arg-type]
        else:
            self.encoder.tokenizer(text, add_special_tokens=False)

    @cached_property
    def _video(self) -> list[str]:
        holders = (self.encoder.processor, self.encoder.tokenizer)
        return [token for holder in holders if isinstance(token := getattr(holder, "video_token", None), str)]

    @cached_property
    def _special(self) -> list[str]:
        return [str(token) for token in self.encoder.tokenizer.added_tokens_decoder.values()]
