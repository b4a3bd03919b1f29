"""Device memory of a training step, counted: every storage on CUDA while it lives, as large as the allocator makes it.

Not counted is what no tensor shows: workspaces inside operators (flash attention, cuBLAS), the CUDA context, and
memory lost between blocks.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

import perpo_kernels as pk
from perpo.model import sharing
from perpo.model.language_head import LanguageHead, accept_rows, causal_lm
from perpo.model.trainable import keep_in_fp32
from perpo.training.activations import LiveStorages
from perpo.training.cost import ListShape, Training
from tests.fake_gpu.device import FakeGpu, fake_gpu, move

GIB = 2**30
LISTS = ListShape(prompt_tokens=1500, response_tokens=40, k=20)


class StorageCount(FakeGpu):
    def __init__(self) -> None:
        super().__init__()
        self.live = LiveStorages()

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.device.type == "cuda":
                self.live.add(x)


class Counted(NamedTuple):
    """Bytes."""

    fixed: int  # weights and moments
    kept: int  # of the forward pass, for the backward pass
    first: int  # peak of a pass without gradients there before
    further: int  # of one that adds to gradients
    optimizer: int  # peak of the optimizer's step


def qwen(n_layers: int) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-7B with as many layers, 28 being its own; a shorter one has a short vision tower too."""
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    }
    vision = {
        "depth": 32 if n_layers == 28 else 1,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    }
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


def count_step(config: Any, training: Training, lists: ListShape) -> Counted:
    """The second step of LoRA training in bf16, as `PerPOTrainer` does it, on tokens alone."""
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        model = get_peft_model(model, training.trainable.apply(model).peft_config)
    keep_in_fp32(model)
    accept_rows(model)
    sharing.prepare(model, "on")
    model.train()
    if training.gradient_checkpointing:
        causal_lm(model).gradient_checkpointing_enable({"use_reentrant": False})
    count = StorageCount()
    live = count.live
    with fake_gpu(count):
        move(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        fixed = live.now
        peaks = []
        for _ in range(2):
            live.peak = live.now
            loss = forward(model, lists)
            kept = live.now
            loss.backward()
            peaks.append(live.peak)
            del loss
        gradients = sum(parameter.nbytes for parameter in trained)
        live.peak = live.now
        optimizer.step()
        return Counted(fixed, kept - fixed - gradients, *peaks, live.peak)


def forward(model: Any, lists: ListShape) -> Tensor:
    new = partial(torch.empty, device="cuda")
    n, n_responses = lists.layout.n_tokens, lists.k * lists.response_tokens
    rows = 1 if lists.shared else lists.k
    inputs = {
        "input_ids": new(rows, n // rows, dtype=torch.int64),
        "position_ids": new(3, rows, n // rows, dtype=torch.int64),
        "response_rows": new(n_responses, dtype=torch.int64),
        "prefix_layout": lists.layout.map(lambda x: x.to("cuda", non_blocking=True)) if lists.shared else None,
    }

    def loss(hidden: Tensor, head: LanguageHead) -> Any:
        return pk.linear_perpo_loss(
            hidden,
            head.weight,
            new(n_responses, dtype=torch.int64),
            new(lists.k),
            cu_seqlens=pk.layout.cumulative([lists.response_tokens] * lists.k),
            cu_lists=pk.layout.cumulative([lists.k]),
            ref_log_probs=new(lists.k),
        )

    with torch.autocast("cuda", dtype=torch.bfloat16):
        return model(**inputs, head_call=loss).loss
