"""Lists of candidates as one right-padded batch: a row [image | prompt | response] for every candidate.

A list has one prompt or several (the same question under another image), each with its own responses; candidates are
ordered by prompt. What is known of each candidate (`candidate_tensors`) does not depend on how prompts and
responses are laid out in rows (`separate_rows`).

Only the states that predict response tokens will be used, so the batch carries their flat positions, and the last
token of a response, which predicts nothing, is not fed at all. The layout (cu_seqlens, cu_lists) stays on the CPU:
`perpo_kernels` checks it there for free, and nothing has to wait for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from perpo.encoding.vision import HostInputs
from perpo.prefix.layout import PrefixLayout
from perpo_kernels.layout import cumulative

# Keywords of a forward pass that run along the tokens, with the value at text and at padding.
TOKEN_KEYS = {"input_ids": None, "attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}


LAYOUT = ("cu_seqlens", "cu_lists")


@dataclass
class ListBatch:
    """G lists of S candidates with T response tokens in all."""

    inputs: dict[str, Tensor]  # keywords of the model's forward: input_ids [S, L], attention_mask [S, L], pixels, …
    response_rows: Tensor  # int64 [T], positions in the flattened [S · L] of the states that predict response tokens
    labels: Tensor  # int64 [T], the response tokens
    cu_seqlens: Tensor  # int32 [S + 1], on the CPU
    cu_lists: Tensor  # int32 [G + 1], on the CPU
    rewards: Tensor  # fp32 [S]
    ref_log_probs: Tensor | None = None  # fp32 [S]
    flip_probs: Tensor | None = None  # fp32 [S]
    pair_weights: Tensor | None = None  # fp32 [G, k, k], k the longest list
    list_weights: Tensor | None = None  # fp32 [G]; None: 1 each
    layout: PrefixLayout | None = None  # of a packed row; None: a row for every candidate
    host: HostInputs | None = None  # keywords of the model's forward that stay on the CPU
    added: Tensor | None = None  # bool [S]: of a list's second or later prompt, in the loss but not in list metrics
    n_tokens: int = 0  # tokens fed, without padding
    n_cut: int = 0  # responses cut by max_response_length

    @property
    def n_lists(self) -> int:
        return self.cu_lists.numel() - 1

    @property
    def n_separate(self) -> int:
        """Tokens that a row for every candidate feeds."""
        return self.n_tokens if self.layout is None else self.layout.n_separate

    @property
    def keywords(self) -> dict[str, Any]:
        """Of the model's forward pass, as `perpo.model.language_head.accept_rows` extends it."""
        return {
            **self.inputs,
            "response_rows": self.response_rows,
            "prefix_layout": self.layout,
            "host_inputs": self.host,
        }

    def counting_first(self, n_lists: int) -> ListBatch:
        """The batch with only its first lists in loss and metrics: candidates without a reward take part in nothing.

        The ranks must take equally many steps, so data loaders fill up the last batch with lists seen before.
        """
        rewards = self.rewards.clone()
        rewards[int(self.cu_lists[n_lists]) :] = torch.nan
        return replace(self, rewards=rewards)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ListBatch:
        """Everything but the layout on `device`."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ListBatch:
        """Called by the data loader, so that copies to a GPU can overlap with work."""
        return self._map(lambda x: x.pin_memory())

    def _map(self, fn: Callable[[Tensor], Tensor]) -> ListBatch:
        def apply(x: Any) -> Any:
            if isinstance(x, dict):
                return {name: apply(value) for name, value in x.items()}
            if isinstance(x, PrefixLayout):
                return x.map(fn)
            return fn(x) if isinstance(x, Tensor) else x

        mapped = {f.name: apply(getattr(self, f.name)) for f in fields(self) if f.name not in LAYOUT}
        return replace(self, **mapped)


def collate_lists(
    prompts: Sequence[dict[str, Tensor]],  # P encoded prompts, each a batch of one
    responses: Sequence[Sequence[Sequence[int]]],  # of each prompt its responses as token ids
    pad_id: int,
    rewards: Sequence[Sequence[float]] | None = None,  # of each prompt, one a response
    ref_log_probs: Sequence[Sequence[float]] | None = None,
    **options: Any,
) -> ListBatch:
    """Encoded prompts and responses -> one row a candidate, prompt and image repeated.

    Args:
        options: `prompts_per_list`, `flip_probs`, `pair_weights`, `list_weights` of `candidate_tensors`.

    Raises:
        ValueError: lengths that do not fit, prompts of different kinds in one batch, or an input whose shape runs along
            the tokens in a way that is not known here.
    """
    known = candidate_tensors(responses, rewards, ref_log_probs, **options)
    inputs, rows, n_tokens = separate_rows(prompts, responses, pad_id)
    return ListBatch(inputs, rows, **known, n_tokens=n_tokens)


def candidate_tensors(
    responses: Sequence[Sequence[Sequence[int]]],  # of each of P prompts its responses as token ids
    rewards: Sequence[Sequence[float]] | None = None,  # of each prompt, one a response
    ref_log_probs: Sequence[Sequence[float]] | None = None,
    *,
    prompts_per_list: Sequence[int] | None = None,  # [G]; None: one each
    flip_probs: Sequence[Sequence[float]] | None = None,
    pair_weights: Sequence[Sequence[Sequence[float]]] | None = None,  # of each list [k, k], k its own
    list_weights: Sequence[float] | None = None,  # [G]
) -> dict[str, Any]:
    """The fields of `ListBatch` that say what is known of each candidate, however the model's rows are laid out.

    Raises:
        ValueError: lengths that do not fit.
    """
    counts = [len(ids_list) for ids_list in responses]
    per_list = [1] * len(counts) if prompts_per_list is None else list(prompts_per_list)
    if sum(per_list) != len(counts) or any(n < 1 for n in per_list):
        raise ValueError(f"prompts_per_list: expected numbers ≥ 1 that add up to {len(counts)} prompts, got {per_list}")
    ends = cumulative(per_list).tolist()
    sizes = [sum(counts[start:end]) for start, end in pairwise(ends)]
    if list_weights is not None and len(list_weights) != len(sizes):
        raise ValueError(f"list_weights: expected one number for each of {len(sizes)} lists, got {len(list_weights)}")
    flat = [ids for ids_list in responses for ids in ids_list]
    of_first = torch.tensor([i in ends for i, count in enumerate(counts) for _ in range(count)], dtype=torch.bool)
    return {
        "labels": torch.tensor([token for ids in flat for token in ids], dtype=torch.int64),
        "cu_seqlens": cumulative([len(ids) for ids in flat]),
        "cu_lists": cumulative(sizes),
        "rewards": torch.zeros(len(flat)) if rewards is None else _flat("rewards", rewards, counts),
        "ref_log_probs": None if ref_log_probs is None else _flat("ref_log_probs", ref_log_probs, counts),
        "flip_probs": None if flip_probs is None else _flat("flip_probs", flip_probs, counts),
        "pair_weights": None if pair_weights is None else _padded_matrices(pair_weights, sizes),
        "list_weights": None if list_weights is None else torch.tensor(list_weights, dtype=torch.float32),
        "added": None if len(per_list) == len(counts) else ~of_first,
    }


def separate_rows(
    prompts: Sequence[dict[str, Tensor]],  # P encoded prompts, each a batch of one
    responses: Sequence[Sequence[Sequence[int]]],  # of each prompt its responses as token ids
    pad_id: int,
    answer_values: Mapping[str, int] | None = None,  # see `Encoder.answer_values`
) -> tuple[dict[str, Tensor], Tensor, int]:
    """A row for every candidate: the model's inputs, `ListBatch.response_rows` and how many tokens are fed."""
    check_prompts(prompts, responses)
    keys = list(prompts[0])
    pairs = [(prompt, list(ids)) for prompt, ids_list in zip(prompts, responses, strict=True) for ids in ids_list]
    lengths = [prompt["input_ids"].shape[1] + max(len(ids) - 1, 0) for prompt, ids in pairs]
    width = max(lengths, default=0)
    inputs = {}
    for key in keys:
        if key in TOKEN_KEYS:
            values = {**TOKEN_KEYS, **(answer_values or {})}
            inputs[key] = _token_rows(key, pairs, width, pad_id, values[key])
        else:
            inputs[key] = concatenate([prompt[key] for prompt, _ in pairs])
    first = [i * width + prompt["input_ids"].shape[1] - 1 for i, (prompt, _) in enumerate(pairs)]
    rows = [torch.arange(start, start + len(ids)) for start, (_, ids) in zip(first, pairs, strict=True)]
    return inputs, torch.cat(rows), sum(lengths)


