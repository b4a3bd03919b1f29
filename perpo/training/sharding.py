"""What spreads a model over processes: FSDP2 or DeepSpeed ZeRO-3, and that it does so where it was asked for."""

from __future__ import annotations

import copy
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.utils import logging

logger = logging.get_logger(__name__)

DEEPSPEED, FSDP, NOTHING = "DeepSpeed", "FSDP", "whole weights in every process"
LAUNCHED = "ACCELERATE_USE_FSDP"


def check_deepspeed(args: Any) -> None:
    """Before transformers reads the setting.

    Raises:
        ValueError: it is set, and DeepSpeed is not installed.
    """
    if args.deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            f"deepspeed={args.deepspeed!r}: the package is not installed; `pip install deepspeed`, or share the "
            "weights with --fsdp full_shard, which needs no other package"
        )


def join_deepspeed(args: Any) -> None:
    """Tell DeepSpeed of the processes that accelerate has joined on CPUs; on devices it joins them itself. Otherwise
    each process takes itself for the only one."""
    if args.deepspeed and args.device.type == "cpu" and torch.distributed.is_initialized():
        import deepspeed

        deepspeed.init_distributed(auto_mpi_discovery=False)


def shard_as_asked(trainer: Any) -> None:
    """What accelerate leaves out of the settings of FSDP, or gets wrong. Called as soon as there is an accelerator.

    accelerate shards on devices alone, and drops the setting without a word where processes train on CPUs. And what
    transformers says that a model is made of names classes of all towers that the family might have, of which each
    must be found.

    Raises:
        ValueError: `args.fsdp` is set, and nothing would be sharded.
    """
    args, state = trainer.args, trainer.accelerator.state
    launched = os.environ.get(LAUNCHED) == "true"  # by `accelerate launch`, or by the plugin that was asked for here
    if getattr(state, "fsdp_plugin", None) is None:
        if not args.fsdp and not launched:
            return
        if state.distributed_type != DistributedType.MULTI_CPU:
            os.environ.pop(LAUNCHED, None)
            raise ValueError(
                "fsdp: there is no group of processes to share the weights, and accelerate would leave the setting "
                "out; start with `torchrun --nproc-per-node N -m perpo train …`, or leave fsdp out"
            )
        plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
        if state.mixed_precision != "no":
            plugin.set_mixed_precision(state.mixed_precision)
        state.fsdp_plugin, state.distributed_type = plugin, DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        trainer.is_fsdp_enabled = True
    plugin = state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is None:
        there = {type(module).__name__ for module in trainer.model.modules()}
        named = getattr(trainer.model, "_no_split_modules", None) or ()
        plugin.transformer_cls_names_to_wrap = sorted(there.intersection(named))


def without_training(model: nn.Module, accelerator: Any) -> nn.Module:
    """A second model, which is not trained, as the first is prepared: sharded if that is."""
    if accelerator.is_fsdp2:
        return fsdp2_prepare_model(accelerator, model).eval()
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return accelerator.prepare_model(model, evaluation_mode=True).eval()
    import deepspeed

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    for name in ("optimizer", "scheduler"):  # of the model that is trained
        config.pop(name, None)
    if config.get("zero_optimization", {}).get("stage") != 3:
        config["zero_optimization"] = {"stage": 0}
    prepared, *_ = deepspeed.initialize(model=model, config=config)
    prepared.eval()  # returns nothing
    return prepared


def reshard(model: nn.Module) -> None:
    """After passes without a backward pass: FSDP2 keeps some weights whole until then, and no checkpoint fits them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def weights_come_from_first(accelerator: Any) -> bool:
    """Whether the other processes hold no weights yet before the model is sharded."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return plugin is not None and bool(plugin.cpu_ram_efficient_loading)


def engine(trainer: Any) -> str:
    """What shards a trainer's model."""
    if trainer.is_deepspeed_enabled:
        return DEEPSPEED
    return FSDP if trainer.is_fsdp_enabled else NOTHING


def check_checkpoint(trainer: Any, checkpoint: Path) -> None:
    """That what shards the model now can read a checkpoint, and a word where another number of processes reads it.

    Raises:
        ValueError: it cannot.
    """
    n_now, now = trainer.args.world_size, engine(trainer)
    parts = [path for path in checkpoint.glob("global_step*/*_optim_states.pt") if "zero_pp_rank" in path.name]
    written = NOTHING
    if any(checkpoint.glob("global_step*")):
        written = DEEPSPEED
    elif any(checkpoint.glob("pytorch_model_fsdp*")):
        written = FSDP
    if written != now:
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} was written with {written}, and this run has {now}, which keeps its "
            f"states in other files; resume with {written}, on any number of processes that it takes"
        )
    n_then = len(parts) or len(list(checkpoint.glob("rng_state*.pth"))) or n_now
    if n_then == n_now:
        return
    if parts:
        raise ValueError(
            f"resume_from_checkpoint: {checkpoint} was written by {n_then} processes with DeepSpeed, which cannot "
            f"spread it over {n_now}; resume on {n_then}, or train with FSDP, whose checkpoints any number of "
            "processes reads"
        )
    if trainer.is_world_process_zero():
        logger.warning(
            f"{checkpoint} was written by {n_then} processes and is resumed by {n_now}: with the same lists in every "
            "step, while what each draws at random (dropout) is drawn otherwise than in a run that was not interrupted"
        )
