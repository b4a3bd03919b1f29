"""The list loss of any Hugging Face model on a padded batch, whatever wraps the model: one call in a loop of one's own.

out = perpo.list_loss(model, inputs, labels, rewards, num_candidates=4)
out.loss.backward()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perpo.encoding.batch import ListBatch
from perpo.integrations.padded import packed_token_weights, padded_batch
from perpo.model.head_check import check_once
from perpo.model.language_head import HeadCall, LanguageHead, head_log_probs, perpo_output, through_head
from perpo_kernels import LinearPerPOOutput
from perpo_kernels.objectives import Objective

OPTIONS = ("temperature", "max_chunk_bytes", "logits_dtype", "delta", "backend")


def list_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,  # [B, L]
    rewards: Tensor,  # [B]
    *,
    cu_lists: Tensor | Sequence[int] | None = None,  # [G + 1]
    num_candidates: int | None = None,
    ref_log_probs: Tensor | None = None,  # [B]
    objective: Objective | None = None,
    token_weights: Tensor | None = None,  # [B, L]
    pair_weights: Tensor | None = None,  # [G, k, k]
    list_weights: Tensor | None = None,  # [G]
    flip_probs: Tensor | None = None,  # [B]
    beta: float | None = None,
    gamma: float | None = None,
    reduction: str = "mean",
    **options: Any,
) -> LinearPerPOOutput:
    """`perpo_kernels.linear_perpo_loss` of a model and a padded batch; no logits [B, L, V] are made.

    The model is called as a whole, so it may be wrapped in DistributedDataParallel, FSDP2, DeepSpeed, `torch.compile`,
    a PeftModel or several of them. Its head is found as it is applied: frozen, tied, under LoRA, in modules_to_save,
    with a bias, a soft cap or a scale. On the first call with a model, what is done here is compared with the model's
    own logits at four positions of the batch (two more forward passes; all ranks take part). What a model adds to a
    loss of its own (router losses) is not in this one.

    Args:
        model: a Hugging Face model with a language head, or what wraps it: what you would call.
        inputs: keywords of its forward pass: input_ids [B, L], attention_mask, pixel_values, …; one row an answer,
            padded on the right, or on the left with position_ids.
        labels: int64 [B, L], aligned with input_ids: the token at each position of an answer, and −100 elsewhere. They
            are shifted here. A row without any takes part in no pair, which a warning says.
        rewards: [B], higher is better; in any order.
        cu_lists: the answers of list g are rows cu_lists[g] .. cu_lists[g + 1]; [0, 4, 7] are lists of 4 and 3.
        num_candidates: instead of cu_lists, where all lists have as many answers.
        ref_log_probs: [B] under the reference model, from `sequence_log_probs` under no_grad; None: no reference.
        token_weights: [B, L], aligned with labels: constants ω in Σ_t ω_t log π(y_t).
        objective, pair_weights, list_weights, flip_probs, beta, gamma, reduction: as `perpo_kernels.perpo_loss`.
        options: temperature, max_chunk_bytes, logits_dtype, delta, backend, as `perpo_kernels.linear_perpo_loss`.

    Returns:
        LinearPerPOOutput: loss (differentiable in all that is trained), log_probs [B] and metrics (detached).

    Raises:
        ValueError, TypeError: arguments that do not fit, by name; labels that are shifted already or stand on padding;
            several answers in one row; rows of one list with different prompts; a model without a language head, or
            that does something to its logits that is not known here.
    """
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"list_loss takes no {name!r}; beside its named arguments it takes {', '.join(OPTIONS)}")
    if rewards is None:
        raise ValueError("rewards must be given: [B], a number for every answer, higher is better")
    batch = padded_batch(
        inputs,
        labels,
        rewards,
        cu_lists=cu_lists,
        num_candidates=num_candidates,
        ref_log_probs=ref_log_probs,
        pair_weights=pair_weights,
        list_weights=list_weights,
        flip_probs=flip_probs,
    )
    options |= {"objective": objective, "beta": beta, "gamma": gamma, "reduction": reduction}
    options["token_weights"] = packed_token_weights(token_weights, labels, batch)

    def call(hidden: Tensor, head: LanguageHead) -> LinearPerPOOutput:
        return perpo_output(hidden, head, batch, **options)

    return LinearPerPOOutput(*_checked(model, batch, call))


def sequence_log_probs(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,  # [B, L]
    *,
    temperature: float = 1.0,
) -> Tensor:  # [B] fp32
    """Σ_t log π(y_t) of each row's labelled tokens, without logits: differentiable, for any loss of your own.

    Two GEMMs forward and backward with a frozen head, one under no_grad. Under no_grad these are the references of
    `list_loss`, by its own operations: a model that is its own reference has scores of exactly 0.

    Args:
        model, inputs, labels: as `list_loss`. A row without labels has log-prob 0.

    Returns:
        [B], fp32 (fp64 of an fp64 model).

    Raises:
        ValueError, TypeError: as `list_loss`.
    """
    batch = padded_batch(inputs, labels)

    def call(hidden: Tensor, head: LanguageHead) -> Tensor:
        if not torch.is_grad_enabled():
            return perpo_output(hidden, head, batch, temperature=temperature).log_probs
        of_tokens = head_log_probs(hidden, head, batch.labels, temperature=temperature)
        padded = of_tokens.new_zeros(labels.numel()).index_copy(0, batch.response_rows, of_tokens)
        return padded.view(labels.shape).sum(1)

    return _checked(model, batch, call)


def _checked(model: nn.Module, batch: ListBatch, call: HeadCall) -> Any:
    check_once(model, batch.inputs, batch.response_rows)
    return through_head(model, call, **batch.inputs, response_rows=batch.response_rows)
