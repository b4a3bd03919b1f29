"""`perpo plan`: what a training step costs and what fits on a GPU, from a model's config alone.

perpo plan --model Qwen/Qwen2.5-VL-7B-Instruct --k 20 --prompt_tokens 1500 --response_tokens 40 --gpu_memory 80
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from transformers import AutoConfig

from perpo.model.settings import check_place
from perpo.training.cost import ListShape, Planner, Training

GIB = 2**30
LEFT_OUT = (
    "Left out: workspaces of flash attention and cuBLAS, the CUDA context, memory lost between blocks, and the forward "
    "pass of\nthe vision tower. Gradients are counted as there all the time, as with accumulation and under DDP."
)


@dataclass
class PlanConfig:
    """A model, lists of one size, and how it is trained."""

    model: str = field(metadata={"help": "Folder or hub name; only its config.json is read."})
    k: int = field(default=20, metadata={"help": "Answers to a prompt."})
    prompt_tokens: int = field(default=1000, metadata={"help": "Tokens of image and question."})
    response_tokens: int = field(default=30, metadata={"help": "Tokens of an answer."})
    lists: int = field(default=1, metadata={"help": "Lists in a forward pass: per_device_train_batch_size."})
    lora_r: int = field(default=128, metadata={"help": "Rank of the adapters; 0: the whole language model is trained."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Run layers again in the backward pass."})
    dtype: str = field(
        default="bfloat16",
        metadata={
            "help": "Of weights and activations; bfloat16: what is trained is in fp32, as `perpo train` has it.",
            "choices": ["bfloat16", "float32"],
        },
    )
    shards: int = field(default=1, metadata={"help": "GPUs that weights and optimizer are spread over (ZeRO-3, FSDP)."})
    gpu_memory: float | None = field(default=None, metadata={"help": "GiB of a GPU: how many lists fit?"})
    tflops: float | None = field(
        default=None,
        metadata={"help": "What your GPU sustains in such a model, in 10¹² operations a second: how long?"},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code that comes with the model."})

    def __post_init__(self) -> None:
        for name in ("k", "prompt_tokens", "response_tokens", "lists", "shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be ≥ 1, got {getattr(self, name)}")
        if self.lora_r < 0:
            raise ValueError(f"lora_r must be ≥ 0, got {self.lora_r}")


SETTINGS = (PlanConfig,)


def run(options: PlanConfig) -> None:
    print(report(options))


def report(options: PlanConfig) -> str:
    """Side by side: image and prompt once a list, and once a candidate."""
    check_place(options.model)
    config = AutoConfig.from_pretrained(options.model, trust_remote_code=options.trust_remote_code)
    training = Training(
        lora_r=options.lora_r,
        gradient_checkpointing=options.gradient_checkpointing,
        dtype=getattr(torch, options.dtype),
        shards=options.shards,
    )
    planner = Planner(config, training)
    shared = ListShape(options.prompt_tokens, options.response_tokens, options.k, options.lists)
    both = (shared, dataclasses.replace(shared, shared=False))
    memories = [planner.memory(lists) for lists in both]
    rows = [
        ("", "prompt shared", "not shared"),
        ("tokens", *(f"{lists.layout.n_tokens:,}" for lists in both)),
        ("operations (10¹²)", *(f"{planner.operations(lists) / 1e12:,.1f}" for lists in both)),
        *((f"{name} (GiB)", *(f"{memory[name] / GIB:.1f}" for memory in memories)) for name in memories[0]),
        ("in all (GiB)", *(f"{sum(memory.values()) / GIB:.1f}" for memory in memories)),
    ]
    if options.tflops is not None:
        rows.append(("seconds", *(f"{planner.operations(lists) / options.tflops / 1e12:.2f}" for lists in both)))
    if options.gpu_memory is not None:
        fit = (planner.fitting(lists, options.gpu_memory * GIB) for lists in both)
        rows.append((f"lists in {options.gpu_memory:g} GiB", *map(str, fit)))
    head = (
        f"{options.model}: {planner.parameters / 1e9:.2f} billion parameters, {planner.trained / 1e6:.1f} million "
        f"trained\none forward and backward pass of {options.lists} × {options.k} answers of "
        f"{options.response_tokens} tokens to {options.prompt_tokens}"
    )
    return "\n".join([head, "", *(f"{name:<22}{a:>15}{b:>15}" for name, a, b in rows), "", LEFT_OUT])
