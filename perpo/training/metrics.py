"""What a training run shows: sums kept on the device, averaged over ranks when something is logged.

Names are TRL's where TRL has one, and mean what they mean there: "chosen" and "rejected" are the candidates of highest
and of lowest reward of a list, rewards/accuracies is the share of lists whose best candidate scores higher than their
worst. lists/pair_accuracy is the share of all pairs with r_i > r_j that have s_i > s_j. These and Kendall's τ are means
over active lists (those with any preference), weighted if lists have weights; the other means are of all lists alike,
and the loss is Σ w loss / number of lists. prefix/token_ratio is how many times more tokens a row for every
candidate would feed; rewards/* are β·score of the objective. Candidates that were added to a list (mDPO's, under a
corrupted image) are in its loss and in no other number; lists that only fill up the last batch
(`perpo.encoding.batch.ListBatch.counting_first`) are in none. degree/loss and degree/accuracy are those of
`perpo.training.degree`, means over the lists that have degrees.
"""

from __future__ import annotations

import resource
import sys
import time

import torch
from accelerate import Accelerator
from torch import Tensor

from perpo.encoding.batch import ListBatch
from perpo_kernels import LinearPerPOOutput
from perpo_kernels.layout import owner
from perpo_kernels.metrics import list_weights, pick, rank

OVER_ACTIVE = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "lists/pair_accuracy",
    "logps/chosen",
    "logps/rejected",
    "lists/kendall_tau",
)
OVER_LISTS = ("lists/active", "lists/reward_mean", "lists/reward_spread", "loss")
OVER_DEGREES = ("degree/loss", "degree/accuracy")
SUMS = ("lists", "weight", *OVER_ACTIVE, *OVER_LISTS, *OVER_DEGREES, "judged")


class ListMetrics:
    """Running sums since the last report. Adding costs no synchronisation; a report costs one."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.sums: Tensor | None = None
        self.n_tokens = 0
        self.n_separate = 0
        self.started = time.perf_counter()

    @torch.no_grad()
    def add(self, batch: ListBatch, output: LinearPerPOOutput, of_degrees: Tensor | None = None) -> dict[str, Tensor]:
        """Take in one batch, with `output.loss` summed over its lists, and what `DegreeHead` gave of it. -> Its sums by
        name, and "weight", over which those of OVER_ACTIVE are."""
        more = output.loss.new_zeros(len(OVER_DEGREES) + 1) if of_degrees is None else of_degrees.detach()
        sums = torch.cat([_list_sums(batch, output), output.loss.detach().float().reshape(1), more.float()])
        self.sums = sums if self.sums is None else self.sums + sums
        self.n_tokens += batch.n_tokens
        self.n_separate += batch.n_separate
        return dict(zip(SUMS, sums.unbind(), strict=True))

    def report(self, accelerator: Accelerator) -> dict[str, float]:
        """Averages over all ranks since the last reset, and speed. Every rank must call it."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        sums = torch.zeros(len(SUMS)) if self.sums is None else self.sums
        counts = [self.n_tokens, self.n_separate, peak_memory()]
        mine = torch.cat([sums.double().cpu(), torch.tensor(counts).double()])
        everyone = accelerator.gather(mine.to(accelerator.device, torch.float32).unsqueeze(0)).double().cpu()
        totals = everyone.sum(0).tolist()
        n_lists, weight, *of_lists, n_tokens, n_separate, _ = totals
        values = dict(zip(SUMS[2:], of_lists, strict=True))
        out = {name: values[name] / (weight or 1) for name in OVER_ACTIVE}
        out |= {name: values[name] / max(n_lists, 1) for name in OVER_LISTS}
        if values["judged"]:
            out |= {name: values[name] / values["judged"] for name in OVER_DEGREES}
        out["rewards/margins"] = out["rewards/chosen"] - out["rewards/rejected"]
        out["tokens_per_second"] = n_tokens / seconds
        out["prefix/token_ratio"] = n_separate / max(n_tokens, 1)
        out["peak_memory_gib"] = everyone[:, -1].max().item() / 2**30
        return out


def peak_memory() -> float:
    """Bytes: the most that torch held on this GPU, or that this process held in RAM where there is no GPU."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _list_sums(batch: ListBatch, output: LinearPerPOOutput) -> Tensor:
    """Number of lists, weight of the active ones, sums of OVER_ACTIVE, sums of OVER_LISTS without the loss."""
    rewards, device = output.rewards, output.rewards.device
    if batch.added is not None:
        rewards = rewards.masked_fill(batch.added, torch.nan)
    cu_lists = batch.cu_lists.long().to(device, non_blocking=True)
    counted = pick(batch.rewards.isfinite(), cu_lists[:-1])  # a list that only fills up a batch has no rewards
    ranking = rank(output.scores, rewards, cu_lists)
    chosen, rejected = (output.beta * pick(output.scores, each) for each in (ranking.best, ranking.worst))
    over_active = (
        chosen,
        rejected,
        chosen > rejected,  # a tie is not right
        ranking.pair_accuracy,
        pick(output.log_probs, ranking.best),
        pick(output.log_probs, ranking.worst),
        ranking.kendall_tau,
    )
    active = output.active > 0
    weights = output.active if output.list_weights is None else list_weights(output.active, output.list_weights)
    weights = weights.float()
    valid = ~rewards.isnan()
    lists = owner(cu_lists, len(rewards))
    n_valid = torch.zeros_like(active, dtype=torch.long).index_add(0, lists, valid.long())
    sums = [
        counted.sum(),
        weights.sum(),
        *((weights * values.float().where(weights > 0, 0.0)).sum() for values in over_active),
        active.sum(),
        (rewards / n_valid[lists]).where(valid, 0.0).sum(),
        (pick(rewards, ranking.best) - pick(rewards, ranking.worst)).sum(),
    ]
    return torch.stack([each.float() for each in sums])
