"""grad_rows_ and fused_rows_ of each backend: D = coefficient · (onehot − softmax) · dz/draw, over the row itself."""

import pytest
import torch
from torch import Tensor

from perpo_kernels import backends
from perpo_kernels.problem import LogitMap

from . import plain
from .accuracy import DTYPES, assert_as_accurate_as_plain, interpreter_truncation, one_more_rounding
from .problems import IGNORED, random_labels
from .test_log_prob_rows import MAPS, PLAIN, VOCABULARIES


def autograd_derivative(raw: Tensor, labels: Tensor, z: LogitMap, coefficients: Tensor | None) -> Tensor:
    """coefficients · ∂log_prob/∂raw in the dtype of `raw`, by autograd through plain PyTorch."""
    leaf = raw.detach().clone().requires_grad_()
    logits = plain.map_logits(leaf, z.softcap, z.logit_scale)
    log_probs = plain.token_log_probs(logits, labels, z.temperature, z.ignore_index)
    log_probs.backward(torch.ones_like(log_probs) if coefficients is None else coefficients.to(log_probs.dtype))
    return leaf.grad


def check(backend: str, raw: Tensor, labels: Tensor, z: LogitMap = PLAIN, coefficients: Tensor | None = None) -> Tensor:
    """The result in place, into another tensor and (without coefficients) fused; all against autograd in float64."""
    kernels = backends.load(backend)
    exact = autograd_derivative(raw.double(), labels, z, coefficients)
    peer = autograd_derivative(raw, labels, z, coefficients)
    _, lse = kernels.log_prob_rows(raw, labels, z)
    out = torch.full_like(raw, torch.nan)
    kernels.grad_rows_(raw, labels, lse, coefficients, z, out)
    in_place = raw.clone()
    kernels.grad_rows_(in_place, labels, lse, coefficients, z, in_place)
    assert torch.equal(in_place, out)
    cut = interpreter_truncation(backend, raw.dtype, raw.device)
    assert_as_accurate_as_plain(out, peer, exact, extra=cut)
    if coefficients is None:
        fused = raw.clone()
        log_probs, fused_lse = kernels.fused_rows_(fused, labels, z)
        assert_as_accurate_as_plain(fused, peer, exact, extra=cut)
        torch.testing.assert_close(log_probs, kernels.log_prob_rows(raw, labels, z)[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(fused_lse, lse, rtol=1e-6, atol=1e-6)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_vocab", VOCABULARIES)
def test_equals_autograd_at_every_vocabulary_size(backend, device, n_vocab, dtype):
    raw = (3 * torch.randn(3, n_vocab, device=device)).to(dtype)
    labels = random_labels(n_vocab, 3, device=device)
    labels[0] = n_vocab - 1
    check(backend, raw, labels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("z", MAPS, ids=str)
@pytest.mark.parametrize("n_vocab", [7, 301])
def test_follows_the_chain_rule_through_temperature_scale_and_softcap(backend, device, n_vocab, z, dtype):
    raw = (8 * torch.randn(5, n_vocab, device=device)).to(dtype)
    labels = random_labels(n_vocab, 5, device=device, ignored=0.3)
    check(backend, raw, labels, z)
    check(backend, raw, labels, z, torch.randn(5, device=device))


def test_coefficients_scale_their_own_row(backend, device):
    raw = torch.randn(4, 33, device=device)
    labels = random_labels(33, 4, device=device)
    out = check(backend, raw, labels, coefficients=torch.tensor([0.0, 1.0, -2.5, 1e-6], device=device))
    assert (out[0] == 0).all()


def test_each_row_of_the_derivative_sums_to_zero(backend, device):
    raw = 5 * torch.randn(6, 501, device=device)
    backends.load(backend).fused_rows_(raw, random_labels(501, 6, device=device), LogitMap())
    assert raw.double().sum(-1).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_true_class_keeps_its_precision_when_it_is_nearly_certain(backend, device, dtype):
    """1 − p is formed in fp32 and rounded once. Rounding p first would give 0, or an eighth too much."""
    raw = torch.zeros(1, 64, device=device, dtype=dtype)
    raw[0, 3] = 12.0
    labels = torch.tensor([3], device=device)
    out = check(backend, raw, labels)
    exact = 1 - raw.double().softmax(-1)[0, 3]
    rounding = one_more_rounding(dtype) + interpreter_truncation(backend, dtype, device)
    assert abs(out[0, 3].double() - exact) <= (rounding + 2e-3) * exact


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_fused_derivative_of_huge_logits_is_as_accurate_as_plain(backend, device, offset):
    raw = torch.randint(-8, 9, (3, 301), device=device).float() + offset
    labels = random_labels(301, 3, device=device)
    exact = autograd_derivative(raw.double(), labels, LogitMap(), None)
    peer = autograd_derivative(raw, labels, LogitMap(), None)
    backends.load(backend).fused_rows_(raw, labels, LogitMap())
    assert_as_accurate_as_plain(raw, peer, exact)


@pytest.mark.parametrize("n_vocab", [5, 33, 4099])
def test_logits_of_minus_infinity_get_no_gradient(backend, device, n_vocab):
    raw = torch.randn(3, n_vocab, device=device)
    raw[0, : n_vocab - 1] = -torch.inf
    raw[1, 1::2] = -torch.inf
    out = check(backend, raw, torch.tensor([n_vocab - 1, 0, 2], device=device))
    assert (out[raw == -torch.inf] == 0).all()


@pytest.mark.parametrize("junk", [torch.nan, torch.inf])
@pytest.mark.parametrize("n_vocab", [5, 40, 301])
def test_ignored_rows_are_not_read_and_are_written_with_zeros(backend, device, n_vocab, junk):
    raw = torch.randn(6, n_vocab, device=device)
    labels = random_labels(n_vocab, 6, device=device)
    labels[[1, 4]] = IGNORED
    clean = check(backend, raw, labels)
    raw[[1, 4]] = junk
    kernels = backends.load(backend)
    _, lse = kernels.log_prob_rows(raw, labels, LogitMap())
    coefficients = torch.ones(6, device=device).index_fill_(0, torch.tensor([1, 4], device=device), torch.nan)
    out = torch.full_like(raw, torch.nan)
    kernels.grad_rows_(raw, labels, lse, coefficients, LogitMap(), out)
    assert torch.equal(out, clean)
    kernels.fused_rows_(raw, labels, LogitMap())
    assert (raw[[1, 4]] == 0).all()
    assert raw.isfinite().all()


@pytest.mark.parametrize("label", [-1, 12, 2**32 + 3, 2**62])
def test_a_label_outside_the_vocabulary_gives_a_row_of_nan(backend, device, label):
    raw = torch.randn(2, 12, device=device)
    labels = torch.tensor([label, 5], device=device)
    kernels = backends.load(backend)
    out = torch.zeros_like(raw)
    kernels.grad_rows_(raw, labels, kernels.log_prob_rows(raw, labels, LogitMap())[1], None, LogitMap(), out)
    assert out.isnan().all(-1).tolist() == [True, False]
    log_probs, _ = kernels.fused_rows_(raw, labels, LogitMap())
    assert log_probs.isnan().tolist() == [True, False]
    assert raw.isnan().all(-1).tolist() == [True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_vocab", [9, 64, 301])
def test_reads_and_writes_rows_of_different_strides_and_nothing_beside_them(backend, device, n_vocab, dtype):
    """Input and output rows start at different alignments; the columns around the output keep what they held."""
    wide = torch.randn(3, 5, n_vocab + 3, device=device).to(dtype)
    raw = wide[:, :-1, :n_vocab]
    labels = random_labels(n_vocab, 12, device=device, ignored=0.2)
    kernels = backends.load(backend)
    _, lse = kernels.log_prob_rows(raw, labels, LogitMap())
    expected = torch.empty(12, n_vocab, device=device, dtype=dtype)
    kernels.grad_rows_(raw.reshape(12, n_vocab), labels, lse, None, LogitMap(), expected)
    canvas = torch.full((3, 6, n_vocab + 5), 7.0, device=device, dtype=dtype)
    kernels.grad_rows_(raw, labels, lse, None, LogitMap(), canvas[:, 1:5, 2 : n_vocab + 2])
    torch.testing.assert_close(canvas[:, 1:5, 2 : n_vocab + 2].reshape(12, n_vocab), expected)
    canvas[:, 1:5, 2 : n_vocab + 2] = 7.0
    assert (canvas == 7).all()


@pytest.mark.parametrize("n_vocab", [9, 64, 301])
def test_fused_writes_nothing_beside_its_rows(backend, device, n_vocab):
    canvas = torch.randn(6, n_vocab + 5, device=device)
    before = canvas.clone()
    labels = random_labels(n_vocab, 4, device=device, ignored=0.2)
    backends.load(backend).fused_rows_(canvas[1:5, 2 : n_vocab + 2], labels, LogitMap())
    canvas[1:5, 2 : n_vocab + 2] = before[1:5, 2 : n_vocab + 2]
    assert torch.equal(canvas, before)


def test_no_rows(backend, device):
    kernels = backends.load(backend)
    raw, none = torch.zeros(0, 7, device=device), torch.zeros(0, device=device)
    kernels.grad_rows_(raw, none.long(), torch.zeros(2, 0, device=device), None, LogitMap(), raw)
    assert kernels.fused_rows_(raw, none.long(), LogitMap())[0].shape == (0,)
