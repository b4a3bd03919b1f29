"""The shapes that are measured and random inputs of those shapes.

Shapes follow the published recipes. A list is k candidates of R response tokens; T = lists · k · R tokens reach
the head. Grounding answers are some 25 tokens, k = 20; an OCR page is some 800, k = 5. Image and prompt: LLaVA-1.5's
576 tokens, Qwen2.5-VL's 1500 at its usual size, LLaVA-NeXT's and LLaVA-OneVision's 2900, and a page whose answers are
as long as its prompt. Heads: LLaVA-1.5-7B,
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


class Prefix(NamedTuple):
    """One list: k answers of R tokens to a prompt of P tokens, image included."""

    n_prompt: int
    n_response: int
    k: int

    def __str__(self) -> str:
        return f"P{self.n_prompt} R{self.n_response} k{self.k}"

    @property
    def packed(self) -> int:
        """Tokens where the prompt stands once."""
        return self.n_prompt + self.k * self.n_response

    @property
    def separate(self) -> int:
        """Tokens of a row for every answer."""
        return self.k * (self.n_prompt + self.n_response)

    @property
    def ideal(self) -> float:
        """k (P + R) / (P + k R): how much sharing would save if all of a step went by tokens."""
        return self.separate / self.packed

    @property
    def packed_pairs(self) -> int:
        """Of a query and a key that it sees."""
        p, r, k = self.n_prompt, self.n_response, self.k
        return p * (p + 1) // 2 + k * r * p + k * r * (r + 1) // 2

    @property
    def separate_pairs(self) -> int:
        n = self.n_prompt + self.n_response
        return self.k * n * (n + 1) // 2


TINY_HEADS = [Head("tiny", 256, 32)]
CPU_HEADS = [Head("laptop", 32000, 1024)]
GPU_HEADS = [Head("llava-1.5-7b", 32000, 4096), Head("qwen2.5-vl-7b", 152064, 3584), Head("gemma-3-4b", 262208, 2560)]

TINY_LISTS = [Lists(2, 4, 8)]
CPU_LISTS = [Lists(2, 20, 40)]  # T 1600: two prompts a device, as published
GPU_LISTS = [Lists(1, 20, 25), Lists(2, 20, 100), Lists(4, 5, 800)]  # T 500, 4000, 16000

TINY_PREFIXES = [Prefix(40, 4, 4)]
PREFIXES = [Prefix(576, 24, 20), Prefix(1500, 40, 20), Prefix(600, 500, 8), Prefix(2900, 24, 20)]


class Point(NamedTuple):
    """One point of a memory curve, over T, V or k."""

    curve: str
    head: Head
    lists: Lists


def memory_points(vocabs: list[int], n_hidden: int, lists: list[Lists], ks: list[int], n_response: int) -> list[Point]:
    """Over T and k at the first V; over V at the second T."""

    def head(n_vocab: int) -> Head:
        return Head(f"V{n_vocab}", n_vocab, n_hidden)

    return [
        *[Point("T", head(vocabs[0]), of_t) for of_t in lists],
        *[Point("V", head(n_vocab), lists[min(1, len(lists) - 1)]) for n_vocab in vocabs],
        *[Point("k", head(vocabs[0]), Lists(1, k, n_response)) for k in ks],
    ]


# H is narrow on the CPU: it does not change what is asked.
MEMORY_POINTS = {
    "tiny": memory_points([256], 16, [Lists(1, 20, 8)], [4], 8),
    "cpu": memory_points([32000, 8000, 64000], 64, [Lists(n, 20, 20) for n in (1, 4, 8)], [5, 20, 80], 40),
    "gpu": memory_points(
        [152064, 32000, 262208], 3584, [Lists(n, 20, 80) for n in (1, 2, 5, 10)], [5, 20, 80, 200], 80
    ),
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
    def prefixes(self) -> list[Prefix]:
        return TINY_PREFIXES if self.size == "tiny" else PREFIXES

    @property
    def points(self) -> list[Point]:
        return MEMORY_POINTS[self.size]


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
