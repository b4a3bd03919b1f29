"""`perpo train`: from a file of scored lists to an aligned model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers.utils import logging

from perpo.cli.settings import ModelConfig
from perpo.data.read import SCORED, ReadSettings, usable_records
from perpo.data.record import ListRecord
from perpo.encoding.encoder import Encoder
from perpo.encoding.prompt_check import PromptCheck
from perpo.model.trainable import freeze, language_lora
from perpo.sampling.candidates import parts_folder
from perpo.storage.identity import known_identity
from perpo.training.checkpoints import check_free, clear_disk_errors, only_run
from perpo.training.config import PerPOConfig
from perpo.training.trainer import PerPOTrainer

logger = logging.get_logger(__name__)


OUT_OF_MEMORY = """What takes less, the first two without a change in what is computed:
  --gradient_checkpointing true
  --per_device_train_batch_size lower, and --gradient_accumulation_steps higher by as much
  --max_candidates 4, say: best, worst and evenly spaced ranks between
  fewer pixels an image, with the processor's own option: --processor_options '{"max_pixels": 401408}'
  --max_response_length lower, if responses are long
"""


@dataclass
class DataConfig(ReadSettings):
    """Which lists."""

    train_file: str = field(metadata={"help": "Scored lists: .jsonl, .json or .parquet."})
    eval_file: str | None = field(default=None, metadata={"help": "Scored lists to evaluate the loss on."})
    drop_inactive: bool = field(
        default=False, metadata={"help": "Leave out lists whose rewards are all equal: they have no gradient."}
    )


@dataclass
class TrainableConfig:
    """What is trained; by default, adapters on the language model."""

    lora: bool = field(
        default=True,
        metadata={
            "help": "Train adapters (LoRA) instead of the model's own weights. What is trained takes 16 bytes a number "
            "(weight, gradient and two moments, in fp32), what is not 2 in bf16."
        },
    )
    lora_r: int = field(default=128, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=256, metadata={"help": "Scale of the adapters: alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the way into the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers with adapters; default: all of the language model."}
    )
    train_projector: bool = field(default=False, metadata={"help": "Train what joins vision tower and language model."})
    train_vision_tower: bool = field(default=False, metadata={"help": "Train the vision tower; only with lora off."})
    train_lm_head: bool = field(default=False, metadata={"help": "Train the language head; only with lora off."})

    def __post_init__(self) -> None:
        if self.lora:
            for name in ("train_vision_tower", "train_lm_head"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} needs --lora false; for adapters there, name its layers with lora_target_modules"
                    )

    def apply(self, model: nn.Module) -> LoraConfig | None:
        """The adapters to put on the model; without adapters, freezes what is not trained."""
        if not self.lora:
            freeze(
                model,
                vision_tower=not self.train_vision_tower,
                projector=not self.train_projector,
                head=not self.train_lm_head,
            )
            return None
        config = language_lora(
            model,
            r=self.lora_r,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            train_projector=self.train_projector,
        )
        if self.lora_target_modules:
            config.target_modules = set(self.lora_target_modules)
        return config


SETTINGS = (ModelConfig, DataConfig, TrainableConfig, PerPOConfig)


def run(model_config: ModelConfig, data: DataConfig, trainable: TrainableConfig, args: PerPOConfig) -> None:
    """Load, train, save into output_dir."""
    with only_run(args):
        _train(model_config, data, trainable, args)


def _train(model_config: ModelConfig, data: DataConfig, trainable: TrainableConfig, args: PerPOConfig) -> None:
    resume = _resume(args.resume_from_checkpoint)
    if not resume:
        check_free(str(args.output_dir))
    name, revision = model_config.model_name_or_path, model_config.model_revision

    @cache
    def processor() -> Any:
        return model_config.load_processor(name, revision)

    train_lists = _read(data.train_file, data, args, processor)
    eval_lists = None if data.eval_file is None else _read(data.eval_file, data, args, processor)
    model = model_config.load_model(name, revision)
    reference = args.ref_model_name_or_path
    trainer = PerPOTrainer(
        model,
        args,
        train_lists,
        processor(),
        eval_dataset=eval_lists,
        peft_config=trainable.apply(model),
        ref_model=None if reference is None else model_config.load_model(reference),
    )
    _compare_pixels(data.train_file, trainer.encoder)
    with clear_disk_errors(str(args.output_dir)):
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        trainer.save_state()


def _read(file: str, data: DataConfig, args: PerPOConfig, processor: Callable[[], Any]) -> list[ListRecord]:
    shown = args.process_index == 0  # joins the processes, if there are several
    records, report = usable_records(
        file,
        data,
        require=SCORED,
        root=args.image_root,
        drop_inactive=data.drop_inactive,
        checks=lambda: [PromptCheck(processor(), args.max_prompt_length)],
        show=shown and not args.disable_tqdm,
    )
    if shown and args.disable_tqdm:
        report.show()
    return records


def _compare_pixels(lists: str, encoder: Encoder) -> None:
    """Boxes in pixels of the resized image mean another place once images are resized otherwise."""
    name = "image processor"
    sampled = known_identity(parts_folder(lists)).get(name)
    if sampled is not None and sampled != encoder.fingerprint()[name]:
        logger.warning(
            f"{lists} was sampled with other settings of the image processor than it is trained with here; if answers "
            "hold positions in pixels, give both commands the same processor_options"
        )


def _resume(given: str | None) -> str | bool | None:
    """A folder, or true for the last whole checkpoint of output_dir (none yet: from the start)."""
    known = {"true": True, "false": None, "none": None}
    return known.get(str(given).lower(), given)
