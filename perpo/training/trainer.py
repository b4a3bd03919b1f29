"""`PerPOTrainer`: the Hugging Face trainer with lists as samples and the list-wise loss on hidden states.

One sample is a list: one image, one question, k candidates. The loss is Σ over lists / number of lists in the optimizer
step, over all accumulated batches and all ranks, so it does not matter how lists are spread over them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import logging

from perpo.data.record import ListRecord
from perpo.encoding.batch import ListBatch
from perpo.encoding.collator import ListCollator, Sample
from perpo.encoding.encoder import Encoder
from perpo.model import sharing
from perpo.model.head_check import check_language_head
from perpo.model.language_head import LanguageHead, accept_rows, causal_lm, perpo_output, through_head
from perpo.model.trainable import keep_in_fp32, n_elements, set_precision
from perpo.prefix import flash_impl
from perpo.training import degree, sharing_check
from perpo.training.batch_sampler import ListBatchSampler, batch_sampler
from perpo.training.card import Provenance
from perpo.training.config import PerPOConfig
from perpo.training.failures import InStep, of_all
from perpo.training.lists import training_lists
from perpo.training.metrics import ListMetrics
from perpo.training.reference import check_reference, with_reference
from perpo.training.references import References
from perpo.training.reward_shift import RewardShift
from perpo.training.saving import Saving
from perpo.training.sharding import reshard, shard_as_asked
from perpo.training.stopping import FAILED, StopOnSignal, StoppedBySignal
from perpo_kernels import LinearPerPOOutput

logger = logging.get_logger(__name__)


class PerPOTrainer(Saving):
    """Trains any Hugging Face vision-language model on lists of scored candidates.

    Args:
        model: with its language head; a PeftModel or full. What requires gradients is trained.
        args: `PerPOConfig`.
        train_dataset, eval_dataset: records, or what `perpo.data.read.read_records` reads: a file, a
            `datasets.Dataset`. processing_class: the processor (a tokenizer for a text model). peft_config: adapters to
            put on the model (`perpo.model.trainable.language_lora` gives the published ones). ref_model: the second
            model of reference="model", or several: a list, or an iterator that loads them. callbacks, optimizers: as
            `transformers.Trainer`.

    Raises:
        ValueError: settings that do not fit together, by name; a stale reference cache; a model whose head is unknown.
    """

    args: PerPOConfig
    train_dataset: Sequence[Sample] | None
    eval_dataset: Sequence[Sample] | None

    def __init__(
        self,
        model: nn.Module,
        args: PerPOConfig,
        train_dataset: Sequence[ListRecord] | Any = None,
        processing_class: Any = None,
        *,
        eval_dataset: Sequence[ListRecord] | Any = None,
        peft_config: LoraConfig | None = None,
        ref_model: nn.Module | Iterable[nn.Module] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if processing_class is None:
            raise ValueError("processing_class: give the model's processor, AutoProcessor.from_pretrained(…)")
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process: start one process a GPU with `torchrun --nproc-per-node "
                f"{args.n_gpu} -m perpo train …`, or choose one with CUDA_VISIBLE_DEVICES"
            )
        if getattr(model, "_hf_peft_config_loaded", False) and not isinstance(model, PeftModel):
            raise ValueError(
                "model: it has adapters that transformers has put on it, and saving would lose them; load it with "
                "perpo.load_model, which gives a PeftModel"
            )
        if peft_config is not None:
            if isinstance(model, PeftModel):
                raise ValueError("peft_config: the model has adapters already; merge them or leave peft_config out")
            set_seed(args.seed)  # as Trainer does, but after the adapters are drawn
            model = get_peft_model(model, peft_config)
        if train_dataset is not None and not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("model: none of its parameters requires a gradient, so nothing would be trained")
        check_reference(model, args, ref_model)
        degree.take_off(model)
        self.degree: degree.DegreeHead | None = None
        set_precision(model, args)
        accept_rows(model)
        self.encoder = Encoder.for_model(
            processing_class,
            causal_lm(model),
            max_prompt_length=args.max_prompt_length,
            max_response_length=args.max_response_length,
            max_length=args.max_length,
        )
        positions = sharing.prepare(model, args.prefix_sharing, args.device)
        self._sharing_unchecked = positions is not None
        if args.flash_attention_impl is not None:
            flash_impl.activate(args.flash_attention_impl, args.device, shared=positions is not None)
        self._evaluated: Any = None
        self.provenance = Provenance(str(train_dataset) if isinstance(train_dataset, str | Path) else "")
        self._batches: ListBatchSampler | None = None
        self._eval_batches: ListBatchSampler | None = None
        self._n_cut = self._n_responses = 0
        self.objective = args.list_objective
        self._shift = RewardShift(args.device) if self.objective.pointwise == "bco" else None
        self.metrics = {"train": ListMetrics(), "eval": ListMetrics()}
        super().__init__(
            model=model,
            args=args,
            data_collator=ListCollator(self.encoder, args.image_root, positions),
            train_dataset=self._lists("train_dataset", train_dataset, args),
            eval_dataset=self._lists("eval_dataset", eval_dataset, args),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the lists of the whole optimizer step
        self._stop = StopOnSignal()
        self.add_callback(self._stop)
        self._n_parameters = sum(map(n_elements, model.parameters()))
        if self.sharded and args.degree_weight:
            raise ValueError(
                "degree_weight > 0 is not supported under FSDP and DeepSpeed; train with DDP, or set it to 0"
            )
        self._unwrapped = self.sharded
        if not self.sharded:  # FSDP and DeepSpeed keep their own fp32 copies
            keep_in_fp32(model)
            with self.accelerator.autocast():
                check_language_head(model)
        self.references = References(self, model, ref_model, positions is not None)
        self._identify(model)
        self.references.prepare()
        self._identity |= self.references.attach_several()
        if args.degree_weight:
            assert args.degree_levels is not None
            self.degree = degree.put_on(model, args.degree_levels, args.device)
            self._identity["degrees"] = f"{args.degree_levels} levels, weight {args.degree_weight}"

    @property
    def sharded(self) -> bool:
        """Whether no process has the whole model once training begins."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        shard_as_asked(self)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As `Trainer`'s. A sharded model has just become so, and no checkpoint was loaded into it yet."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self._unwrapped and self.accelerator._models:
            self._unwrapped = False
            model = self.accelerator._models[-1]
            with self.accelerator.autocast():
                check_language_head(model)
            self.references.compute(model)
            reshard(model)
        return scheduler

    @property
    def ref_model(self) -> nn.Module | None:
        """The second model that is run at every step."""
        return self.references.model

    def _lists(self, name: str, source: Any, args: PerPOConfig) -> Sequence[Sample] | None:
        return None if source is None else training_lists(name, source, args, self.encoder.sees_images)

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> TrainOutput:
        """As `Trainer.train`; True: from the newest checkpoint that was written to its end, or from the start.

        Raises:
            ValueError, BlockingIOError: see `perpo.training.checkpoints.claim_run` and `only_run`.
            StoppedBySignal: SIGINT or SIGTERM, after the step that was running and a checkpoint of it.
        """
        with contextlib.ExitStack() as block:
            checkpoint = self._claim_folder(block, resume_from_checkpoint)
            self.metrics["train"].reset()
            if self._shift is not None:
                self._shift.load(Path(checkpoint)) if checkpoint else self._shift.reset()
            with self._stop:
                output = super().train(resume_from_checkpoint=checkpoint, **options)
        if self._stop.stopped == FAILED:
            of_all(self.args.world_size, self._failed)
        if number := self._stop.stopped:
            stopped = StoppedBySignal(number, self.state.global_step, self.args)
            if self.is_world_process_zero():
                logger.warning(stopped.message)
            raise stopped
        return output

    def _failed(self) -> list[Any]:
        if self._stop.failure is not None:
            raise self._stop.failure
        return []

    def get_batch_samples(
        self, epoch_iterator: Iterator[ListBatch], num_batches: int, device: torch.device
    ) -> tuple[list[ListBatch], Any]:
        """As `Trainer`'s. Where one of several processes cannot make a batch, all of them end with this step."""
        if self.args.world_size == 1:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = []
        try:
            for batch in islice(epoch_iterator, num_batches):
                batches.append(batch)
        except Exception as error:
            self._stop.failure = error
            batches += [self._stand_in(error)] * (num_batches - len(batches))
        return batches, self._get_num_items_in_batch(batches, device)

    def _stand_in(self, error: Exception) -> ListBatch:
        """Any batch, for the exchanges of a step of which nothing is kept."""
        for sample in islice(self.train_dataset or (), sharing_check.AMONG):
            with contextlib.suppress(Exception):
                return self.data_collator([sample])
        raise error

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        """Resumed at its last step in the middle of an epoch, `Trainer` would take one step more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self._batches is not None:
            self._batches.set_epoch(int(options["epoch"]))
        super()._run_epoch(*args, **options)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        args, samples = self.args, self.train_dataset or []
        self._batches = batch_sampler(self, samples, args.per_device_train_batch_size, args.max_tokens_per_row)
        return self._batches or super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        self._eval_batches = batch_sampler(self, eval_dataset, self.args.per_device_eval_batch_size)
        return self._eval_batches or super()._get_eval_sampler(eval_dataset)

    # -------------------------------------------------------------------------------------------------------- the loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: ListBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        self.check_sharing(model)
        batch = with_reference(inputs, str(self.args.reference), model, self.references.model)
        output, of_degrees = self._forward(model, batch)
        sums = self.metrics["train" if model.training else "eval"].add(batch, output, of_degrees)
        if self._shift is not None and model.training:
            self._shift.add(sums["rewards/chosen"] + sums["rewards/rejected"], 2 * sums["weight"])
        self._count_cut(batch, model.training)
        if num_items_in_batch is None:
            loss = output.loss / batch.n_lists
        else:  # the ranks' gradients are averaged, so each gives its share times their number
            loss = output.loss * self.accelerator.num_processes / num_items_in_batch
        return (loss, output) if return_outputs else loss

    def _count_cut(self, batch: ListBatch, training: bool) -> None:
        if batch.n_cut:
            limits = {name: getattr(self.args, name) for name in ("max_response_length", "max_length")}
            allowed = " or ".join(f"{name}={limit}" for name, limit in limits.items() if limit is not None)
            logger.warning_once(
                f"{batch.n_cut} of {batch.cu_seqlens.numel() - 1} responses of a batch have more than "
                f"{allowed} tokens and are cut there; responses/cut in the logs is their share. Cut responses of which "
                "the same is left are no pair"
            )
        if training:
            self._n_cut += batch.n_cut
            self._n_responses += batch.cu_seqlens.numel() - 1

    def _forward(self, model: nn.Module, batch: ListBatch) -> tuple[LinearPerPOOutput, Tensor | None]:
        """What the loss gives, and the sums of the degrees; those are in `loss` too."""
        options = {
            "objective": self.objective,
            "reduction": "sum",
            "delta": None if self._shift is None else self._shift.value,
            "max_chunk_bytes": self.args.max_chunk_bytes,
        }

        def call(hidden: Tensor, head: LanguageHead) -> Any:
            output = perpo_output(hidden, head, batch, **options)
            return output if self.degree is None else (*output, self.degree.sums(hidden, batch))

        if self.degree is None:
            return LinearPerPOOutput(*through_head(model, call, **batch.keywords)), None
        *found, of_degrees = through_head(model, call, **batch.keywords)
        output = LinearPerPOOutput(*found)
        return output._replace(loss=output.loss + self.args.degree_weight * of_degrees[0]), of_degrees

    def check_sharing(self, model: nn.Module) -> None:
        """Once, on lists of the data: packed rows give what separate rows give."""
        samples = self.train_dataset or self.eval_dataset or self._evaluated
        if not self._sharing_unchecked or not samples:
            return
        self._sharing_unchecked = False
        self.compare_rows([model] if self.references.model is None else [model, self.references.model], samples)

    def compare_rows(self, models: Sequence[nn.Module], samples: Sequence[Sample]) -> None:
        with self.accelerator.autocast():  # as in the forward pass, which tells how much rounding there may be
            sharing_check.check_sharing(models, samples, self.data_collator, self._prepare_inputs)

    def _get_num_items_in_batch(self, batch_samples: list[ListBatch], device: torch.device) -> Tensor | int | None:
        """Lists in the optimizer step, on all ranks. Takes those that only fill up the last batch out of it."""
        if self._shift is not None:
            self._shift.update(self.accelerator)
        n_lists = sum(batch.n_lists for batch in batch_samples)
        if not batch_samples or self.args.world_size == 1:
            return n_lists or None
        n_lists -= batch_samples[-1].n_lists
        batch_samples[-1], n_last = self._without_filling(batch_samples[-1], self._batches, self._remainder())
        n_lists += n_last
        gathered = self.accelerator.gather(torch.tensor([[n_lists, self._stop.vote]], device=device))  # [ranks, 2]
        self._stop.count(gathered[:, 1])
        return gathered[:, 0].sum()

    def _remainder(self) -> int:
        """Lists in the last batches of all ranks in a pass over the training data; 0: these are whole, or left out.

        accelerate's own number is lost in the epoch in which a run is resumed.
        """
        n_at_once = self.args.train_batch_size * (1 if self.accelerator.split_batches else self.args.world_size)
        return 0 if self.args.dataloader_drop_last else len(self.train_dataset or ()) % n_at_once

    def _without_filling(
        self, batch: ListBatch, batches: ListBatchSampler | None, remainder: int
    ) -> tuple[ListBatch, int]:
        """The batch that the data loader gave last, and how many of its lists are of this pass over the data.

        Args:
            batches: what made the batches of the data loader, if not the trainer's own sampler.
            remainder: how many lists are in the last batches of all ranks.
        """
        state, n_lists = self.accelerator.gradient_state, batch.n_lists
        if not state.end_of_dataloader:
            return batch, n_lists
        if batches is not None:
            return (batch.counting_first(0), 0) if batches.ends_with_filling else (batch, n_lists)
        if remainder <= 0:
            return batch, n_lists
        n_kept = min(max(remainder - self.args.process_index * n_lists, 0), n_lists)
        return (batch if n_kept == n_lists else batch.counting_first(n_kept)), n_kept

    def _prepare_inputs(self, inputs: ListBatch) -> ListBatch:
        return inputs.to(self.args.device, non_blocking=True)

    def floating_point_ops(self, inputs: ListBatch) -> int:
        """6 × tokens × parameters, the usual estimate."""
        return 6 * inputs.n_tokens * self._n_parameters

    # ------------------------------------------------------------------------------------------------ logs, evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            mine = self.metrics["train"].report(self.accelerator)
            self.metrics["train"].reset()
            counts = torch.tensor([[self._n_cut, self._n_responses]], device=self.accelerator.device)
            n_cut, n_responses = self.accelerator.gather(counts).sum(0).tolist()
            self._n_cut = self._n_responses = 0
            if self._shift is not None:
                mine["rewards/shift"] = self._shift.value.item()
            logs = {**mine, "responses/cut": n_cut / max(n_responses, 1), **logs}
        super().log(logs, start_time)

    def prediction_step(
        self, model: nn.Module, inputs: ListBatch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, None, None]:
        batch, _ = self._without_filling(inputs, self._eval_batches, self.accelerator.gradient_state.remainder)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(batch))
        return loss.detach(), None, None

    def evaluation_loop(
        self, dataloader: DataLoader[Any], *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        self.references.check_computed()
        self.metrics["eval"].reset()
        self._evaluated = dataloader.dataset
        if self.args.world_size > 1:
            dataloader = cast(DataLoader[Any], InStep(dataloader, self.args.world_size))
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name, value in self.metrics["eval"].report(self.accelerator).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output
