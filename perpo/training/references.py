"""The reference of a trainer: the models that its log-probs come from, and when they are computed.

What is computed once is computed when the trainer is made, or, of a model that is sharded, when training begins: it is
sharded then, and no process has it whole. Until then the data loader holds `Later` lists.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, overload

from torch import nn

from perpo.encoding.collator import Sample
from perpo.storage.fingerprints import fingerprint
from perpo.training.reference import Precomputed, attach_several, second_model, several
from perpo.training.sharding import without_training


class Later(Sequence[Sample]):
    """Lists that others will take the place of."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Sample]: ...
    def __getitem__(self, place: int | slice) -> Sample | Sequence[Sample]:
        return self.samples[place]


class References:
    """Of a `PerPOTrainer`, whose data sets are given their reference log-probs here.

    Args:
        trainer: with everything that `transformers.Trainer` sets up.
        model: the one that is trained, not yet wrapped.
        ref_model: as the trainer's.
        shared: whether `model` is fed packed rows.

    Attributes:
        model: the second model that is run at every step.
    """

    def __init__(
        self, trainer: Any, model: nn.Module, ref_model: nn.Module | Iterable[nn.Module] | None, shared: bool
    ) -> None:
        self.trainer, self.trained, self.shared = trainer, model, shared
        self.models = several(ref_model, trainer.args)
        self.waiting: Precomputed | None = None
        self.model: nn.Module | None = None
        if trainer.args.reference == "model" and self.models is None:
            given = ref_model if isinstance(ref_model, nn.Module) else None
            self.model = second_model(given, model, trainer.args, shared)

    def prepare(self) -> None:
        """Put the second model where it runs, and compute what can be computed yet."""
        trainer = self.trainer
        if self.model is not None:
            self.model = without_training(self.model, trainer.accelerator)
        if trainer.args.reference in ("precomputed", "start"):
            self.waiting = self._precomputed(self.trained)
            if trainer.sharded:
                trainer.train_dataset, trainer.eval_dataset = (
                    None if samples is None else Later(samples)
                    for samples in (trainer.train_dataset, trainer.eval_dataset)
                )
            else:
                self.compute(self.trained)

    def compute(self, model: nn.Module) -> None:
        """What was to be computed by the model that is trained, as it is now and wrapped as it is now."""
        if self.waiting is None:
            return
        trainer, computed = self.trainer, self.waiting
        trainer.check_sharing(model)
        computed.model, self.waiting = model, None
        datasets = trainer.train_dataset, trainer.eval_dataset
        lists = [samples.samples if isinstance(samples, Later) else samples for samples in datasets]
        attached = computed.attach(*lists)
        if not trainer.sharded:
            trainer.train_dataset, trainer.eval_dataset = attached
            return
        for samples, with_log_probs in zip(datasets, attached, strict=True):
            if samples is not None:
                samples.samples = with_log_probs

    def attach_several(self) -> dict[str, str]:
        """Log-probs under several models as one, computed now; what a run's identity says of them."""
        if self.models is None:
            return {}
        trainer = self.trainer
        args, accelerator = trainer.args, trainer.accelerator

        def precomputed(given: nn.Module | str) -> Precomputed:
            model = second_model(given, self.trained, args, self.shared)
            computed = self._precomputed(model, own_folder=True)
            computed.model = without_training(model, accelerator) if trainer.sharded else model.to(args.device).eval()
            if self.shared:
                trainer.compare_rows([computed.model], trainer.train_dataset or trainer.eval_dataset or [])
            return computed

        (trainer.train_dataset, trainer.eval_dataset), weights = attach_several(
            self.models, args.ref_model_weights, precomputed, trainer.train_dataset, trainer.eval_dataset
        )
        return {"reference weights": fingerprint([weights, args.ref_model_weights])}

    def check_computed(self) -> None:
        """Raises:
        ValueError: they are not yet."""
        if self.waiting is not None:
            raise ValueError(
                f"reference={self.trainer.args.reference!r} of a model that FSDP or DeepSpeed shards is computed when "
                "training begins, and there is none yet; call train() before evaluate(), or evaluate without sharding"
            )

    def _precomputed(self, model: nn.Module, own_folder: bool = False) -> Precomputed:
        trainer = self.trainer
        return Precomputed(
            model,
            trainer.args,
            trainer.accelerator,
            trainer.encoder.fingerprint(),
            trainer.data_collator,
            trainer._prepare_inputs,
            own_folder=own_folder,
            in_step=trainer.sharded,
        )
