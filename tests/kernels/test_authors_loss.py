"""On sorted lists without ties the loss is the authors': Σ_{i<j} w_ij · −log σ(β (s_i − s_j)), w ∝ (r_i − r_j)^γ."""

import pytest
import torch

import perpo_kernels as pk

from .plain import authors_loss

# IoU of the twenty candidates of the sample record that the authors publish, best first
SAMPLE_REWARDS = (
    0.8003244239631337, 0.652158627478554, 0.6488112086045853, 0.573965778644141, 0.5626895854398383,
    0.5579771176058804, 0.5464718389504639, 0.5270701399733659, 0.5224406680139829, 0.4934268859280976,
    0.4760463344907066, 0.46474805194805185, 0.4546780257612387, 0.4505816226019792, 0.42419900694152796,
    0.3978939361051758, 0.38231749690505556, 0.36230531482940437, 0.14892014465734685, 0.0,
)  # fmt: skip


def compare(scores, rewards, backend, beta=0.1, gamma=0.5):
    exact, leaf = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    expected = authors_loss(exact, rewards, beta, gamma)
    expected.backward()
    dtype = torch.float32 if backend == "triton" else torch.float64
    loss = pk.perpo_loss(leaf.to(dtype)[None], rewards.to(dtype)[None], beta=beta, gamma=gamma, backend=backend)
    loss.backward()
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(leaf.grad, exact.grad, rtol=tolerance, atol=tolerance * beta)


@pytest.mark.parametrize(("beta", "gamma"), [(0.1, 0.5), (1.0, 0.5), (0.1, 0.0), (0.1, 2.0)])
def test_the_published_sample(backend, device, beta, gamma):
    rewards = torch.tensor(SAMPLE_REWARDS, dtype=torch.float64, device=device)
    scores = 5 * torch.randn(20, dtype=torch.float64, device=device)
    compare(scores, rewards, backend, beta, gamma)


@pytest.mark.parametrize("k", [2, 3, 5, 12])
def test_sorted_lists_without_ties(backend, device, k):
    rewards = torch.rand(k, dtype=torch.float64, device=device).sort(descending=True).values
    compare(torch.randn(k, dtype=torch.float64, device=device), rewards, backend)


def test_at_the_start_of_training_every_list_costs_log_two(backend, device):
    """Policy = reference: all scores are 0."""
    rewards = torch.tensor(SAMPLE_REWARDS, device=device)[None]
    log_probs = torch.randn(1, 20, device=device)
    loss = pk.perpo_loss(log_probs, rewards, log_probs.clone(), backend=backend)
    assert loss.item() == pytest.approx(0.6931472, rel=1e-6)


def test_a_batch_is_the_mean_over_prompts(backend, device):
    rewards = torch.rand(4, 6, device=device, dtype=torch.float64).sort(-1, descending=True).values
    scores = torch.randn(4, 6, device=device, dtype=torch.float64)
    expected = torch.stack([authors_loss(s, r, 0.1, 0.5) for s, r in zip(scores, rewards, strict=True)]).mean()
    dtype = torch.float32 if backend == "triton" else torch.float64
    loss = pk.perpo_loss(scores.to(dtype), rewards.to(dtype), backend=backend)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
