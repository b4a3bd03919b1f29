"""Lists as one packed row in which every prompt, image included, stands once: [prompts | answers].

A packed row costs Σ (P + k R) tokens where a row for every candidate costs Σ k (P + R), forward and backward, and the
vision tower sees every image once. The layout (`perpo.prefix.layout`) holds which token sees which, and
`PromptPositions` the position ids: those of an answer continue where its prompt ends. Both are computed here on the
CPU, so that a step does not wait for the device. (Some models read their inputs back nevertheless, to check that the
image tokens are as many as the image features.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from perpo.encoding.batch import TOKEN_KEYS, check_prompts, concatenate
from perpo.encoding.positions import PromptPositions
from perpo.prefix.layout import PrefixLayout, prefix_layout


def packed_row(
    prompts: Sequence[dict[str, Tensor]],  # P encoded prompts, each a batch of one
    responses: Sequence[Sequence[Sequence[int]]],  # of each prompt its responses as token ids
    positions: PromptPositions,
    answer_values: Mapping[str, int] | None = None,  # see `Encoder.answer_values`
) -> tuple[dict[str, Tensor], Tensor, PrefixLayout]:
    """One row for all candidates: the model's inputs, `ListBatch.response_rows` and the layout.

    The state that predicts a response's first token is the prompt's last, which all of its responses share.

    Raises:
        ValueError: prompts of different kinds in one batch, or an input that is not known to run along the tokens.
    """
    check_prompts(prompts, responses)
    fed = [[list(ids[:-1]) for ids in of_prompt] for of_prompt in responses]
    layout = prefix_layout(
        [prompt["input_ids"].shape[1] for prompt in prompts],
        [[len(ids) for ids in of_prompt] for of_prompt in fed],
        [positions.blocks(prompt) for prompt in prompts],
    )
    inputs: dict[str, Tensor] = {"position_ids": _position_ids(prompts, layout, positions)}
    answers = [token for of_prompt in fed for ids in of_prompt for token in ids]
    for name in prompts[0]:
        parts = [prompt[name] for prompt in prompts]
        if name not in TOKEN_KEYS:
            inputs[name] = concatenate(parts)
        elif name != "attention_mask":  # nothing is padded
            value = {**TOKEN_KEYS, **(answer_values or {})}[name]
            rest = answers if value is None else [value] * len(answers)
            inputs[name] = torch.cat([*parts, torch.tensor([rest], dtype=parts[0].dtype)], 1)
    rows = [
        row
        for prompt, of_prompt, ids_list in zip(layout.prompts, layout.answers, responses, strict=True)
        for answer, ids in zip(of_prompt, ids_list, strict=True)
        for row in ([prompt[1] - 1, *range(*answer)] if ids else [])
    ]
    return inputs, torch.tensor(rows, dtype=torch.int64), layout


def _position_ids(
    prompts: Sequence[dict[str, Tensor]], layout: PrefixLayout, positions: PromptPositions
) -> Tensor:  # [1, T] or [3, 1, T]
    of_prompts, of_answers = [], []
    for prompt, lengths in zip(prompts, layout.answer_lengths, strict=True):
        inside, after = positions.positions(prompt, max(lengths, default=0))
        of_prompts.append(inside)
        of_answers += [after[..., :length] for length in lengths]
    return torch.cat([*of_prompts, *of_answers], -1).unsqueeze(-2)
