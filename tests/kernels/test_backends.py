"""Choice of a backend: argument, environment, what serves the device, and the reason when it can't be used."""

import pytest
import torch

import perpo_kernels as pk
from perpo_kernels import backends
from perpo_kernels.backends import resolve


def test_auto_is_triton_on_cuda_and_eager_elsewhere(monkeypatch):
    monkeypatch.setattr(backends, "_triton_problem", lambda: None)
    assert resolve("auto", "cuda", torch.bfloat16) == "triton"
    assert resolve("auto", "cuda", torch.float64) == "eager"
    for device_type in ("cpu", "mps", "xpu"):
        assert resolve("auto", device_type, torch.float32) == "eager"


def test_auto_is_eager_on_cuda_without_triton(monkeypatch):
    monkeypatch.setattr(backends, "_triton_problem", lambda: "it is not installed")
    assert resolve("auto", "cuda", torch.float32) == "eager"


@pytest.mark.parametrize("name", ["eager", "reference"])
def test_the_environment_takes_the_place_of_auto(monkeypatch, name):
    monkeypatch.setenv("PERPO_BACKEND", name)
    assert resolve("auto", "cuda", torch.float32) == name
    assert resolve("auto", "cpu", torch.float32) == name


def test_an_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("PERPO_BACKEND", "reference")
    assert resolve("eager", "cpu", torch.float32) == "eager"


def test_the_environment_reaches_the_public_functions(monkeypatch, device):
    called = []
    monkeypatch.setattr(
        "perpo_kernels.reference.token_log_probs", lambda *args: called.append(args) or torch.zeros(2, device=device)
    )
    monkeypatch.setenv("PERPO_BACKEND", "reference")
    pk.token_log_probs(torch.zeros(2, 3, device=device), torch.zeros(2, dtype=torch.long, device=device))
    assert called


def test_an_unknown_name_is_refused_and_says_where_it_came_from(monkeypatch):
    with pytest.raises(ValueError, match="backend must be one of auto, triton, eager, reference, got 'cuda'"):
        resolve("cuda", "cuda", torch.float32)
    monkeypatch.setenv("PERPO_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"PERPO_BACKEND must be one of .*, got 'fast'"):
        resolve("auto", "cuda", torch.float32)


def test_triton_refuses_float64_with_the_reason(device):
    with pytest.raises(ValueError, match=r"backend='triton' can't be used.*float64.*use 'eager' or 'auto'"):
        pk.token_log_probs(
            torch.zeros(1, 3, dtype=torch.float64, device=device), torch.zeros(1, dtype=torch.long, device=device),
            backend="triton",
        )  # fmt: skip


def test_triton_on_the_cpu_needs_the_interpreter_and_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"CUDA or ROCm device .*TRITON_INTERPRET=1.*the input is on 'cpu'"):
        resolve("triton", "cpu", torch.float32)


def test_triton_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(backends, "_triton_problem", lambda: "the package triton is not installed")
    with pytest.raises(ValueError, match="backend='triton' can't be used: the package triton is not installed"):
        resolve("triton", "cuda", torch.float32)


def test_every_backend_has_the_four_primitives():
    for name in ("eager", "triton"):
        module = backends.load(name)
        for primitive in ("log_prob_rows", "fused_rows_", "grad_rows_", "list_loss"):
            assert callable(getattr(module, primitive))


def test_all_backends_agree(device):
    logits, labels = torch.randn(4, 33, device=device), torch.tensor([0, 5, -100, 32], device=device)
    results = [pk.token_log_probs(logits, labels, backend=name) for name in ("auto", "eager", "triton", "reference")]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])
