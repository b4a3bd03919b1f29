"""A padded batch as every trainer has it -> a `ListBatch`, after checks that need the whole batch.

Whoever takes a loss into a loop of their own can go wrong without a message: labels that are shifted already, padding
on the left, padding that is trained on, several answers in one row, lists that a sampler has torn apart. All of these
can be read off the batch, at the cost of one look at a few bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from perpo.encoding.batch import ListBatch
from perpo_kernels import checks
from perpo_kernels.layout import equal_lists, owner, pack_labels

IGNORED = -100

# Keywords of a model's forward pass that say something about its logits, its loss or generation.
NOT_OF_THE_BODY = {
    "labels": "they are an argument of their own",
    "logits_to_keep": "no logits are made",
    "use_cache": "nothing is kept for generation",
    "past_key_values": "the loss is over whole rows",
    "return_dict": "the model's output is not seen",
    "num_items_in_batch": "the loss is that of lists; divide it yourself, with reduction='sum'",
}
OF_PACKED_ROWS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "cu_seqlens", "packed_seq_params")
ONE_ROW = "put every answer into a row of its own, or call pk.linear_perpo_loss with the packed hidden states"

LABELS_ON_PADDING = (
    "labels: {n} rows have labels where attention_mask is 0, row {row} the first, and padding would be trained on; use "
    "labels.masked_fill_(attention_mask == 0, -100)"
)
PADDED_ON_LEFT = (
    "attention_mask: {n} rows begin with padding or have a gap, row {row} the first, and there are no position_ids; "
    "pad on the right (tokenizer.padding_side = 'right'), or give position_ids"
)
SEVERAL_IN_A_ROW = "position_ids: they begin anew within {n} rows, row {row} the first; " + ONE_ROW
OTHER_LABELS = (
    "labels: {n} rows have labels that are not the input_ids at the same position, row {row} the first; labels[b, t] "
    "is the token at position t and shifted here, once. For other targets: pk.layout.pack_labels, pk.linear_perpo_loss"
)
TORN_APART = (
    "cu_lists, num_candidates: {n} rows have another prompt than the first row of their list, row {row} the first; the "
    "answers to one prompt must follow one another, and a sampler that shuffles rows tears lists apart. For lists over "
    "several prompts: pk.layout.pack_labels, pk.linear_perpo_loss"
)


def padded_batch(
    inputs: Mapping[str, Any],
    labels: Tensor,  # [B, L]
    rewards: Tensor | None = None,  # [B]
    *,
    cu_lists: Tensor | Sequence[int] | None = None,
    num_candidates: int | None = None,
    ref_log_probs: Tensor | None = None,  # [B]
    pair_weights: Tensor | None = None,  # [G, k, k]
    list_weights: Tensor | None = None,  # [G]
    flip_probs: Tensor | None = None,  # [B]
) -> ListBatch:
    """The rows of a padded batch as candidates of lists.

    The device is waited for twice, back to back: for the number of labelled tokens in each row
    (`perpo_kernels.layout.pack_labels`), and for what is wrong with the batch; a third time for a cu_lists that is on
    it. A batch on the CPU waits for nothing.

    Args:
        rewards: None: rows without lists, of which only the log-probs are asked for.

    Raises:
        ValueError, TypeError: see `perpo.list_loss`.
    """
    _check_names(inputs, labels)
    _check_shapes(inputs, labels)
    n_rows = labels.shape[0]
    device = next(x for x in inputs.values() if isinstance(x, Tensor)).device
    one_each = equal_lists(n_rows, 1, torch.device("cpu"))
    lists = one_each if rewards is None else _layout(cu_lists, num_candidates, n_rows)
    packed = pack_labels(labels)
    _check_values(inputs, labels.to(device), lists)
    empty = packed.cu_seqlens.diff().tolist().count(0)
    if empty == n_rows:
        raise ValueError(
            f"labels: no position of {n_rows} rows has a label other than {IGNORED}; labels[b, t] must be the token at "
            "position t wherever it belongs to the answer"
        )
    if empty and rewards is not None:
        warnings.warn(
            f"{empty} of {n_rows} rows have no label: these candidates take part in no pair. Was the answer cut off?",
            stacklevel=3,
        )

    def known(name: str, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        checks.tensor(name, x)
        if x.shape != labels.shape[:1]:
            raise ValueError(f"{name} must be [B] = [{n_rows}], one number a row, got {list(x.shape)}")
        return x.to(device, non_blocking=True)

    return ListBatch(
        inputs=dict(inputs),
        response_rows=packed.rows.to(device),
        labels=packed.labels.to(device),
        cu_seqlens=packed.cu_seqlens,
        cu_lists=lists,
        # For the type checker: what is not None gives a tensor.
        rewards=torch.zeros(n_rows, device=device) if rewards is None else known("rewards", rewards),  # type: ignore[arg-type]
        ref_log_probs=known("ref_log_probs", ref_log_probs),
        flip_probs=known("flip_probs", flip_probs),
        pair_weights=None if pair_weights is None else pair_weights.to(device),
        list_weights=None if list_weights is None else list_weights.to(device),
    )


def packed_token_weights(token_weights: Tensor | None, labels: Tensor, batch: ListBatch) -> Tensor | None:  # [T]
    """[B, L] aligned with the labels -> those of the labelled tokens."""
    if token_weights is None:
        return None
    checks.tensor("token_weights", token_weights)
    if token_weights.shape != labels.shape:
        raise ValueError(
            f"token_weights must be [B, L] as labels, {list(labels.shape)}: the weight of the token at each position; "
            f"got {list(token_weights.shape)}"
        )
    return token_weights.to(batch.labels.device).flatten()[batch.response_rows + 1]


# ----------------------------------------------------------------------------------------------------------- details


def _check_names(inputs: Mapping[str, Any], labels: Any) -> None:
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs must be a mapping of the model's keywords (input_ids, …), got {type(inputs).__name__}")
    if labels is None:
        raise ValueError(
            f"labels must be given: int64 [B, L], the token ids, and {IGNORED} wherever no token of the answer stands"
        )
    for name in inputs:
        if name in NOT_OF_THE_BODY:
            raise ValueError(
                f"inputs must hold keywords of the model's body, got {name!r}: {NOT_OF_THE_BODY[name]}; take it out"
            )
        if name in OF_PACKED_ROWS:
            raise ValueError(f"inputs: {name!r} says that several answers lie in one row; {ONE_ROW}")


def _check_shapes(inputs: Mapping[str, Any], labels: Tensor) -> None:
    checks.padded_labels(labels)
    ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if not isinstance(ids, Tensor):
        raise ValueError(f"inputs must hold input_ids [B, L] (or inputs_embeds), got {', '.join(inputs) or 'nothing'}")
    if labels.shape != ids.shape[:2]:
        raise ValueError(
            f"labels must have the shape of input_ids, {list(ids.shape[:2])}, got {list(labels.shape)}; labels[b, t] "
            "is the token at position t, and shifting them is done here"
        )


def _layout(cu_lists: Tensor | Sequence[int] | None, num_candidates: int | None, n_rows: int) -> Tensor:
    """`cu_lists` int32 [G + 1]."""
    if (cu_lists is None) == (num_candidates is None):
        raise ValueError(
            "cu_lists, num_candidates: expected exactly one of them, got "
            f"{'neither' if cu_lists is None else 'both'}; num_candidates=k where all lists have k answers, else "
            "cu_lists=pk.layout.cumulative([4, 3, …])"
        )
    if num_candidates is not None:
        checks.index("num_candidates", num_candidates)
        if num_candidates < 1 or n_rows % num_candidates:
            raise ValueError(
                f"num_candidates must divide the number of rows, {n_rows}, got {num_candidates}; where lists have "
                "different lengths, give cu_lists"
            )
        return equal_lists(n_rows // num_candidates, num_candidates, torch.device("cpu"))
    lists = torch.as_tensor(cu_lists)
    if lists.is_floating_point() or lists.dim() != 1 or lists.numel() == 0:
        raise ValueError(f"cu_lists must be integers [G + 1] that begin with 0, got {cu_lists}")
    lists = lists.to("cpu", torch.int32)
    checks.cumulative_values("cu_lists", lists, n_rows, "rows")
    return lists


def _check_values(inputs: Mapping[str, Any], labels: Tensor, lists: Tensor) -> None:
    found = _problems(inputs, labels, lists)
    rows = torch.stack([bad for _, bad in found]).tolist()  # one wait
    for (message, _), bad in zip(found, rows, strict=True):
        if any(bad):
            raise ValueError(message.format(n=sum(bad), row=bad.index(True)))


def _problems(
    inputs: Mapping[str, Any], labels: Tensor, lists: Tensor
) -> list[tuple[str, Tensor]]:  # what is wrong with which rows [B]
    ids, mask, positions = (inputs.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    labelled = labels[:, 1:] != IGNORED
    attended = torch.ones_like(labels, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        attended = mask.bool()
    on_left = (~attended[:, :-1] & attended[:, 1:]).any(1)
    found = [(LABELS_ON_PADDING, (labelled & ~attended[:, 1:]).any(1))]
    if positions is None:
        found.append((PADDED_ON_LEFT, on_left))
    elif positions.dim() == 2:  # Qwen-VL's [3, B, L] fall within every picture
        falls = (positions[:, 1:] < positions[:, :-1]) & attended[:, 1:] & attended[:, :-1]
        found.append((SEVERAL_IN_A_ROW, falls.any(1)))
    if not isinstance(ids, Tensor):
        return found
    found.append((OTHER_LABELS, (labelled & (labels[:, 1:] != ids[:, 1:])).any(1)))
    first = lists[owner(lists, labels.shape[0])].long().to(labels.device)  # first row of the list of each row
    n_prompt = (labelled.int().argmax(1) + 1).where(labelled.any(1), 0)
    shared = torch.arange(ids.shape[1], device=labels.device) < torch.minimum(n_prompt, n_prompt[first])[:, None]
    torn = (shared & (ids != ids[first])).any(1) & ~on_left & ~on_left[first]
    return [*found, (TORN_APART, torn)]
