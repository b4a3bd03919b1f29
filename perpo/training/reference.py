"""Log-probs of answers under the reference: where they come from, and computing them once before training.

precomputed    by the model as it is before training, adapters off; once, kept on disk (`ReferenceCache`)
start          the same with its adapters on: the policy that sampled, if that is the model that training begins with
adapter_off    by the model without its adapters, at every step
model          by a second model, at every step; by several, once, kept on disk (`attach_several`)
data           in the records
none           the objective has no reference
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, extract_model_from_parallel, gather_object
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from perpo.data.record import ListRecord
from perpo.data.spool import Spool
from perpo.encoding.batch import ListBatch
from perpo.encoding.collator import ListCollator, Sample, records_of
from perpo.model import sharing
from perpo.model.language_head import accept_rows, causal_lm, sequence_log_probs
from perpo.model.load import load_model
from perpo.storage.fingerprints import fingerprint, weights_fingerprint
from perpo.training.checkpoints import starting_adapters
from perpo.training.config import PerPOConfig
from perpo.training.failures import in_step, of_all
from perpo.training.reference_cache import ReferenceCache
from perpo.training.sharding import weights_come_from_first
from perpo_kernels import combine_references


def check_reference(model: nn.Module, args: PerPOConfig, ref_model: nn.Module | Iterable[nn.Module] | None) -> None:
    """Raises:
    ValueError: the models at hand do not go with `args.reference`."""
    if args.reference == "adapter_off" and not isinstance(model, PeftModel):
        raise ValueError(
            "reference='adapter_off' needs a model with adapters; give a peft_config, or use reference='precomputed'"
        )
    if args.reference == "model" and ref_model is None and args.ref_model_name_or_path is None:
        raise ValueError("reference='model' needs ref_model or ref_model_name_or_path")
    if args.reference != "model" and ref_model is not None:
        raise ValueError(f"ref_model is given, but reference={args.reference!r} does not use it")
    given = ref_model if isinstance(ref_model, list | tuple) else [ref_model]
    if any(one is model for one in given):
        raise ValueError("ref_model is the model that is trained; give a copy, or use reference='precomputed'")
    weights = args.ref_model_weights
    if weights is not None and isinstance(ref_model, nn.Module | list | tuple) and len(given) != len(weights):
        raise ValueError(
            f"ref_model_weights must hold one number for each reference model, {len(given)}; got {weights}"
        )


def several(ref_model: nn.Module | Iterable[nn.Module] | None, args: PerPOConfig) -> Iterable[nn.Module | str] | None:
    """The models, or their names, where the reference is not one model."""
    if ref_model is None:
        names = args.ref_model_name_or_path or []
        return names if len(names) > 1 else None
    return None if isinstance(ref_model, nn.Module) else ref_model


def second_model(ref_model: nn.Module | str | None, model: nn.Module, args: PerPOConfig, shared: bool) -> nn.Module:
    """The model of reference="model", frozen; loaded if none is given.

    Args:
        ref_model: a model; a name; None: that of ref_model_name_or_path.
        shared: whether `model`, the one that is trained, is fed packed rows.

    Raises:
        ValueError: it does not take the same inputs as `model`.
    """
    if not isinstance(ref_model, nn.Module):
        dtype = causal_lm(model).config.dtype or "auto"  # of the model as it was loaded
        (name,) = [ref_model] if ref_model else args.ref_model_name_or_path or []
        ref_model = load_model(name, dtype=dtype)
    accept_rows(ref_model)
    shares = sharing.prepare(ref_model, args.prefix_sharing, args.device) is not None
    same = causal_lm(ref_model).config.model_type == causal_lm(model).config.model_type
    if not same or shares != shared:
        raise ValueError(
            f"ref_model: {type(causal_lm(ref_model)).__name__} does not take the inputs of "
            f"{type(causal_lm(model)).__name__}; give a model of the same architecture"
        )
    return ref_model.requires_grad_(False)


def with_reference(batch: ListBatch, kind: str, model: nn.Module, ref_model: nn.Module | None) -> ListBatch:
    """The batch with its reference log-probs, computed here if they are made at every step.

    Raises:
        ValueError: they should have come with the records, and did not.
    """
    if kind == "model" and ref_model is not None:
        batch.ref_log_probs = sequence_log_probs(ref_model, batch)
    elif kind == "adapter_off":
        with as_reference(model):
            batch.ref_log_probs = sequence_log_probs(model, batch)
    elif kind != "none" and batch.ref_log_probs is None:
        raise ValueError(
            f"reference={kind!r}: these lists have no reference log-probs; give them to the trainer as train_dataset "
            "or eval_dataset, and evaluate(trainer.eval_dataset)"
        )
    return batch


@contextlib.contextmanager
def as_reference(model: nn.Module, adapters: bool = False) -> Iterator[None]:
    """The model without dropout, and without its adapters unless they belong to it."""
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    off = isinstance(inner, PeftModel) and not adapters
    without_adapters = inner.disable_adapter() if off else contextlib.nullcontext()
    was_training = model.training
    model.eval()
    try:
        with without_adapters:
            yield
    finally:
        model.train(was_training)


class Precomputed:
    """Reference log-probs of every record, by the model as it is now; shared out over ranks. Without its adapters only
    for reference="precomputed".

    Args:
        identity: what the numbers depend on besides the model, see `Encoder.fingerprint`.
        collate, prepare: what makes a batch of records, and moves it to the device.
        own_folder: keep the numbers in a folder of this model's within the cache, named after its weights.
        in_step: the model is sharded, so that each pass is one of all processes: all make equally many.
    """

    def __init__(
        self,
        model: nn.Module,
        args: PerPOConfig,
        accelerator: Accelerator,
        identity: dict[str, str],
        collate: ListCollator,
        prepare: Callable[[ListBatch], ListBatch],
        own_folder: bool = False,
        in_step: bool = False,
    ) -> None:
        self.model, self.args, self.accelerator, self.in_step = model, args, accelerator, in_step
        self.collate, self.prepare = collate, prepare
        self.adapters = args.reference != "precomputed"
        found: list[dict[str, str]] = [{}]
        if args.process_index == 0 or not weights_come_from_first(accelerator):
            found = [self._identity(identity)]
        (self.identity,) = broadcast_object_list(found)
        self.weights = fingerprint([self.identity["weights"], self.identity.get("adapters")])
        self.folder = os.path.join(args.reference_folder, self.weights) if own_folder else args.reference_folder

    def _identity(self, of_encoder: dict[str, str]) -> dict[str, str]:
        core, trained = causal_lm(self.model), starting_adapters(self.model) if self.adapters else "new"
        return {
            "model class": type(core).__name__,
            "weights": weights_fingerprint(core),
            "precision": self.accelerator.mixed_precision,
            **of_encoder,
            **({} if trained == "new" else {"adapters": trained}),  # new ones change nothing
        }

    def attach(self, *datasets: Sequence[Sample] | None) -> list[Sequence[Sample] | None]:
        """Each data set with its reference log-probs: of records that the cache does not hold yet, computed."""
        args = self.args
        with args.main_process_first(desc="reference cache"):
            cache = ReferenceCache(self.folder, self.identity, args.process_index, args.image_root)
        keys = [cache.key(record) for record in _records(datasets)]
        self.accelerator.wait_for_everyone()  # all have read the folder before any writes to it
        if args.world_size > 1:  # machines need not share a disk
            cache.update(gather_object(cache.entries(keys)))
        missing = {key: i for i, key in reversed(list(enumerate(keys))) if key not in cache}  # equal ones once
        shared_out = sorted((i, key) for key, i in missing.items())
        mine: dict[int, str | None] = dict(shared_out[args.process_index :: args.world_size])
        if self.in_step and len(mine) < -(-len(shared_out) // args.world_size):
            mine = {shared_out[0][0]: None, **mine}  # again, for the others' pass; what it gives is dropped
        records = Spool(
            dataclasses.replace(record, ref_log_probs=None) for i, record in enumerate(_records(datasets)) if i in mine
        )
        found = zip(records, mine.values(), self._log_probs(records), strict=True)
        cache.update(
            of_all(args.world_size, lambda: [cache.add(record, values, key) for record, key, values in found if key])
        )
        each = iter(keys)
        return [
            None if dataset is None else Spool(_attach(cache, sample, each) for sample in dataset)
            for dataset in datasets
        ]

    def _log_probs(self, records: Sequence[ListRecord]) -> Iterator[list[float]]:
        """One list at a time."""
        loader: DataLoader[ListBatch] = DataLoader(
            records,  # type: ignore[arg-type]  # a sequence is all that it needs
            batch_size=1,
            collate_fn=self.collate,
            num_workers=self.args.dataloader_num_workers,
        )
        hidden = self.args.disable_tqdm or self.args.process_index > 0 or not len(records)
        batches = tqdm(loader, desc="reference log-probs", unit="list", disable=hidden)
        with as_reference(self.model, self.adapters), self.accelerator.autocast():
            for batch in in_step(self.args.world_size, batches) if self.in_step else batches:
                yield sequence_log_probs(self.model, self.prepare(batch)).tolist()


def attach_several(
    models: Iterable[nn.Module | str],
    alpha: Sequence[float] | None,
    precomputed: Callable[[nn.Module | str], Precomputed],
    *datasets: Sequence[Sample] | None,
) -> tuple[list[Sequence[Sample] | None], list[str]]:
    """Each data set with its log-probs under several models as one reference, and the fingerprints of their weights.

    It is the reference of MRPO (arXiv 2405.16388), log π̃ = −log Σ_n α_n / π_n of a whole response; see
    `perpo_kernels.combine_references`. α is fixed: the paper's α of each response and its clipping to the first model
    are not part of this. Each model is on the device alone, beside the one that is trained, and has a cache of its own:
    other weights, or one model more, compute nothing twice.

    Args:
        models: taken one after another, so that an iterator need not hold them all.
        alpha: [n], one for each model; None: 1/n each.
        precomputed: a model or its name -> it, loaded and checked, with what computes its log-probs.
    """
    of_models, weights = [], []
    for given in models:
        one = precomputed(given)
        of_models.append(one.attach(*datasets))
        weights.append(one.weights)
        if not one.in_step:
            one.model.cpu()
        del given, one  # before the next is loaded
    if not of_models:
        raise ValueError("ref_model: expected one model or more, got none")

    def combined(samples: Sequence[Sample]) -> Sample:
        """One sample with the log-probs of each model -> with those of all."""
        records = []
        for same in zip(*map(records_of, samples), strict=True):
            each = [torch.tensor(record.ref_log_probs, dtype=torch.float64) for record in same]
            log_probs = combine_references(each, alpha).tolist()
            records.append(dataclasses.replace(same[0], ref_log_probs=tuple(log_probs)))
        return records[0] if isinstance(samples[0], ListRecord) else tuple(records)

    each_set: list[Sequence[Sample] | None] = [
        None if samples[0] is None else Spool(map(combined, zip(*samples, strict=True)))
        for samples in zip(*of_models, strict=True)
    ]
    return each_set, weights


def _records(datasets: Iterable[Sequence[Sample] | None]) -> Iterator[ListRecord]:
    """Of all samples."""
    for dataset in datasets:
        for sample in dataset or ():
            yield from records_of(sample)


def _attach(cache: ReferenceCache, sample: Sample, keys: Iterator[str]) -> Sample:
    """The sample with its reference log-probs; takes the keys of its records."""
    attached = tuple(cache.attach(record, next(keys)) for record in records_of(sample))
    return attached[0] if isinstance(sample, ListRecord) else attached
