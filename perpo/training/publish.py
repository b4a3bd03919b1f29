"""What a trainer writes beside the weights for others: the model card, and the upload to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.utils import logging

from perpo.encoding.collator import records_of
from perpo.encoding.encoder import Encoder
from perpo.storage.atomic import atomic_file
from perpo.training.card import CARD, Provenance, card_text, is_own
from perpo.training.checkpoints import seal_weights

logger = logging.get_logger(__name__)

# What lies in output_dir and is no part of the model: the hub leaves out what .gitignore names. `Trainer` writes all
# its arguments into training_args.bin, the token of the hub among them.
NOT_PUBLISHED = (".lock", ".*.lock", "reference/", "evaluation/", "*.unfinished/", "training_args.bin")


class Publishing(Trainer):
    """`Trainer` with a card that says what was done."""

    encoder: Encoder
    provenance: Provenance
    pushing = False  # to the hub, at this moment

    def write_card(self, folder: Path, **metadata: Any) -> None:
        """README.md of a folder, unless somebody else has written one.

        Args:
            metadata: further fields of `huggingface_hub.ModelCardData`: model_name, license, language, tags.
        """
        if not is_own(folder / CARD):
            logger.warning(f"{folder / CARD} was not written by perpo, and is left as it is")
            return
        name = metadata.pop("model_name", None) or folder.resolve().name
        text = card_text(
            self.accelerator.unwrap_model(self.model),
            self.args,
            (records_of(sample)[0] for sample in self.train_dataset or ()),
            name=name,
            sees_images=self.encoder.sees_images,
            log=self.state.log_history,
            steps=self.state.global_step,
            provenance=self.provenance,
            **metadata,
        )
        with atomic_file(folder / CARD) as file:
            file.write(text.encode())

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
    ) -> None:
        """As `Trainer.create_model_card`, with what was done. What else that takes, the card knows by itself."""
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        given = {"language": language, "license": license, "tags": [tags] if isinstance(tags, str) else tags}
        self.write_card(folder, model_name=model_name, **{key: value for key, value in given.items() if value})
        if self.pushing:
            seal_weights(folder)  # as they were just saved, for whoever downloads them

    def push_to_hub(self, *args: Any, **options: Any) -> Any:
        self.pushing = True
        try:
            return super().push_to_hub(*args, **options)
        finally:
            self.pushing = False

    def init_hf_repo(self, token: str | None = None) -> None:
        if self.is_world_process_zero():
            _leave_out(Path(str(self.args.output_dir)))
        super().init_hf_repo(token)


def _leave_out(folder: Path) -> None:
    """Add what is no part of the model to the folder's .gitignore."""
    file = folder / ".gitignore"
    there = file.read_text(encoding="utf-8") if file.exists() else ""
    missing = [name for name in NOT_PUBLISHED if name not in there.splitlines()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as out:
            out.write("\n".join([*there.splitlines(), *missing, ""]).encode())