def concatenate(parts: Sequence[Tensor]) -> Tensor:
    """Along dim 0; where other dims differ (tiles or pixels of images), zeros fill up: all families skip those."""
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(list(parts))
    sizes = [max(part.shape[d] for part in parts) for d in range(1, parts[0].dim())]
    out = parts[0].new_zeros(sum(part.shape[0] for part in parts), *sizes)
    start = 0
    for part in parts:
        out[(slice(start, start + part.shape[0]), *(slice(n) for n in part.shape[1:]))] = part
        start += part.shape[0]
    return out


def _token_rows(
    key: str, pairs: Sequence[tuple[dict[str, Tensor], list[int]]], width: int, pad_id: int, value: int | None
) -> Tensor:
    """[S, width]: the prompt's values, then those of the response without its last token, then padding."""
    out = pairs[0][0][key].new_full((len(pairs), width), pad_id if key == "input_ids" else 0)
    for row, (prompt, ids) in zip(out, pairs, strict=True):
        n_prompt, n_fed = prompt[key].shape[1], max(len(ids) - 1, 0)
        row[:n_prompt] = prompt[key][0]
        row[n_prompt : n_prompt + n_fed] = torch.tensor(ids[:n_fed], dtype=out.dtype) if value is None else value
    return out


def check_prompts(prompts: Sequence[dict[str, Tensor]], responses: Sequence[Sequence[Sequence[int]]]) -> None:
    """Raises:
    ValueError: prompts of different kinds, or with an input that runs along the tokens in a way not known here."""
    if len(prompts) != len(responses):
        raise ValueError(f"responses: expected one list for each of {len(prompts)} prompts, got {len(responses)}")
    for prompt in prompts:
        if set(prompt) != set(prompts[0]):
            raise ValueError(
                f"prompts: one has {sorted(prompts[0])} and another {sorted(prompt)}; lists with and without an image "
                "cannot share a batch: put them into batches of their own"
            )
    n_prompt = prompts[0]["input_ids"].shape[1]
    for key, value in prompts[0].items():
        if key not in TOKEN_KEYS and value.shape[:2] == (1, n_prompt):
            raise ValueError(
                f"prompts: {key!r} of shape {tuple(value.shape)} seems to run along the {n_prompt} tokens of the "
                f"prompt; how it continues in a response is not known (known: {', '.join(TOKEN_KEYS)})"
            )


def _flat(name: str, values: Sequence[Sequence[float]], counts: list[int]) -> Tensor:  # [S]
    got = [len(x) for x in values]
    if got != counts:
        raise ValueError(f"{name}: expected one number a response, {counts} of them by prompt, got {got}")
    exact = torch.tensor([x for row in values for x in row], dtype=torch.float64)
    if bool((exact.isfinite() & exact.float().isinf()).any()):
        raise ValueError(f"{name}: {exact.abs().max().item():g} is beyond the largest fp32 number; scale them")
    return exact.float()


def _padded_matrices(matrices: Sequence[Sequence[Sequence[float]]], sizes: list[int]) -> Tensor:  # [G, k, k]
    if [len(matrix) for matrix in matrices] != sizes:
        raise ValueError(
            f"pair_weights: expected a matrix [k, k] a list, k {sizes}, got {[len(matrix) for matrix in matrices]}"
        )
    longest = max(sizes, default=0)
    out = torch.zeros(len(sizes), longest, longest)
    for square, matrix, k in zip(out, matrices, sizes, strict=True):
        square[:k, :k] = torch.tensor(matrix, dtype=torch.float32).reshape(k, k)
    return out
