"""Lists of candidates as one right-padded batch: a row [image | prompt | response] for every candidate.

Only the states that predict response tokens will be used, so the batch carries their flat positions, and the last
token of a response, which predicts nothing, is not fed at all. The layout (cu_seqlens, cu_lists) stays on the CPU:
`perpo_kernels` checks it there for free, and nothing has to wait for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perpo_kernels.layout import cumulative

# Keywords of a forward pass that run along the tokens, with the value at text and at padding.
TOKEN_KEYS = {"input_ids": None, "attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}


@dataclass
class ListBatch:
    """G lists of S candidates with T response tokens in all."""

    inputs: dict[str, Tensor]  # keywords of the model's forward: input_ids [S, L], attention_mask [S, L], pixels, …
    rows: Tensor  # int64 [T], positions in the flattened [S · L] of the states that predict response tokens
    labels: Tensor  # int64 [T], the response tokens
    cu_seqlens: Tensor  # int32 [S + 1], on the CPU
    cu_lists: Tensor  # int32 [G + 1], on the CPU
    rewards: Tensor  # fp32 [S]
    ref_log_probs: Tensor | None = None  # fp32 [S]
    n_tokens: int = 0  # tokens fed, without padding

    @property
    def n_lists(self) -> int:
        return self.cu_lists.numel() - 1

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ListBatch:
        """Everything but the layout on `device`."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        return replace(
            self,
            inputs={name: move(x) for name, x in self.inputs.items()},
            rows=move(self.rows),
            labels=move(self.labels),
            rewards=move(self.rewards),
            ref_log_probs=None if self.ref_log_probs is None else move(self.ref_log_probs),
        )

    def pin_memory(self) -> ListBatch:
        """Called by the data loader, so that copies to a GPU can overlap with work."""
        return replace(
            self,
            inputs={name: x.pin_memory() for name, x in self.inputs.items()},
            rows=self.rows.pin_memory(),
            labels=self.labels.pin_memory(),
            rewards=self.rewards.pin_memory(),
            ref_log_probs=None if self.ref_log_probs is None else self.ref_log_probs.pin_memory(),
        )


def collate_lists(
    prompts: Sequence[dict[str, Tensor]],  # G encoded prompts, each a batch of one
    responses: Sequence[Sequence[Sequence[int]]],  # of each prompt its k responses as token ids
    pad_id: int,
    rewards: Sequence[Sequence[float]] | None = None,
    ref_log_probs: Sequence[Sequence[float]] | None = None,
) -> ListBatch:
    """Encoded prompts and responses -> one row a candidate, prompt and image repeated.

    Raises:
        ValueError: lengths that do not fit, prompts of different kinds in one batch, or an input whose shape runs along
            the tokens in a way that is not known here.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"responses: expected one list for each of {len(prompts)} prompts, got {len(responses)}")
    keys = list(prompts[0])
    for prompt in prompts:
        if set(prompt) != set(keys):
            raise ValueError(
                f"prompts: one has {sorted(keys)} and another {sorted(prompt)}; lists with and without an image "
                "cannot share a batch: use per_device_train_batch_size=1 or give each list an image"
            )
    pairs = [(prompt, list(ids)) for prompt, ids_list in zip(prompts, responses, strict=True) for ids in ids_list]
    lengths = [prompt["input_ids"].shape[1] + max(len(ids) - 1, 0) for prompt, ids in pairs]
    width = max(lengths, default=0)
    inputs = {}
    for key in keys:
        if key in TOKEN_KEYS:
            inputs[key] = _token_rows(key, pairs, width, pad_id)
        else:
            parts = [prompt[key] for prompt, _ in pairs]
            _refuse_unknown_token_input(key, prompts[0])
            inputs[key] = concatenate(parts)
    first = [i * width + prompt["input_ids"].shape[1] - 1 for i, (prompt, _) in enumerate(pairs)]
    rows = [torch.arange(start, start + len(ids)) for start, (_, ids) in zip(first, pairs, strict=True)]
    return ListBatch(
        inputs,
        torch.cat(rows),
        torch.tensor([token for _, ids in pairs for token in ids], dtype=torch.int64),
        cumulative([len(ids) for _, ids in pairs]),
        cumulative([len(ids_list) for ids_list in responses]),
        _flat(rewards, responses, "rewards") if rewards is not None else torch.zeros(len(pairs)),
        _flat(ref_log_probs, responses, "ref_log_probs") if ref_log_probs is not None else None,
        sum(lengths),
    )


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


def _token_rows(key: str, pairs: Sequence[tuple[dict[str, Tensor], list[int]]], width: int, pad_id: int) -> Tensor:
    """[S, width]: the prompt's values, then those of the response without its last token, then padding."""
    out = pairs[0][0][key].new_full((len(pairs), width), pad_id if key == "input_ids" else 0)
    for row, (prompt, ids) in zip(out, pairs, strict=True):
        n_prompt, n_fed = prompt[key].shape[1], max(len(ids) - 1, 0)
        row[:n_prompt] = prompt[key][0]
        value = TOKEN_KEYS[key]
        row[n_prompt : n_prompt + n_fed] = torch.tensor(ids[:n_fed], dtype=out.dtype) if value is None else value
    return out


def _refuse_unknown_token_input(key: str, prompt: dict[str, Tensor]) -> None:
    shape, n_prompt = prompt[key].shape, prompt["input_ids"].shape[1]
    if len(shape) >= 2 and shape[0] == 1 and shape[1] == n_prompt:
        raise ValueError(
            f"prompts: {key!r} of shape {tuple(shape)} seems to run along the {n_prompt} tokens of the prompt; how it "
            f"continues in a response is not known (known: {', '.join(TOKEN_KEYS)})"
        )


def _flat(values: Sequence[Sequence[float]], responses: Sequence[Sequence[Sequence[int]]], name: str) -> Tensor:
    expected, got = [len(x) for x in responses], [len(x) for x in values]
    if expected != got:
        raise ValueError(f"{name}: expected one number a response, {expected} of them by list, got {got}")
    return torch.tensor([x for row in values for x in row], dtype=torch.float32)
