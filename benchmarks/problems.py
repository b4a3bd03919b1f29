"""The shapes that are measured and random inputs of those shapes.

Shapes follow the published recipes. A list is k candidates of R response tokens; T = lists · k · R tokens reach
the head. Grounding answers are some 25 tokens, k = 20; an OCR page is some 800, k = 5. Heads: LLaVA-1.5-7B,
Qwen2.5-VL-7B, Gemma-3-4B: small, large and largest vocabulary in use. On the CPU a laptop's worth: the LLaVA
vocabulary with a narrow model.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    name: str
    n_vocab: int
    n_hidden: int


class Lists(NamedTuple):
    n_lists: int
    k: int
    n_response: int  # tokens of each candidate

    @property
    def n_tokens(self) -> int:
        return self.n_lists * self.k * self.n_response


TINY_HEADS = [Head("tiny", 256, 32)]
CPU_HEADS = [Head("laptop", 32000, 1024)]
GPU_HEADS = [Head("llava-1.5-7b", 32000, 4096), Head("qwen2.5-vl-7b", 152064, 3584), Head("gemma-3-4b", 262208, 2560)]

TINY_LISTS = [Lists(2, 4, 8)]
CPU_LISTS = [Lists(2, 20, 40)]  # T 1600: two prompts a device, as published
GPU_LISTS = [Lists(1, 20, 25), Lists(2, 20, 100), Lists(4, 5, 800)]  # T 500, 4000, 16000

# (T, V, H) of the memory curves: one over T, one over V. H is narrow on the CPU: it does not change what is asked.
MEMORY_POINTS = {
    "tiny": [(160, 256, 16)],
    "cpu": [
        (400, 32000, 64),
        (1600, 32000, 64),
        (3200, 32000, 64),
        (6400, 32000, 64),
        (1600, 8000, 64),
        (1600, 128000, 64),
    ],
    "gpu": [
        (800, 152064, 3584),
        (1600, 152064, 3584),
        (8000, 152064, 3584),
        (16000, 152064, 3584),
        (8000, 32000, 3584),
        (8000, 262208, 3584),
    ],
}


class Setting(NamedTuple):
    """Where a benchmark runs and how big it is."""

    device: str
    size: str  # tiny, cpu or gpu

    @staticmethod
    def of(size: str = "auto") -> "Setting":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return Setting(device, ("gpu" if device == "cuda" else "cpu") if size == "auto" else size)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.size == "gpu" else torch.float32

    @property
    def heads(self) -> list[Head]:
        return {"tiny": TINY_HEADS, "cpu": CPU_HEADS, "gpu": GPU_HEADS}[self.size]

    @property
    def lists(self) -> list[Lists]:
        return {"tiny": TINY_LISTS, "cpu": CPU_LISTS, "gpu": GPU_LISTS}[self.size]

    @property
    def points(self) -> list[tuple[Head, Lists]]:
        """Shapes of the memory curves: lists of 20 with 80 tokens a candidate (fewer in tiny ones)."""
        curve = []
        for n_tokens, n_vocab, n_hidden in MEMORY_POINTS[self.size]:
            n_lists = max(1, n_tokens // 1600)
            head = Head(f"V{n_vocab}", n_vocab, n_hidden)
            curve.append((head, Lists(n_lists, 20, n_tokens // (20 * n_lists))))
        return curve


class Problem(NamedTuple):
    """One batch for the fused linear loss."""

    hidden: Tensor  # [T, H], requires grad
    weight: Tensor  # [V, H]
    labels: Tensor  # [T]
    rewards: Tensor  # [S]
    ref_log_probs: Tensor  # [S]
    cu_seqlens: Tensor  # int32 [S + 1], on the CPU: the collator made it there
    cu_lists: Tensor  # int32 [G + 1], likewise
    lists: Lists


def problem(head: Head, lists: Lists, setting: Setting, trainable_head: bool = False) -> Problem:
    n_candidates = lists.n_lists * lists.k
    device, dtype = setting.device, setting.dtype
    # logits of unit variance or so, as a trained head gives; log-probs around −log V
    weight = torch.randn(head.n_vocab, head.n_hidden, device=device, dtype=dtype).mul_(head.n_hidden**-0.5)
    return Problem(
        hidden=torch.randn(lists.n_tokens, head.n_hidden, device=device, dtype=dtype).requires_grad_(),
        weight=weight.requires_grad_(trainable_head),
        labels=torch.randint(head.n_vocab, (lists.n_tokens,), device=device),
        rewards=torch.rand(n_candidates, device=device),
        ref_log_probs=-lists.n_response * torch.rand(n_candidates, device=device).add_(10.0),
        cu_seqlens=torch.arange(n_candidates + 1, dtype=torch.int32) * lists.n_response,
        cu_lists=torch.arange(lists.n_lists + 1, dtype=torch.int32) * lists.k,
        lists=lists,
    )


def shapes(head: Head, lists: Lists) -> dict[str, int | str]:
    """For the row."""
    return {
        "model": head.name,
        "T": lists.n_tokens,
        "H": head.n_hidden,
        "V": head.n_vocab,
        "lists": lists.n_lists,
        "k": lists.k,
    }
