"""`perpo train`: from a file of scored lists to an aligned model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from transformers.utils import logging

from perpo.cli.settings import ModelConfig, command
from perpo.data.read import SCORED, ReadSettings, usable_records
from perpo.data.record import ListRecord
from perpo.encoding.encoder import Encoder
from perpo.encoding.prompt_check import PromptCheck
from perpo.model.trainable import TrainableConfig, trained_parts
from perpo.sampling.candidates import parts_folder
from perpo.storage.identity import known_identity
from perpo.training.card import Provenance
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

    train_file: str = field(
        metadata={"help": "Scored lists: .jsonl, .json or .parquet, or of the hub: hf://owner/name:split."}
    )
    eval_file: str | None = field(default=None, metadata={"help": "Scored lists to evaluate the loss on."})
    drop_inactive: bool = field(
        default=False, metadata={"help": "Leave out lists whose rewards are all equal: they have no gradient."}
    )


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
    prepared = trainable.apply(model, folder=str(args.output_dir), dtype=model_config.dtype)
    names = args.ref_model_name_or_path or []
    references: Any = (model_config.load_model(one) for one in names)  # several: one after another
    trainer = PerPOTrainer(
        prepared.model,
        args,
        train_lists,
        processor(),
        eval_dataset=eval_lists,
        peft_config=prepared.peft_config,
        ref_model=references if len(names) > 1 else next(references, None),
    )
    trainer.provenance = Provenance(
        data.train_file,
        command("perpo train", (model_config, data, trainable, args)),
        known_identity(parts_folder(data.train_file)),
    )
    if args.process_index == 0:
        print("\n".join(line for line in (prepared.remark, trained_parts(trainer.model)) if line))
    _compare_pixels(data.train_file, trainer.encoder)
    with clear_disk_errors(str(args.output_dir)):
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        trainer.save_state()


def _read(file: str, data: DataConfig, args: PerPOConfig, processor: Callable[[], Any]) -> Sequence[ListRecord]:
    shown = args.process_index == 0  # joins the processes, if there are several
    records, report = usable_records(
        file,
        data,
        require=SCORED,
        root=args.image_root,
        drop_inactive=data.drop_inactive,
        checks=lambda: [PromptCheck(processor(), args.max_prompt_length, args.max_length, every=data.skip_bad)],
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
