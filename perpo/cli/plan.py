"""`perpo plan`: what a training step costs and what fits on a GPU, from a model's config alone.

perpo plan --model Qwen/Qwen2.5-VL-7B-Instruct --k 20 --prompt_tokens 1500 --response_tokens 40 --gpu_memory 80
perpo plan --config run.yaml --gpu_memory 80      # the file that `perpo train` gets
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from perpo.cli.settings import ModelConfig, given_settings
from perpo.cli.train import DataConfig
from perpo.model.adapters import base_of
from perpo.model.settings import check_place
from perpo.model.trainable import TrainableConfig
from perpo.training.config import PerPOConfig
from perpo.training.cost import ListShape, Planner, Training
from perpo_kernels.chunks import DEVICE_CHUNK_BYTES

GIB = 2**30
LEFT_OUT = (
    "Left out: workspaces of flash attention and cuBLAS, the CUDA context, memory lost between blocks, and the forward "
    "pass of\nthe vision tower. Gradients are counted as there all the time, as with accumulation and under DDP."
)
PROJECTOR = "What a trained projector keeps of an image for its backward pass is left out too."
GATHERED = (
    "What is gathered of several shards is FSDP2's: the weights of two layers and those outside of layers. ZeRO-3 "
    "gathers up\nto its stage3_max_live_parameters, 10⁹ unless set otherwise."
)

# Settings that the numbers take into account, and those without a part in what a step takes.
COUNTED = """
    model_name_or_path model_revision trust_remote_code dtype bf16 fp16 lora lora_r lora_dropout lora_target_modules
    train_projector train_vision_tower train_lm_head gradient_checkpointing per_device_train_batch_size
    max_candidates max_chunk_bytes max_prompt_length max_response_length max_length prefix_sharing objective
    degree_weight degree_levels reference ref_model_name_or_path fsdp deepspeed
"""
WITHOUT_PART = """
    adam_* beta data_seed dataloader_* ddp_* disable_tqdm do_* drop_inactive eval_* fsdp_config gamma
    gradient_accumulation_steps greater_is_better hub_* image_root learning_rate load_best_model_at_end log_* logging_*
    lora_alpha lr_* max_grad_norm max_steps metric_for_best_model min_candidates num_train_epochs objective_options
    output_dir processor_options project push_to_hub ref_model_weights reference_cache_dir remove_unused_columns
    report_to resume_from_checkpoint run_name save_* seed skip_bad tf32 trackio_* train_file use_cpu warmup_*
    weight_decay
