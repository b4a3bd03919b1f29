"""The list loss in a `transformers.Trainer` of one's own: a mixin for its loss, and a collator for its rows.

    class ListTrainer(ListLossMixin, Trainer):
        list_options = {"beta": 0.1}

    ListTrainer(model, TrainingArguments(…, remove_unused_columns=False), train_dataset=rows,
                data_collator=PaddedListCollator(processor, model))

`perpo.PerPOTrainer` does more: references, shared prompts, metrics over ranks, resuming. This is for those who have a
trainer already. `compute_loss_func` of `Trainer` is no way in: it is called with logits that were made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from perpo.data.read import read_records
from perpo.data.record import ListRecord
from perpo.encoding.batch import TOKEN_KEYS, ListBatch
from perpo.encoding.collator import ListCollator
from perpo.encoding.encoder import Encoder
from perpo.integrations.list_loss import list_loss
from perpo.integrations.padded import IGNORED
from perpo.model.language_head import causal_lm

logger = logging.get_logger(__name__)

OF_LISTS = ("labels", "rewards", "cu_lists", "ref_log_probs")


class PaddedListCollator:
    """Rows, one a list -> a padded batch: the model's inputs, and what `perpo.list_loss` takes beside them.

    A row is a `perpo.ListRecord` or a mapping with prompt, responses and rewards, and image and ref_log_probs where
    there are any. Its k answers become k rows [image | prompt | answer] one after another.

    Args:
        processor: an `AutoProcessor`, or a tokenizer for a text model.
        model: whose generation config says how an answer ends; None: the tokenizer's eos token.
        image_root: folder of image paths.
        limits: max_prompt_length, max_response_length of `perpo.Encoder`.

    Returns:
        input_ids, attention_mask, … [S, L], labels [S, L], rewards [S], cu_lists (integers, so that they stay on the
        host), and ref_log_probs [S] if all rows have them.
    """

    def __init__(
        self, processor: Any, model: nn.Module | None = None, image_root: str | None = None, **limits: int | None
    ) -> None:
        core = nn.Module() if model is None else causal_lm(model)
        encoder = Encoder.for_model(processor, core, **limits)
        self._lists = ListCollator(encoder, image_root)

    def __call__(self, rows: Sequence[ListRecord | Mapping[str, Any]]) -> dict[str, Any]:
        batch = self._lists([_record(row) for row in rows])
        if batch.n_cut:
            logger.warning_once(
                f"{batch.n_cut} of {len(batch.rewards)} answers of a batch are longer than max_response_length and are "
                "cut there"
            )
        out: dict[str, Any] = self._with_last_tokens(batch)
        out |= {"rewards": batch.rewards, "cu_lists": batch.cu_lists.tolist()}
        return out if batch.ref_log_probs is None else out | {"ref_log_probs": batch.ref_log_probs}

    def _with_last_tokens(self, batch: ListBatch) -> dict[str, Tensor]:
        """The inputs with a column more, and labels: a `ListBatch` does not feed the last token of an answer."""
        encoder, ids = self._lists.encoder, batch.inputs["input_ids"]
        at = batch.response_rows + batch.response_rows // ids.shape[1] + 1  # of the answers' tokens, in [S · (L + 1)]
        columns = {name: x for name, x in batch.inputs.items() if name in TOKEN_KEYS}
        columns["labels"] = torch.full_like(ids, IGNORED)
        values = {**TOKEN_KEYS, **encoder.answer_values}
        fill = {"input_ids": encoder.pad_id, "labels": IGNORED}
        for name, x in columns.items():
            columns[name] = nn.functional.pad(x, (0, 1), value=fill.get(name, 0))
            of_answer = values.get(name)
            columns[name].view(-1)[at] = batch.labels if of_answer is None else torch.full_like(at, of_answer)
        return {**batch.inputs, **columns}


def _record(row: ListRecord | Mapping[str, Any]) -> ListRecord:
    if isinstance(row, ListRecord):
        return row
    missing = [name for name in ("prompt", "responses", "rewards") if row.get(name) is None]
    if missing:
        raise ValueError(
            f"train_dataset: a row has no {', '.join(missing)}, but {', '.join(row) or 'nothing'}; a row is a list of "
            "answers, and TrainingArguments need remove_unused_columns=False to leave its columns there"
        )
    (record,), _ = read_records([row])
    return record


class ListLossMixin:
    """For a subclass of `transformers.Trainer`, before it: the loss of lists on hidden states, with no logits.

    The loss of an optimizer step is the mean over its lists, over all accumulated batches and all ranks.
    rewards/margins and the other metrics are logged as means over this process's batches.

    Attributes:
        list_options: keywords of `perpo.list_loss`: objective, beta, gamma, max_chunk_bytes, …
    """

    list_options: Mapping[str, Any] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if trainer.args.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: a row's prompt, responses and rewards are needed")
        if trainer.compute_loss_func is not None or trainer.args.label_smoothing_factor:
            raise ValueError("compute_loss_func, label_smoothing_factor: the loss is that of lists; leave them out")
        trainer.model_accepts_loss_kwargs = True  # `compute_loss` divides by the lists of the optimizer step
        self._sums: dict[str, Tensor] = {}
        self._n_batches = 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        body = {name: x for name, x in inputs.items() if name not in OF_LISTS}
        known = {name: inputs.get(name) for name in OF_LISTS}
        if known["ref_log_probs"] is None:
            logger.warning_once("rows without ref_log_probs: the loss has no reference model")
        # For the type checker: what the collator made.
        out = list_loss(model, body, **known, reduction="sum", **self.list_options)  # type: ignore[arg-type]
        n_lists = len(out.active)
        if num_items_in_batch is None:
            loss = out.loss / n_lists
        else:  # the ranks' gradients are averaged, so each gives its share times their number
            # For the type checker: of Trainer.
            loss = out.loss * self.accelerator.num_processes / num_items_in_batch  # type: ignore[attr-defined]
        if model.training:
            self._n_batches += 1
            for name, value in out.metrics.items():
                self._sums[name] = self._sums.get(name, 0) + value
        return (loss, {"loss": loss, "log_probs": out.log_probs}) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """Lists of an optimizer step, on all ranks."""
        n_lists = sum(len(batch["cu_lists"]) - 1 for batch in batch_samples)
        if not batch_samples:
            return None
        # For the type checker: of Trainer.
        return self.accelerator.gather(torch.tensor([n_lists], device=device)).sum()  # type: ignore[attr-defined]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._n_batches:
            logs = {name: (value / self._n_batches).item() for name, value in self._sums.items()} | logs
            self._sums, self._n_batches = {}, 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]  # of Trainer
