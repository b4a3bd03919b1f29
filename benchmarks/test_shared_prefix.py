"""What does attention over a packed row [prompt | answers] cost, forward and backward?

Hypothesis. Three plain attentions merged by log-sum-exp (`perpo.prefix.attention`) do no more work than there are pairs
of a query and a key that it sees, so that they are close to one causal attention with as many pairs, and cheaper than a
dense mask over the row (which computes all T² pairs) and than a row for every answer (which repeats the prompt's) at
every shape.

Floor. One causal attention over N tokens, N (N + 1) / 2 the number of visible pairs: the same products in the best
shape there is. `extra.ideal_ratio` is a case's number of pairs over ours, which is what its time over ours should be:
below it, ours is slower than its pairs, or the peer skips masked blocks.

Shapes. `benchmarks.problems.PREFIXES`, on the CPU without `--full` the first and a small page; 8 heads of 64 and 4 key
heads on the CPU, those of Qwen2.5-VL-7B on a GPU. A row for every answer is one batch of k rows, prompts repeated, as
trainers feed it. FlexAttention is compiled for its shape.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import FLOOR, OURS, Case
from benchmarks.problems import Prefix, Setting
from perpo.prefix.attention import prefix_attention
from perpo.prefix.layout import PrefixLayout, prefix_layout


class Heads(NamedTuple):
    queries: int
    keys: int
    size: int


HEADS = {"tiny": Heads(4, 2, 8), "cpu": Heads(8, 4, 64), "gpu": Heads(28, 4, 128)}
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def timed(attend: Attention, n_rows: int, n_tokens: int, setting: Setting) -> Callable[[], object]:
    """Forward, and backward from a given gradient, over [rows, heads, tokens, D]."""
    heads = HEADS[setting.size]

    def random(n_heads: int) -> Tensor:  # laid out as a projection leaves it: [rows, tokens, heads, D]
        shape = (n_rows, n_tokens, n_heads, heads.size)
        return torch.randn(shape, device=setting.device, dtype=setting.dtype).transpose(1, 2)

    q, k, v = (random(n).requires_grad_() for n in (heads.queries, heads.keys, heads.keys))
    d_out = random(heads.queries)

    def run() -> object:
        return torch.autograd.grad(attend(q, k, v), (q, k, v), d_out)

    return run


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def dense(layout: PrefixLayout, device: str) -> Attention:
    ((_, visible),) = layout.masks(None, torch.device(device))  # one list: [T, T], in the row's order

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # heads expanded: no fast kernel takes a mask and groups
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)

    return attend


def flex(prefix: Prefix, device: str) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    answer = (
        torch.arange(prefix.packed, device=device).sub(prefix.n_prompt).div(prefix.n_response, rounding_mode="floor")
    )

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & ((key < prefix.n_prompt) | (answer[query] == answer[key]))

    block_mask = create_block_mask(visible, None, None, prefix.packed, prefix.packed, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=True)

    return attend


def lazily(make: Callable[[], Attention], *shape: Any) -> Callable[[], object]:
    """Made at the first call, so that what goes wrong in making it is the case's own failure."""
    made: list[Callable[[], object]] = []

    def run() -> object:
        if not made:
            made.append(timed(make(), *shape))
        return made[0]()

    return run


def test_shared_prefix(benchmark: Any, compare: Any, setting: Setting, prefix: Prefix) -> None:
    layout = prefix_layout([prefix.n_prompt], [[prefix.n_response] * prefix.k]).map(lambda x: x.to(setting.device))
    n, row = prefix.packed, (1, prefix.packed, setting)
    as_many = round((2 * prefix.packed_pairs) ** 0.5)
    n_row = prefix.n_prompt + prefix.n_response

    def pairs(count: int) -> dict[str, Any]:
        return {"pairs": count, "ideal_ratio": round(count / prefix.packed_pairs, 2)}

    cases = [
        Case(OURS, timed(lambda q, k, v: prefix_attention(q, k, v, layout), *row), extra=pairs(prefix.packed_pairs)),
        Case(FLOOR, timed(causal, 1, as_many, setting)),
        Case("dense mask, SDPA", lazily(lambda: dense(layout, setting.device), *row), extra=pairs(n * n)),
        Case(
            "a row for each answer, SDPA", timed(causal, prefix.k, n_row, setting), extra=pairs(prefix.separate_pairs)
        ),
    ]
    left_out = "not run: compiles for each shape, left out at tiny sizes" if setting.size == "tiny" else None
    run = lazily(lambda: flex(prefix, setting.device), *row)
    cases.append(Case("FlexAttention", run, extra=pairs(prefix.packed_pairs), problem=left_out))
    heads = HEADS[setting.size]
    shapes = {**prefix._asdict(), "heads": heads.queries, "key_heads": heads.keys, "D": heads.size}
    compare("shared_prefix", str(prefix), cases, shapes)
