"""`perpo` on a folder with a tiny Qwen2.5-VL, where torchvision, which its processor wants for videos, is missing.

python -m tests.perpo.tiny_qwen train --model_name_or_path FOLDER …      # otherwise as `perpo`
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import perpo.model.load
from tests.perpo import tiny_models


class Processor(tiny_models._without_video(Qwen2_5_VLProcessor)):
    """Saved as its parts."""

    def save_pretrained(self, folder: str | os.PathLike[str], **_: Any) -> None:
        self.tokenizer.chat_template = self.chat_template
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **options: Any) -> Processor:
        options.pop("trust_remote_code", None)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        images = Qwen2VLImageProcessorPil.from_pretrained(folder, **options)
        return cls(images, tokenizer, None, chat_template=tokenizer.chat_template)


def save(folder: Path) -> None:
    model, processor = tiny_models.build("qwen2_5_vl")
    model.save_pretrained(folder)
    images, tokenizer = processor.image_processor, processor.tokenizer
    Processor(images, tokenizer, None, chat_template=processor.chat_template).save_pretrained(folder)


def install() -> None:
    """Let every command of this process load its processor so."""
    perpo.model.load.AutoProcessor = Processor


if __name__ == "__main__":
    from perpo.cli import main as cli

    install()
    sys.exit(cli.main(sys.argv[1:]))
