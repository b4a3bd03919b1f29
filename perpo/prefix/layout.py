"""Which tokens of a packed row see which: the layout of shared prompts and their answers.

A row of T tokens holds all prompts one after another, then all answers, prompt by prompt:

    [prompt 1 | prompt 2 | … | answers of prompt 1: y_1 | … | y_k | answers of prompt 2 | …]

so that prompts, the answers of one prompt and each answer are contiguous ranges. A token of an answer sees its prompt
and its answer up to itself; a token of a prompt sees the prompt up to itself and, in models that let the tokens of an
image see each other, its whole image (`blocks`). So every token sees two ranges of the row, one of which may be empty.

The layout holds this in two forms: `parts`, plain attentions over ranges, for kernels without a mask, and `sight`, the
two ranges of every token, for kernels with one.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from perpo_kernels.layout import cumulative

Range = tuple[int, int]  # start, end

TILE = 128  # `sight` is padded to a multiple of this, as FlexAttention needs it; a padding token sees itself


@dataclass
class Part:
    """n plain attentions side by side: the queries of range i see the keys of range i. The ranges lie end to end."""

    queries: tuple[Range, ...]
    keys: tuple[Range, ...]
    causal: bool  # key ranges are the query ranges, and a token sees what is not after it
    merge: bool  # its queries have been in a part before it
    cu_queries: Tensor  # int32 [n + 1], from the first range's start
    cu_keys: Tensor  # int32 [n + 1]

    @property
    def all_queries(self) -> Range:
        return self.queries[0][0], self.queries[-1][1]

    @property
    def all_keys(self) -> Range:
        return self.keys[0][0], self.keys[-1][1]

    @property
    def max_queries(self) -> int:
        return max(end - start for start, end in self.queries)

    @property
    def max_keys(self) -> int:
        return max(end - start for start, end in self.keys)


@dataclass
class PrefixLayout:
    """See the module. Made on the CPU with the batch; nothing in it is read back from a device.

    Attributes:
        prompt_lengths: tokens of each prompt.
        answer_lengths: of each prompt, tokens of each of its answers that are fed (may be 0).
        blocks: of each prompt, ranges within it whose tokens all see each other; in order, apart from each other.
        parts: the attentions that make up the whole.
        sight: of each token the start and end of the range that it sees of its prompt, start and end of the range that
            it sees of its answer, and its place, counted along prompt and answer.
        made: masks by their use; made on first use, and shared by all layers and both passes. No dict: FSDP2 copies
            what a module is given, dataclasses and dicts too, to cast the floats in it, and the copies share this.
    """

    prompt_lengths: tuple[int, ...]
    answer_lengths: tuple[tuple[int, ...], ...]
    blocks: tuple[tuple[Range, ...], ...]
    parts: tuple[Part, ...]
    sight: Tensor  # int32 [5, T and up to a multiple of TILE]
    made: UserDict[Any, Any] = field(default_factory=UserDict, repr=False, compare=False)

    @property
    def n_tokens(self) -> int:
        return sum(self.prompt_lengths) + sum(map(sum, self.answer_lengths))

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with answer."""
        pairs = zip(self.prompt_lengths, self.answer_lengths, strict=True)
        return max((prompt + max(answers, default=0) for prompt, answers in pairs), default=0)

    @property
    def prompts(self) -> list[Range]:
        return _ranges(0, self.prompt_lengths)

    @property
    def answers(self) -> list[list[Range]]:
        """Of each prompt, the ranges of its answers."""
        starts = accumulate(map(sum, self.answer_lengths), initial=sum(self.prompt_lengths))
        return [_ranges(start, lengths) for start, lengths in zip(starts, self.answer_lengths, strict=False)]

    @property
    def n_separate(self) -> int:
        """Tokens of a row for every answer."""
        repeated = sum(n * len(answers) for n, answers in zip(self.prompt_lengths, self.answer_lengths, strict=True))
        return repeated + sum(map(sum, self.answer_lengths))

    def map(self, move: Callable[[Tensor], Tensor]) -> PrefixLayout:
        """`move` of every tensor."""
        parts = [replace(part, cu_queries=move(part.cu_queries), cu_keys=move(part.cu_keys)) for part in self.parts]
        return replace(self, parts=tuple(parts), sight=move(self.sight), made=UserDict())

    def seen(self, window: int | None) -> Tensor:  # int32 [4, as many as in sight]
        """The two ranges that each token sees if it sees only `window` places back, itself counted."""
        start, end, own_start, own_end, place = self.sight
        if window is None:
            return self.sight[:4]
        first = place - (window - 1)  # the first place that is seen
        of_own = first - (end - start)  # an answer's places go on after its prompt
        return torch.stack((start + first.clamp(min=0), end, own_start + of_own.clamp(min=0), own_end))

    def masks(self, window: int | None, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Of each prompt with its answers, their places in the row [n] and who sees whom, bool [n, n]."""
        found = self.made.get((window, device))
        if found is None:
            seen = self.seen(window).to(device)
            found = self.made[window, device] = [
                _mask(seen, prompt, answers) for prompt, answers in zip(self.prompts, self.answers, strict=True)
            ]
        return found

    def batches(self, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        """Of each prompt, its n answers that have tokens as a batch, in which a short one repeats its last token.

        The places in the row of the batch's tokens, int64 [n, longest], and the places in the flattened batch of those
        that are no padding, in the order of the row. A batch is two tokens long at least, as layers that carry a state
        run one token as a step of generation, with kernels that have no gradient.
        """
        found = self.made.get(("batches", device))
        if found is None:
            found = self.made["batches", device] = [_batch(answers, device) for answers in self.answers]
        return found


def _batch(answers: Sequence[Range], device: torch.device) -> tuple[Tensor, Tensor]:
    answers = [(start, end) for start, end in answers if start < end]
    if not answers:
        return torch.empty(0, 0, dtype=torch.int64, device=device), torch.empty(0, dtype=torch.int64, device=device)
    longest = max(2, *(end - start for start, end in answers))
    tokens = [torch.arange(start, start + longest, device=device).clamp(max=end - 1) for start, end in answers]
    places = [
        torch.arange(row * longest, row * longest + end - start, device=device)
        for row, (start, end) in enumerate(answers)
    ]
    return torch.stack(tokens), torch.cat(places)


def _mask(seen: Tensor, prompt: Range, answers: Sequence[Range]) -> tuple[Tensor, Tensor]:
    device = seen.device
    rows = torch.arange(*prompt, device=device)
    if answers:
        rows = torch.cat((rows, torch.arange(answers[0][0], answers[-1][1], device=device)))
    start, end, own_start, own_end = seen[:, rows].unsqueeze(-1)
    return rows, ((start <= rows) & (rows < end)) | ((own_start <= rows) & (rows < own_end))


def prefix_layout(
    prompt_lengths: Sequence[int],  # [P]
    answer_lengths: Sequence[Sequence[int]],  # of each prompt, of each answer
    blocks: Sequence[Sequence[Range]] | None = None,  # of each prompt
) -> PrefixLayout:
    """The layout of P prompts and their answers.

    Raises:
        ValueError: an empty prompt, or lists that do not belong together.
    """
    if len(prompt_lengths) != len(answer_lengths) or (blocks is not None and len(blocks) != len(prompt_lengths)):
        raise ValueError(
            f"answer_lengths and blocks: expected one list for each of {len(prompt_lengths)} prompts, got "
            f"{len(answer_lengths)} and {None if blocks is None else len(blocks)}"
        )
    if any(length < 1 for length in prompt_lengths):
        raise ValueError(f"prompt_lengths must be ≥ 1, got {list(prompt_lengths)}")
    layout = PrefixLayout(
        tuple(prompt_lengths),
        tuple(map(tuple, answer_lengths)),
        tuple(map(tuple, blocks)) if blocks is not None else ((),) * len(prompt_lengths),
        (),
        torch.empty(0),
    )
    prompts, answers = layout.prompts, layout.answers
    answered = [i for i, ranges in enumerate(answers) if ranges and ranges[-1][1] > ranges[0][0]]
    groups = [(answers[i][0][0], answers[i][-1][1]) for i in answered]
    singles = [r for ranges in answers for r in ranges if r[1] > r[0]]
    parts = [
        *_prompt_parts(prompts, layout.blocks),
        *_parts(groups, [prompts[i] for i in answered], causal=False, merge=False),
        *_parts(singles, singles, causal=True, merge=True),
    ]
    return replace(layout, parts=tuple(parts), sight=_sight(layout))


def _sight(layout: PrefixLayout) -> Tensor:
    own = torch.arange(-(-layout.n_tokens // TILE) * TILE, dtype=torch.int32)
    sight = torch.stack((own, own + 1, own * 0, own * 0, own * 0))
    first, first_end, second, second_end, place = sight
    for (start, end), answers, blocks in zip(layout.prompts, layout.answers, layout.blocks, strict=True):
        first[start:end] = start
        place[start:end] = own[: end - start]
        for low, high in blocks:
            first_end[start + low : start + high] = start + high
        for low, high in answers:
            first[low:high], first_end[low:high] = start, end
            second[low:high], second_end[low:high] = low, own[low:high] + 1
            place[low:high] = own[: high - low] + (end - start)
    return sight


def _prompt_parts(prompts: Sequence[Range], blocks: Sequence[Sequence[Range]]) -> list[Part]:
    if not any(blocks):
        return _parts(prompts, prompts, causal=True, merge=False)
    # A prompt falls into stretches: a block sees all up to its end; others all before them, and themselves causally.
    first: list[Range] = []
    within: list[Range] = []
    earlier: list[tuple[Range, Range]] = []
    for (start, end), inside in zip(prompts, blocks, strict=True):
        at = start
        for low, high in [*((start + a, start + b) for a, b in inside), (end, end)]:
            if at < low:
                (first if at == start else within).append((at, low))
                if at > start:
                    earlier.append(((at, low), (start, at)))
            if low < high:
                earlier.append(((low, high), (start, high)))
            at = high
    return [
        *_parts(first, first, causal=True, merge=False),
        *_parts([q for q, _ in earlier], [k for _, k in earlier], causal=False, merge=False),
        *_parts(within, within, causal=True, merge=True),
    ]


def _parts(queries: Sequence[Range], keys: Sequence[Range], *, causal: bool, merge: bool) -> list[Part]:
    """One part, or one for each range where they do not lie end to end."""
    if not queries:
        return []
    if not (_end_to_end(queries) and _end_to_end(keys)):
        return [
            part for q, k in zip(queries, keys, strict=True) for part in _parts([q], [k], causal=causal, merge=merge)
        ]
    cu_queries, cu_keys = (cumulative([end - start for start, end in ranges]) for ranges in (queries, keys))
    return [Part(tuple(queries), tuple(keys), causal, merge, cu_queries, cu_keys)]


def _end_to_end(ranges: Sequence[Range]) -> bool:
    return all(a[1] == b[0] for a, b in pairwise(ranges))


def _ranges(start: int, lengths: Sequence[int]) -> list[Range]:
    return list(pairwise(accumulate(lengths, initial=start)))