"""


@dataclass
class PlanConfig:
    """The lists, and the GPU. Everything else is as `perpo train` would have it, from the same file."""

    k: int = field(default=20, metadata={"help": "Answers to a prompt."})
    prompt_tokens: int = field(default=1000, metadata={"help": "Tokens of image and question."})
    response_tokens: int = field(default=30, metadata={"help": "Tokens of an answer."})
    shards: int = field(default=1, metadata={"help": "GPUs that weights and optimizer are spread over (ZeRO-3, FSDP)."})
    gpu_memory: float | None = field(default=None, metadata={"help": "GiB of a GPU: how many lists fit?"})
    tflops: float | None = field(
        default=None,
        metadata={"help": "What your GPU sustains in such a model, in 10¹² operations a second: how long?"},
    )

    def __post_init__(self) -> None:
        for name in ("k", "prompt_tokens", "response_tokens", "shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be ≥ 1, got {getattr(self, name)}")


@dataclass
class PlannedData(DataConfig):
    """As `perpo train` has it, but no lists are read, so none need be there."""

    train_file: str | None = field(  # type: ignore[assignment]  # wider than in its base, on purpose
        default=None, metadata={"help": "Not read; so that the file of `perpo train` can be given as it is."}
    )


@dataclass
class PlannedRun(PerPOConfig):
    """As `perpo train` has it, on a machine that may have neither a GPU nor DeepSpeed."""

    def __post_init__(self) -> None:
        given: Any = self
        self.sharding = "deepspeed" if given.deepspeed else "fsdp" if given.fsdp else ""
        given.deepspeed = given.fsdp = None
        self.use_cpu = True
        super().__post_init__()


SETTINGS = (PlanConfig, ModelConfig, TrainableConfig, PlannedRun, PlannedData)


def run(
    options: PlanConfig, model: ModelConfig, trainable: TrainableConfig, args: PlannedRun, data: PlannedData
) -> None:
    print(report(options, model, trainable, args, not_counted(model, trainable, args, data)))


def report(
    options: PlanConfig, model: ModelConfig, trainable: TrainableConfig, args: PlannedRun, ignored: Sequence[str] = ()
) -> str:
    """Side by side: image and prompt once a list, and once a candidate.

    Args:
        ignored: settings that the numbers do not take into account, to be said.
    """
    planned = planner(options, model, trainable, args)
    k = options.k if args.max_candidates is None else min(options.k, args.max_candidates)
    shared = ListShape(options.prompt_tokens, options.response_tokens, k, args.per_device_train_batch_size)
    both = (shared, dataclasses.replace(shared, shared=False))
    memories = [planned.memory(lists) for lists in both]
    rows = [
        ("", "prompt shared", "not shared"),
        ("tokens", *(f"{lists.layout.n_tokens:,}" for lists in both)),
        ("operations (10¹²)", *(f"{planned.operations(lists) / 1e12:,.1f}" for lists in both)),
        *((f"{name} (GiB)", *(f"{memory[name] / GIB:.1f}" for memory in memories)) for name in memories[0]),
        ("in all (GiB)", *(f"{sum(memory.values()) / GIB:.1f}" for memory in memories)),
    ]
    if len(planned.reference_bytes) > 1:
        rows.append(("before it (GiB)", *(f"{planned.before_training(lists) / GIB:.1f}" for lists in both)))
    if options.tflops is not None:
        rows.append(("seconds", *(f"{planned.operations(lists) / options.tflops / 1e12:.2f}" for lists in both)))
    if options.gpu_memory is not None:
        fit = (planned.fitting(lists, options.gpu_memory * GIB) for lists in both)
        rows.append((f"lists in {options.gpu_memory:g} GiB", *map(str, fit)))
    kind = str(planned.training.dtype).removeprefix("torch.")
    head = (
        f"{model.model_name_or_path}: {planned.parameters / 1e9:.2f} billion parameters in {kind}, "
        f"{planned.trained / 1e6:.1f} million trained\none forward and backward pass of {shared.n} × {k} answers of "
        f"{options.response_tokens} tokens to {options.prompt_tokens}"
    )
    table = [f"{name:<22}{a:>15}{b:>15}" for name, a, b in rows]
    return "\n".join([head, "", *table, "", *_remarks(planned, trainable, ignored)])


def not_counted(*settings: Any) -> list[str]:
    """Settings of `perpo train` that were given and may change what a step takes, but not the numbers here."""
    found = []
    for one in settings:
        default = {f.name: f.default for f in dataclasses.fields(one)}
        for name in sorted(given_settings(one)):
            known = any(fnmatchcase(name, pattern) for pattern in (*COUNTED.split(), *WITHOUT_PART.split()))
            if not known and getattr(one, name) != default[name]:
                value = getattr(one, name)
                found.append(f"{name}={getattr(value, 'value', value)}")  # of an Enum, as it is written
    return found


def _remarks(planned: Planner, trainable: TrainableConfig, ignored: Sequence[str]) -> list[str]:
    lines = []
    if len(planned.reference_bytes) > 1:
        lines.append(
            f"Before it: the {len(planned.reference_bytes)} reference models are run one after another, each beside "
            "the model, on one list."
        )
    lines.append(LEFT_OUT)
    if trainable.train_projector:
        lines.append(PROJECTOR)
    if planned.training.shards > 1:
        lines.append(GATHERED)
    if ignored:
        lines.append(f"Set, but not counted: {', '.join(ignored)}.")
    return lines


def planner(options: PlanConfig, model: ModelConfig, trainable: TrainableConfig, args: PlannedRun) -> Planner:
    _check(options, args)
    names = args.ref_model_name_or_path or []
    config = _config(model.model_name_or_path, model)
    dtype = _dtype(model, config, args)
    training = Training(
        trainable,
        gradient_checkpointing=bool(args.gradient_checkpointing),
        dtype=dtype,
        max_chunk_bytes=args.max_chunk_bytes or DEVICE_CHUNK_BYTES,
        shards=options.shards,
        degree_levels=args.degree_levels or 0,
        references=[_config((base_of(name) or (name, None))[0], model) for name in names],
    )
    return Planner(config, training)


def _config(name: str, model: ModelConfig) -> PreTrainedConfig:
    check_place(name)
    revision = model.model_revision if name == model.model_name_or_path else None
    return AutoConfig.from_pretrained(name, trust_remote_code=model.trust_remote_code, revision=revision)


def _dtype(model: ModelConfig, config: PreTrainedConfig, args: PlannedRun) -> torch.dtype:
    """Of weights and activations: those that are not fp32 are trained in mixed precision."""
    given = getattr(torch, model.dtype) if model.dtype != "auto" else getattr(config, "dtype", None) or torch.bfloat16
    if given == torch.float32 and (args.bf16 or args.fp16):
        raise ValueError("dtype: weights in fp32 with products in 16 bits are not planned; set dtype='bfloat16'")
    return given


def _check(options: PlanConfig, args: PlannedRun) -> None:
    """Raises:
    ValueError: the numbers would be wrong, or `perpo train` would refuse these settings."""
    if args.list_objective.pairs == "given":
        raise ValueError(
            f"objective={args.objective!r} also feeds answers under a corrupted image, which are not counted; plan "
            "another objective, and twice the lists for a rough number"
        )
    limits = {"max_prompt_length": options.prompt_tokens, "max_response_length": options.response_tokens}
    limits["max_length"] = options.prompt_tokens + options.response_tokens
    for name, n in limits.items():
        limit = getattr(args, name)
        if limit is not None and n > limit:
            raise ValueError(f"{name}={limit} is less than the {n} tokens that are planned; raise it, or plan fewer")
    if args.sharding and options.shards == 1:
        raise ValueError(f"{args.sharding} spreads weights over GPUs; say over how many with --shards")
    several = len(args.ref_model_name_or_path or []) > 1
    if options.shards > 1 and (several or args.degree_weight):
        what = "several reference models" if several else "degree_weight > 0"
        raise ValueError(f"shards={options.shards}: {what} is not supported under FSDP and DeepSpeed")
