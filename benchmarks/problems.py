"""The shapes that are measured and random inputs of those shapes.

Shapes follow the published recipes. A list is k candidates of R response tokens; T = lists · k · R tokens reach
the head. Grounding answers are some 25 tokens, k = 20; an OCR page is some 800, k = 5. Image and prompt: LLaVA-1.5's
576 tokens, Qwen2.5-VL's 1500 at its usual size, LLaVA-NeXT's and LLaVA-OneVision's 2900, and a page whose answers are
as long as its prompt. Heads: LLaVA-1.5-7B,
Qwen2.5-VL-7B, Gemma-3-4B: small, large and largest vocabulary in use. On the CPU a laptop's worth: the LLaVA
vocabulary with a narrow model, one list, the grounding prompt and a small page; `--full` adds more tokens, a wider
model and the other prompts.

Logits are peaked as a trained model's are, not of unit variance: the label's log-prob is −1 on average, since answers
are sampled from the model. It changes no dense product, but a peer that leaves small probabilities out of its backward
(Apple's filter) would find nothing but small ones in unit-variance logits of a large vocabulary.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class HeadShape(NamedTuple):
    name: str
    n_vocab: int
    n_hidden: int


class ListShape(NamedTuple):
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


TINY_HEADS = [HeadShape("tiny", 256, 32)]
CPU_HEADS = [HeadShape("laptop", 32000, 512)]
CPU_FULL_HEADS = [HeadShape("laptop-wide", 32000, 1024)]
GPU_HEADS = [
    HeadShape("llava-1.5-7b", 32000, 4096),
    HeadShape("qwen2.5-vl-7b", 152064, 3584),
    HeadShape("gemma-3-4b", 262208, 2560),
]

TINY_LISTS = [ListShape(2, 4, 8)]
CPU_LISTS = [ListShape(1, 20, 40)]  # T 800
CPU_FULL_LISTS = [
    ListShape(2, 20, 40),
    ListShape(4, 20, 40),
]  # T 1600: two prompts a device, as published; and twice that
GPU_LISTS = [ListShape(1, 20, 25), ListShape(2, 20, 100), ListShape(4, 5, 800)]  # T 500, 4000, 16000

TINY_PREFIXES = [Prefix(40, 4, 4)]
CPU_PREFIXES = [Prefix(576, 24, 20), Prefix(300, 250, 8)]
PREFIXES = [Prefix(576, 24, 20), Prefix(1500, 40, 20), Prefix(600, 500, 8), Prefix(2900, 24, 20)]


class Point(NamedTuple):
    """One point of a memory curve, over T, V or k."""

    curve: str
    head: HeadShape
    lists: ListShape


def memory_points(
    vocabs: list[int], n_hidden: int, ts: list[ListShape], over_v: ListShape, ks: list[int], n_response: int
) -> list[Point]:
    """Over T and k at the first V; over V at `over_v`."""

    def head(n_vocab: int) -> HeadShape:
        return HeadShape(f"V{n_vocab}", n_vocab, n_hidden)

    return [
        *[Point("T", head(vocabs[0]), lists) for lists in ts],
        *[Point("V", head(n_vocab), over_v) for n_vocab in vocabs],
        *[Point("k", head(vocabs[0]), ListShape(1, k, n_response)) for k in ks],
    ]


# On the CPU T passes the 819 rows of V 32000 that fill a chunk of ours, V the 32768 from which TRL works in chunks.
MEMORY_POINTS = {
    "tiny": memory_points([256], 16, [ListShape(1, 20, 8)], ListShape(1, 20, 8), [4], 8),
    "cpu": memory_points(
        [32000, 131072], 1024, [ListShape(n, 20, 10) for n in (1, 3, 6)], ListShape(1, 20, 10), [5, 20, 80], 5
    ),
    "full": memory_points(
        [32000, 65536, 131072],
        1024,
        [ListShape(n, 20, 20) for n in (1, 2, 4, 8)],
        ListShape(1, 20, 20),
        [5, 20, 80],
        20,
    ),
    "gpu": memory_points(
        [152064, 32000, 262208],
        3584,
        [ListShape(n, 20, 80) for n in (1, 2, 5, 10)],
        ListShape(2, 20, 80),
        [5, 20, 80, 200],
        80,
    ),
}


class Setting(NamedTuple):
    """Where a benchmark runs and how big it is."""

    device: str
    size: str  # tiny, cpu or gpu
    full: bool = False  # on the CPU: the larger shapes too

    @staticmethod
    def of(size: str = "auto", full: bool = False) -> "Setting":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        size = ("gpu" if device == "cuda" else "cpu") if size == "auto" else size
        return Setting(device, size, full and size == "cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.size == "gpu" else torch.float32

    @property
    def scale(self) -> str:
        return "full" if self.full else self.size

    @property
    def heads(self) -> list[HeadShape]:
        return {"tiny": TINY_HEADS, "cpu": CPU_HEADS, "full": CPU_FULL_HEADS, "gpu": GPU_HEADS}[self.scale]

    @property
    def lists(self) -> list[ListShape]:
        return {"tiny": TINY_LISTS, "cpu": CPU_LISTS, "full": CPU_FULL_LISTS, "gpu": GPU_LISTS}[self.scale]

    @property
    def prefixes(self) -> list[Prefix]:
        return {"tiny": TINY_PREFIXES, "cpu": CPU_PREFIXES, "full": PREFIXES, "gpu": PREFIXES}[self.scale]

    @property
    def points(self) -> list[Point]:
        return MEMORY_POINTS[self.scale]


class Problem(NamedTuple):
    """One batch for the fused linear loss."""

    hidden: Tensor  # [T, H], requires grad
    weight: Tensor  # [V, H]
    labels: Tensor  # [T]
    rewards: Tensor  # [S]
    ref_log_probs: Tensor  # [S]
    cu_seqlens: Tensor  # int32 [S + 1], on the CPU: the collator made it there
    cu_lists: Tensor  # int32 [G + 1], likewise
    lists: ListShape


def peak(head: HeadShape) -> float:
    """How much of its label's weight row a hidden state holds for the label's log-prob to be about −1."""
    unit = math.log(head.n_vocab) + 0.2  # log Σ exp of the others is log V + ½; −0.3 for the spread of the label's own
    return unit + unit**2 / (2 * head.n_hidden)  # the others' variance grows with it


def problem(
    head: HeadShape, lists: ListShape, setting: Setting, trainable_head: bool = False, unit_variance: bool = False
) -> Problem:
    """Peaked logits, or with `unit_variance` those of a model that knows nothing: log-probs around −log V."""
    n_candidates = lists.n_lists * lists.k
    device, dtype = setting.device, setting.dtype
    weight = torch.randn(head.n_vocab, head.n_hidden, device=device, dtype=dtype).mul_(head.n_hidden**-0.5)
    hidden = torch.randn(lists.n_tokens, head.n_hidden, device=device, dtype=dtype)
    labels = torch.randint(head.n_vocab, (lists.n_tokens,), device=device)
    if not unit_variance:
        hidden.add_(weight[labels], alpha=peak(head))
    a_token = math.log(head.n_vocab) if unit_variance else 1.0
    return Problem(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(trainable_head),
        labels=labels,
        rewards=torch.rand(n_candidates, device=device),
        ref_log_probs=-lists.n_response * (a_token + torch.rand(n_candidates, device=device)),
        cu_seqlens=torch.arange(n_candidates + 1, dtype=torch.int32) * lists.n_response,
        cu_lists=torch.arange(lists.n_lists + 1, dtype=torch.int32) * lists.k,
        lists=lists,
    )


def shapes(head: HeadShape, lists: ListShape) -> dict[str, int | str]:
    """For the row."""
    return {
        "model": head.name,
        "T": lists.n_tokens,
        "H": head.n_hidden,
        "V": head.n_vocab,
        "lists": lists.n_lists,
        "k": lists.k,
    }
