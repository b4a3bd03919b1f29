"""TRL's DPOTrainer for lists: the same arguments, data and names of settings, on `PerPOTrainer`.

What a user of DPOTrainer changes is the class, the config's class, and the columns of the data:

    ListDPOTrainer(model, args=ListDPOConfig("out", beta=0.1), train_dataset=lists, processing_class=processor)

TRL itself is not needed. A text model is fed a prompt that is a text as it stands, and the answer with the end of text
after it, as TRL does; prompts that are messages, and all prompts of a vision-language model, go through the chat
template. Records (`perpo.ListRecord`) are what they are for `PerPOTrainer`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from perpo.data.record import ListRecord
from perpo.integrations.trl_dpo_config import ListDPOConfig
from perpo.integrations.trl_rows import trl_lists
from perpo.model.adapters import has_trained_adapters
from perpo.model.language_head import causal_lm
from perpo.model.load import load_model, load_processor
from perpo.training.trainer import PerPOTrainer

logger = logging.get_logger(__name__)

# Renders a dialogue as the bare texts of its messages.
_AS_IT_STANDS = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


class ListDPOTrainer(PerPOTrainer):
    """`trl.DPOTrainer` for lists of scored answers, or for pairs.

    Args:
        model: a model, a PeftModel, or the name of one. ref_model: run at every step; None: the model as it is before
            training. args: `ListDPOConfig`. train_dataset, eval_dataset: see `perpo.integrations.trl_rows`; or records.
        processing_class: processor or tokenizer; None: that of the model's name. peft_config, callbacks, optimizers: as
            `PerPOTrainer`. data_collator, compute_metrics, quantization_config: not supported.

    Raises:
        TypeError, ValueError: an argument that is not supported or does not fit, by name, and what to do.
    """

    args: ListDPOConfig

    def __init__(
        self,
        model: nn.Module | str,
        ref_model: nn.Module | None = None,
        args: ListDPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: LoraConfig | None = None,
    ) -> None:
        if data_collator is not None:
            raise ValueError("data_collator: lists have one of their own; leave it out")
        if compute_metrics is not None:
            raise ValueError("compute_metrics: no logits are made that it could judge; use `perpo evaluate` on answers")
        if quantization_config is not None:
            raise ValueError("quantization_config: load the quantized model yourself and give it as model")
        for which, one, kinds in (
            ("model", model, (nn.Module, str)),
            ("ref_model", ref_model, (nn.Module, type(None))),
        ):
            if not isinstance(one, kinds):
                advice = "the name of one" if which == "model" else "None; ref_model_name_or_path takes a name"
                raise TypeError(f"{which} must be a model or {advice}, got {type(one).__name__}")
        name = model if isinstance(model, str) else str(getattr(causal_lm(model).config, "_name_or_path", ""))
        if args is None:
            args = ListDPOConfig(f"{name.rpartition('/')[2] or 'model'}-ListDPO")
        if not isinstance(args, ListDPOConfig):
            raise TypeError(
                f"args must be a ListDPOConfig, which has the names of DPOConfig; got {type(args).__name__}"
            )
        options = dict(args.model_init_kwargs) if isinstance(args.model_init_kwargs, dict) else {}
        if isinstance(model, str):
            model = load_model(model, **({"trust_remote_code": args.trust_remote_code} | options))
        elif options:
            raise ValueError(f"model_init_kwargs ({', '.join(options)}): the model is loaded already; leave it out")
        if processing_class is None:
            if not name:
                raise ValueError("processing_class: the model does not say where it comes from; give its processor")
            processing_class = load_processor(name, trust_remote_code=args.trust_remote_code)
        config = causal_lm(model).config.get_text_config()
        if hasattr(config, "output_router_logits") and args.router_aux_loss_coef is None:
            raise ValueError(
                f"router_aux_loss_coef: {type(causal_lm(model)).__name__} has experts, and their load-balancing loss, "
                "which TRL adds, is not computed here; set it to 0.0 to train without"
            )
        train_lists, train_plain = _as_records("train_dataset", train_dataset, args)
        eval_lists, eval_plain = _as_records("eval_dataset", eval_dataset, args)
        plain = {one for one in (train_plain, eval_plain) if one is not None}
        as_given = processing_class
        if getattr(processing_class, "image_processor", None) is None and True in plain:
            if False in plain:
                raise ValueError(
                    "eval_dataset: its prompts must be of the same kind as those of train_dataset: texts that are "
                    "fed as they stand, or messages (or records)"
                )
            processing_class = copy.deepcopy(processing_class)
            processing_class.chat_template = _AS_IT_STANDS
        ref_model = _choose_reference(model, ref_model, args, peft_config)
        super().__init__(
            model,
            args,
            train_lists,
            processing_class,
            eval_dataset=eval_lists,
            peft_config=peft_config,
            ref_model=ref_model,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.processing_class = self.callback_handler.processing_class = as_given  # saved with the model
        if args.disable_dropout:
            for one in (self.model, self.ref_model):
                _turn_off_dropout(one)


def _as_records(name: str, source: Any, args: ListDPOConfig) -> tuple[Sequence[ListRecord] | None, bool | None]:
    """The lists of a data set, and whether their prompts are texts to be fed as they stand. Records have none such."""
    if source is None:
        return None, None
    if isinstance(source, Sequence) and source and all(isinstance(one, ListRecord) for one in source):
        return list(source), False
    lists = trl_lists(name, source, args.image_root)
    return lists.records, lists.plain


def _choose_reference(
    model: nn.Module, ref_model: nn.Module | None, args: ListDPOConfig, peft_config: LoraConfig | None
) -> nn.Module | None:
    """Set `args.reference` where the user leaves it open; returns the second model, if one is run at every step."""
    if ref_model is not None and args.precompute_ref_log_probs:
        raise ValueError(
            "precompute_ref_log_probs=True is computed by the model as it is before training; leave out ref_model, or "
            "leave out precompute_ref_log_probs to run it at every step"
        )
    adapted = isinstance(model, PeftModel) or peft_config is not None
    by_name = args.reference_is_given and not args.precompute_ref_log_probs
    if not args.reference_is_given and args.list_objective.reference:
        sharded = bool(args.fsdp) or args.deepspeed is not None
        if ref_model is not None:
            args.reference = "model"
        elif adapted and (args.precompute_ref_log_probs is False or sharded):
            args.reference = "adapter_off"
        elif args.precompute_ref_log_probs is False:
            args.reference, ref_model = "model", copy.deepcopy(model)
        else:
            args.reference = "precomputed"
    if not by_name and args.reference in ("adapter_off", "precomputed") and has_trained_adapters(model):
        raise ValueError(
            "model: its adapters are trained already, and TRL takes them as they are for the reference, while here the "
            "reference is the model without them. Merge them (perpo.model.load.save_merged) and give peft_config for "
            f"new ones, or set reference={args.reference!r} if that is meant"
        )
    return ref_model


def _turn_off_dropout(model: nn.Module | None) -> None:
    layers = [] if model is None else [one for one in model.modules() if isinstance(one, nn.Dropout) and one.p]
    for layer in layers:
        layer.p = 0.0
    if layers:
        logger.warning(f"disable_dropout: {len(layers)} dropout layers are off, those of adapters included")
