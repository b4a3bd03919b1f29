"""combine_references: the harmonic mean of probabilities, in logarithms, whatever their size."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import perpo_kernels as pk


def draw(device: torch.device, n: int, s: int = 5) -> Tensor:
    return -3 * torch.rand(n, s, device=device).double()


def test_it_is_the_weighted_harmonic_mean_of_probabilities(device):
    references, alpha = draw(device, 3), torch.tensor([0.5, 0.2, 0.3], device=device).double()
    expected = (1 / (alpha[:, None] / references.exp()).sum(0)).log()
    for weights in (alpha, alpha.tolist(), alpha[:, None].expand(3, 5)):
        torch.testing.assert_close(pk.combine_references(references, weights), expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(pk.combine_references(list(references), weights), expected, rtol=1e-13, atol=1e-13)
    single = pk.combine_references(references.float(), alpha.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-6, atol=1e-6)
    assert pk.combine_references(references.bfloat16()).dtype == torch.float32


def test_every_response_may_have_weights_of_its_own(device):
    references, weights = draw(device, 2), torch.rand(5, device=device).double()
    both = pk.combine_references(references, torch.stack([weights, 1 - weights]))
    for i in range(5):
        alone = pk.combine_references(references[:, i : i + 1], [weights[i].item(), 1 - weights[i].item()])
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-12, atol=1e-12)


def test_one_reference_and_equal_references_are_themselves(device):
    one = draw(device, 1)
    close = {"rtol": 1e-14, "atol": 1e-14}
    torch.testing.assert_close(pk.combine_references(one), one[0], **close)
    torch.testing.assert_close(pk.combine_references(one.expand(4, 5)), one[0], **close)
    torch.testing.assert_close(pk.combine_references(one.expand(2, 5), [0.3, 0.7]), one[0], **close)


def test_a_reference_of_weight_zero_takes_no_part(device):
    references = draw(device, 3)
    for junk in (-math.inf, math.inf, math.nan):
        references[1] = junk
        without = pk.combine_references(references[[0, 2]], [0.4, 0.6])
        torch.testing.assert_close(pk.combine_references(references, [0.4, 0.0, 0.6]), without, rtol=0, atol=0)


@given(st.lists(st.floats(-1e5, 0), min_size=1, max_size=5))
def test_it_lies_between_the_smallest_and_the_arithmetic_mean(values):
    """Harmonic ≤ geometric, and the smallest decides: within log n of it. Nothing overflows."""
    references = torch.tensor(values, dtype=torch.float64)[:, None]
    mixed = pk.combine_references(references).item()
    assert min(values) - 1e-9 <= mixed <= min(sum(values) / len(values), min(values) + math.log(len(values))) + 1e-9


def test_the_bound_that_it_is_made_for(device):
    """Σ α KL(π ‖ π_k) ≤ E_π log(π / π̃), for any policy."""
    logs = [torch.randn(7, device=device).double().log_softmax(0) for _ in range(4)]
    policy, references, alpha = logs[0], torch.stack(logs[1:]), [0.5, 0.3, 0.2]
    cost = sum(a * (policy.exp() * (policy - ref)).sum() for a, ref in zip(alpha, references, strict=True))
    bound = (policy.exp() * (policy - pk.combine_references(references, alpha))).sum()
    assert cost <= bound


def test_a_loss_takes_the_mixture_for_its_reference(device):
    references, rewards = draw(device, 2), torch.rand(5, device=device).double()
    log_probs = draw(device, 1)
    mixed = pk.combine_references(references)
    out = pk.perpo_loss(log_probs, rewards[None], mixed[None], backend="reference")
    s = log_probs[0] - mixed
    i, j = (rewards[:, None] > rewards[None, :]).nonzero(as_tuple=True)
    w = (rewards[i] - rewards[j]) ** 0.5
    expected = (w * torch.nn.functional.softplus(-0.1 * (s[i] - s[j]))).sum() / w.sum()
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=0)


TWO = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("references", "weights", "error", "message"),
    [
        (TWO, [0.5], ValueError, "weights must be one number for each of 2 references, got 1"),
        (TWO, [0.5, 0.6], ValueError, r"weights must be ≥ 0 and add up to 1, got \[0.5, 0.6\]"),
        (TWO, [0.5, 0.51], ValueError, r"weights must be ≥ 0 and add up to 1, got \[0.5, 0.51\]"),
        (TWO, [0.5, 0.4995], ValueError, r"weights must be ≥ 0 and add up to 1, got \[0.5, 0.4995\]"),
        (TWO, torch.tensor([0.5, 0.5005]), ValueError, "weights must be ≥ 0 and add up to 1 over the references"),
        (TWO, torch.tensor([[0.5] * 3, [0.5, 0.5, 0.4995]]), ValueError, "weights must be ≥ 0 and add up to 1 over"),
        (TWO, [1.5, -0.5], ValueError, "weights must be ≥ 0 and add up to 1"),
        (TWO, [math.nan, 0.5], ValueError, "weights must be ≥ 0 and add up to 1"),
        (TWO, [0.5, "0.5"], TypeError, r"weights\[1\] must be a number, got str"),
        (TWO, torch.tensor([0.5, 0.6]), ValueError, "weights must be ≥ 0 and add up to 1 over the references"),
        (TWO, torch.tensor([math.nan, 0.5]), ValueError, "weights must be ≥ 0 and add up to 1 over the references"),
        (TWO, torch.full((2, 2), 0.5), ValueError, r"weights must be \[n\] = \[2\] or have the shape of"),
        (TWO, torch.tensor([1, 0]), TypeError, "weights must be float32, float16"),
        (torch.zeros(0, 3), None, ValueError, "at least one reference"),
        ([], None, ValueError, "at least one reference"),
        ([torch.zeros(3), torch.zeros(4)], None, ValueError, r"ref_log_probs\[1\] must have the shape and device"),
        (TWO.long(), None, TypeError, "ref_log_probs must be float32"),
    ],
)
def test_bad_arguments_are_named(references, weights, error, message):
    with pytest.raises(error, match=message):
        pk.combine_references(references, weights)


def test_weights_may_be_rounded(device):
    """Ten times 0.1 in fp32 is not 1, nor are three times 0.3333."""
    references = draw(device, 10)
    plain = pk.combine_references(references)
    torch.testing.assert_close(pk.combine_references(references, torch.full((10,), 0.1, device=device)), plain)
    rounded = pk.combine_references(references[:3], [0.3333, 0.3333, 0.33335])
    torch.testing.assert_close(rounded, pk.combine_references(references[:3]), rtol=0, atol=2e-4)


def test_it_compiles_whole(device):
    references = draw(device, 3)
    compiled = torch.compile(pk.combine_references, fullgraph=True, backend="eager")
    for weights in ([0.5, 0.2, 0.3], None):
        torch.testing.assert_close(compiled(references, weights), pk.combine_references(references, weights))
