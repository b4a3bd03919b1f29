"""What is logged is what its name says."""

import torch
from accelerate import Accelerator
from scipy.stats import kendalltau

from perpo.encoding.batch import ListBatch
from perpo.training.metrics import ListMetrics
from perpo_kernels import linear_perpo_loss
from perpo_kernels.layout import cumulative


def test_sums_over_batches_are_means_over_lists() -> None:
    """Two active lists of different size in two batches, and one without preference; one response is empty."""
    torch.manual_seed(0)
    weight = torch.randn(11, 4)

    def batch(rewards: list[list[float]], lengths: list[int]) -> ListBatch:
        n = sum(lengths)
        flat = torch.tensor([r for row in rewards for r in row])
        labels, layout = torch.randint(0, 11, (n,)), cumulative(lengths)
        lists = cumulative([len(row) for row in rewards])
        return ListBatch({}, torch.arange(n), labels, layout, lists, flat, torch.zeros(len(flat)), n_tokens=n)

    metrics = ListMetrics()
    outputs, batches = [], [batch([[0.9, 0.1, 0.5], [0.3, 0.3]], [2, 3, 1, 2, 2]), batch([[0.0, 1.0, 5.0]], [2, 2, 0])]
    for each in batches:
        options = {"cu_seqlens": each.cu_seqlens, "cu_lists": each.cu_lists, "ref_log_probs": each.ref_log_probs}
        hidden = torch.randn(len(each.labels), 4)
        outputs.append(linear_perpo_loss(hidden, weight, each.labels, each.rewards, reduction="sum", **options))
        metrics.add(each, outputs[-1])
    report = metrics.report(Accelerator(cpu=True))
    a, b = (out.log_probs for out in outputs)
    taus = [kendalltau(a[:3].numpy(), [0.9, 0.1, 0.5]).statistic, kendalltau(b[:2].numpy(), [0.0, 1.0]).statistic]
    expected = {
        "loss": (outputs[0].loss + outputs[1].loss).item() / 3,
        "lists/active": 2 / 3,
        "lists/reward_mean": (0.5 + 0.3 + 0.5) / 3,  # without the empty response, which is in no pair
        "lists/reward_spread": (0.8 + 0 + 1.0) / 3,
        "logps/chosen": (a[0] + b[1]).item() / 2,
        "logps/rejected": (a[1] + b[0]).item() / 2,
        "rewards/chosen": 0.1 * (a[0] + b[1]).item() / 2,
        "rewards/margins": 0.1 * (a[0] + b[1] - a[1] - b[0]).item() / 2,
        "lists/kendall_tau": sum(taus) / 2,
        "lists/pair_accuracy": sum((tau + 1) / 2 for tau in taus) / 2,  # without ties
        "rewards/accuracies": (float(a[0] > a[1]) + float(b[1] > b[0])) / 2,
    }
    for name, value in expected.items():
        torch.testing.assert_close(report[name], float(value), atol=1e-4, rtol=1e-4, msg=name)
    assert report["tokens_per_second"] > 0


def test_a_tie_of_scores_is_right_in_no_metric() -> None:
    """Before the first step policy and reference agree: all scores are 0, and no accuracy may show."""
    labels, lists = torch.tensor([1, 2, 3, 1, 2]), cumulative([3, 2])
    rewards = torch.tensor([0.9, 0.1, 0.5, 0.0, 1.0])
    options = {"cu_seqlens": torch.arange(6), "cu_lists": lists}
    hidden, weight = torch.randn(5, 4), torch.randn(7, 4)
    ref = linear_perpo_loss(hidden, weight, labels, rewards, **options).log_probs
    batch = ListBatch({}, torch.arange(5), labels, torch.arange(6), lists, rewards, ref, n_tokens=5)
    metrics = ListMetrics()
    metrics.add(batch, linear_perpo_loss(hidden, weight, labels, rewards, ref_log_probs=ref, **options))
    report = metrics.report(Accelerator(cpu=True))
    assert report["lists/active"] == 1.0
    for name in ("rewards/accuracies", "lists/pair_accuracy", "lists/kendall_tau", "rewards/margins"):
        assert report[name] == 0.0, name
