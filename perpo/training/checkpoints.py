"""Checkpoints: which run they belong to, which of them are whole, and from which one a run resumes.

`identity.json` beside the checkpoints says what their run computes. `checksums.json` in each checkpoint holds its files
as they were written, and is written last; before it comes `trainer_state.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from perpo.data.fingerprints import record_fingerprint
from perpo.data.record import ListRecord
from perpo.encoding.collator import Sample, records_of
from perpo.encoding.encoder import Encoder
from perpo.model.adapters import has_trained_adapters
from perpo.model.language_head import causal_lm
from perpo.storage.checksums import CHECKSUMS, cut_off, damage, files_of, weights_of, write_checksums
from perpo.storage.fingerprints import fingerprint, tensors_fingerprint, weights_fingerprint
from perpo.storage.identity import IDENTITY, DamagedError, check, known_identity, write_identity
from perpo.storage.lock import held
from perpo.training.config import PerPOConfig

logger = logging.get_logger(__name__)

STATE = "trainer_state.json"
JIT_MARK = "checkpoint-is-incomplete.txt"  # of transformers' enable_jit_checkpoint, deleted after the last file
SETTINGS = (
    "reference",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "neftune_noise_alpha",
    "seed",
    "data_seed",
    "max_tokens_per_row",
)
OF_ADAPTERS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias")

_TORCH_WRITES = ("inline_container", "PytorchStreamWriter", "iostream error")  # what torch.save says of a full disk


# ------------------------------------------------------------------------------------------------ whose they are


def run_identity(
    model: nn.Module,
    args: PerPOConfig,
    encoder: Encoder,
    lists: str,
    ref_model: nn.Module | None = None,
) -> dict[str, str]:
    """What a run computes, as far as settings and data decide it: name -> value or fingerprint. Of the model as it is
    before training. Under ZeRO-3 all processes have to call it.

    Left out is what may change when a run resumes: how many processes share a step's lists, how long it takes, how
    often it logs, evaluates and saves, and where model, data and images are.

    Args:
        lists: their `lists_fingerprint`.
    """
    settings = args.to_dict()
    n_lists = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    trained = [
        (name, tuple(getattr(p, "ds_shape", p.shape))) for name, p in model.named_parameters() if p.requires_grad
    ]
    adapters = model.peft_config.values() if isinstance(model, PeftModel) else ()
    kinds = [[str(getattr(one, name, None)) for name in OF_ADAPTERS] for one in adapters]
    return {
        "model class": type(causal_lm(model)).__name__,
        "weights": weights_fingerprint(causal_lm(model)),
        "trained weights": fingerprint([trained, kinds]),
        "weights of adapters": starting_adapters(model),
        "reference weights": "none" if ref_model is None else weights_fingerprint(causal_lm(ref_model)),
        **encoder.fingerprint(),
        "lists": lists,
        "lists a step": str(n_lists),
        "objective": str(args.list_objective),
        "precision": args.mixed_precision,
        **{name: str(settings[name]) for name in SETTINGS},
    }


def starting_adapters(model: nn.Module) -> str:
    """Of adapters that an earlier run has trained; new ones change nothing yet: one factor of each is zero."""
    weights = [(name, p) for name, p in model.named_parameters() if "lora_" in name or "modules_to_save." in name]
    return tensors_fingerprint(weights) if has_trained_adapters(model) else "new"


def lists_fingerprint(samples: Iterable[Sample], args: PerPOConfig) -> str:
    """Of all that training takes of them but the pixels."""
    return fingerprint([_of_list(record, args) for sample in samples for record in records_of(sample)])


def _of_list(record: ListRecord, args: PerPOConfig) -> list[object]:
    """All of a record that training takes, but for the pixels, which would all have to be read."""
    unused = {"image", "answer", "task", "columns"} | (set() if args.reference == "data" else {"ref_log_probs"})
    names = [field.name for field in dataclasses.fields(ListRecord) if field.name not in unused]
    return [record.image is None, record_fingerprint(record, names)]


def only_run(args: PerPOConfig) -> contextlib.AbstractContextManager[None]:
    """A block in which no other run trains into `args.output_dir`, whose first process holds the lock of them all.

    Raises:
        BlockingIOError: another run is training into it.
    """
    if args.process_index > 0:
        return contextlib.nullcontext()
    return held(Path(str(args.output_dir)) / ".lock", f"output_dir: {args.output_dir}")


def check_free(folder: str | os.PathLike[str]) -> None:
    """That no run has left checkpoints in a folder: a new one would delete them, or later resume from them.

    Raises:
        ValueError: there are some.
    """
    if finished_checkpoints(folder):
        raise ValueError(
            f"output_dir: {folder} holds checkpoints; resume from them with resume_from_checkpoint=true, name another "
            "folder, or delete it to begin again"
        )


def claim_run(
    folder: str | os.PathLike[str], identity: Mapping[str, str], resume: str | os.PathLike[str] | bool | None
) -> str | None:
    """Take a folder for the checkpoints of a run, and say from which checkpoint it resumes (None: it begins).

    Args:
        identity: see `run_identity`.
        resume: a checkpoint, in this folder or another; True: the newest one of this folder, if there is one.

    Raises:
        ValueError: the run begins where there are checkpoints.
        DamagedError: the checkpoint is not whole; the message names the file, and the newest checkpoint that is whole.
        StaleError: the folder's or the given checkpoint are of another run; the message says in what they differ.
    """
    folder = Path(folder).absolute()
    there = finished_checkpoints(folder)
    if not resume:
        check_free(folder)
    checkpoint = (there[0] if there else None) if resume is True else Path(resume).absolute() if resume else None
    if there:
        _check_owner(folder, identity, "output_dir")
    if checkpoint is not None:
        if checkpoint.parent != folder:
            _check_owner(checkpoint.parent, identity, "resume_from_checkpoint")
        _check_whole(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    if not there or not known_identity(folder):
        write_identity(folder, identity)
    return None if checkpoint is None else str(checkpoint)


def _check_owner(folder: Path, identity: Mapping[str, str], setting: str) -> None:
    try:
        if not known_identity(folder):
            logger.warning(f"{folder} has no {IDENTITY}: its checkpoints are taken to be of this run")
            return
    except DamagedError as error:
        raise DamagedError(
            f"{setting}: {error}. If its checkpoints are of this run, delete {folder / IDENTITY} and resume; the "
            f"newest whole one is {last_whole_checkpoint(folder)}"
        ) from error
    check(folder, identity, setting=setting, contents="checkpoints")


# ------------------------------------------------------------------------------------------------------ are they whole


def finished_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """Every `checkpoint-N` in a folder that was written to its end, the newest first; damaged ones too."""
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if step and ((path / CHECKSUMS).exists() or _is_json(path / STATE)):
            found.append((int(step[1]), path))
    return [path for _, path in sorted(found, reverse=True)]


def last_whole_checkpoint(folder: str | os.PathLike[str], but: Path | None = None) -> Path | None:
    """The newest checkpoint in a folder with which nothing is wrong; None if there is none. Reads all their files."""
    return next((path for path in finished_checkpoints(folder) if path != but and not problems(path)), None)


def problems(checkpoint: Path) -> list[str]:
    """Why a run cannot resume from a checkpoint, by file; empty if it can."""
    found = damage(checkpoint)
    if found is None:
        logger.warning(
            f"{checkpoint} has no {CHECKSUMS}: it comes from another version, or its run was killed just after writing "
            "it. Only which files there are, and their sizes, could be checked"
        )
        found = [problem for file in weights_of(checkpoint) if (problem := cut_off(file))]
        if not _is_json(checkpoint / STATE):
            found.append(f"{checkpoint / STATE} is missing or damaged")
    names = [path.name for path in checkpoint.iterdir()] if checkpoint.is_dir() else []
    deepspeed = any(name.startswith("global_step") for name in names)  # it keeps all states there
    for state in ("optimizer", "scheduler"):
        if not deepspeed and not any(name.startswith(state) for name in names):
            file = str(checkpoint / f"{state}.pt")
            if not any(problem.startswith(file) for problem in found):
                found.append(f"{file} is missing: deleted, or never written (save_only_model)")
    return found


def _check_whole(checkpoint: Path) -> None:
    if not checkpoint.is_dir():
        raise ValueError(f"resume_from_checkpoint: there is no folder {checkpoint}")
    if found := problems(checkpoint):
        other = last_whole_checkpoint(checkpoint.parent, but=checkpoint)
        way_out = (
            f"The newest whole checkpoint is {other}: set resume_from_checkpoint={other}"
            if other
            else "No other checkpoint is whole: name another output_dir, or delete the folder to start again"
        )
        raise DamagedError(f"resume_from_checkpoint: {'; '.join(found)}. {way_out}")


def unseal(checkpoint: Path) -> None:
    """Before a checkpoint is written over one of the same step: from here on it is not whole."""
    for name in (CHECKSUMS, STATE):
        (checkpoint / name).unlink(missing_ok=True)


def seal(checkpoint: Path) -> None:
    """After all processes have written a checkpoint: it is on the disk, with its checksums."""
    write_checksums(checkpoint, (file for file in files_of(checkpoint) if file.name != JIT_MARK))


def seal_weights(folder: Path) -> None:
    """After a model or adapter was saved into a folder: `perpo.storage.checksums.check_weights` notices damage."""
    write_checksums(folder, weights_of(folder))


# ------------------------------------------------------------------------------------- writing and loading


@contextlib.contextmanager
def names_of_model(model: nn.Module) -> Iterator[None]:
    """A block that saves a checkpoint of a whole model: under the names that its parameters have.

    `save_pretrained` writes the names that the family had in older versions of transformers, which `from_pretrained`
    maps and `Trainer` does not: it would resume with the weights that the run began with.
    """
    if not isinstance(model, PreTrainedModel):
        yield
        return
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del model.save_pretrained


def check_loaded(model: nn.Module, missing: Collection[str]) -> None:
    """That a checkpoint held all weights of a model.

    Raises:
        ValueError: some are missing, by name.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    lacking = [name for name in missing if name not in tied]
    if lacking:
        raise ValueError(
            f"resume_from_checkpoint: the checkpoint lacks {len(lacking)} weights of {type(model).__name__} "
            f"({', '.join(lacking[:3])}, …): it is of another model"
        )


@contextlib.contextmanager
def clear_disk_errors(folder: str | os.PathLike[str]) -> Iterator[None]:
    """A block that saves into `folder`: what each library says of a disk that is full becomes one OSError.

    Raises:
        OSError: a file could not be written; the message says from which checkpoint a run can resume.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        torch_writes = isinstance(error, RuntimeError) and any(words in str(error) for words in _TORCH_WRITES)
        saving = isinstance(error, SafetensorError) and "I/O error" in str(error)
        if not (full or torch_writes or saving):
            raise
        last = last_whole_checkpoint(folder)
        rest = (
            f"{last} is whole: set resume_from_checkpoint=true to resume from it" if last else "no checkpoint is whole"
        )
        first_line = str(error).partition("\n")[0]
        raise OSError(
            errno.ENOSPC, f"{folder} could not be written, the disk may be full ({first_line}); free some space. {rest}"
        ) from error


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
