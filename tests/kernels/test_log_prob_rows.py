"""log_prob_rows of each backend: log softmax(z)[label] of a row, its maximum m and log Σ exp(z − m)."""

import pytest
import torch
from torch import Tensor

from perpo_kernels import backends, reference
from perpo_kernels.problem import LogitMap

from . import plain
from .accuracy import DTYPES, assert_as_accurate_as_plain
from .problems import IGNORED, random_labels

# Every small V (the vector path starts at 8 or 16), odd ones, one past a power of two, and more than two blocks.
VOCABULARIES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 127, 301, 4099, 20008)
PLAIN = LogitMap()
MAPS = (
    PLAIN,
    LogitMap(temperature=0.7),
    LogitMap(softcap=15.0),
    LogitMap(temperature=1.3, softcap=5.0, logit_scale=0.5),
)


def run(backend: str, logits: Tensor, labels: Tensor, z: LogitMap = PLAIN) -> tuple[Tensor, Tensor]:
    return backends.load(backend).log_prob_rows(logits, labels, z)


def exact_logits(logits: Tensor, z: LogitMap) -> Tensor:
    return plain.map_logits(logits.double(), z.softcap, z.logit_scale)


def exact(logits: Tensor, labels: Tensor, z: LogitMap = PLAIN) -> Tensor:
    return reference.token_log_probs(exact_logits(logits, z), labels, z.temperature, z.ignore_index)


def check(backend: str, logits: Tensor, labels: Tensor, z: LogitMap = PLAIN) -> None:
    log_probs, lse = run(backend, logits, labels, z)
    assert log_probs.dtype == lse.dtype == torch.float32
    peer_logits = plain.map_logits(logits, z.softcap, z.logit_scale)
    peer = plain.token_log_probs(peer_logits, labels, z.temperature, z.ignore_index)
    size = max(1.0, (exact_logits(logits, z) / z.temperature).abs().max().item())
    assert_as_accurate_as_plain(log_probs, peer, exact(logits, labels, z), scale=size)
    kept = labels != z.ignore_index
    exact_z, peer_z = exact_logits(logits, z) / z.temperature, peer_logits / z.temperature
    top, log_total = lse[:, kept]
    exact_top, peer_top = exact_z.amax(-1)[kept], peer_z.amax(-1)[kept]
    assert_as_accurate_as_plain(z.scale * top.double(), peer_top, exact_top, scale=size)
    exact_lse, peer_lse = exact_z.logsumexp(-1)[kept], peer_z.logsumexp(-1)[kept]
    assert_as_accurate_as_plain(log_total.double() + z.scale * top.double(), peer_lse, exact_lse, scale=size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_vocab", VOCABULARIES)
def test_equals_the_definition_at_every_vocabulary_size(backend, device, n_vocab, dtype):
    logits = (3 * torch.randn(3, n_vocab, device=device)).to(dtype)
    labels = random_labels(n_vocab, 3, device=device)
    labels[0] = n_vocab - 1  # the last column, where a mask would go wrong
    check(backend, logits, labels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("z", MAPS, ids=str)
@pytest.mark.parametrize("n_vocab", [7, 301])
def test_applies_temperature_scale_and_softcap(backend, device, n_vocab, z, dtype):
    logits = (8 * torch.randn(4, n_vocab, device=device)).to(dtype)
    check(backend, logits, random_labels(n_vocab, 4, device=device, ignored=0.2), z)


def test_a_soft_cap_is_exact_to_fp32_near_zero(backend, device):
    """Where the quotient of tanh would cancel. Under a cap of 1 the maximum of a row of one column is tanh of what it
    holds; two units of the last place of fp32 are allowed, and a term missing in the series costs more."""
    x = torch.cat([torch.logspace(-8, -1, 8), torch.linspace(0.23, 0.25, 20)])
    logits = torch.cat([-x, x]).to(device)[:, None]
    _, lse = run(backend, logits, torch.zeros(len(logits), dtype=torch.long, device=device), LogitMap(softcap=1.0))
    exact = logits[:, 0].double().tanh()
    torch.testing.assert_close(lse[0].double(), exact, rtol=2 * torch.finfo(torch.float32).eps, atol=0)


def test_float64_is_computed_in_float64_on_eager(device):
    logits = torch.randn(5, 37, device=device, dtype=torch.float64)
    labels = random_labels(37, 5, device=device)
    log_probs, _ = run("eager", logits, labels)
    torch.testing.assert_close(log_probs, exact(logits, labels), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("offset", [1e4, -1e4])
@pytest.mark.parametrize("n_vocab", [8, 301])
def test_huge_logits_neither_overflow_nor_lose_the_difference(backend, device, n_vocab, offset):
    """Shifting a row changes nothing: exactly representable logits around ±1e4 give log-probs to fp32 precision."""
    logits = torch.randint(-8, 9, (3, n_vocab), device=device).float() + offset
    labels = random_labels(n_vocab, 3, device=device)
    log_probs, _ = run(backend, logits, labels)
    peer = plain.token_log_probs(logits, labels)
    assert_as_accurate_as_plain(log_probs, peer, exact(logits, labels))


def test_logits_of_both_signs_and_ten_thousand(backend, device):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], device=device)
    log_probs, _ = run(backend, logits, torch.tensor([1, 2], device=device))
    torch.testing.assert_close(log_probs, torch.tensor([-2e4, -0.6931472], device=device))


def test_the_first_column_is_not_special_to_the_running_maximum(backend, device):
    """Rising and falling rows: the maximum moves in every block, or never."""
    n_vocab = 20008
    rising = torch.linspace(-50, 50, n_vocab, device=device)
    logits = torch.stack([rising, rising.flip(0)])
    check(backend, logits, torch.tensor([0, 0], device=device))


@pytest.mark.parametrize("n_vocab", [5, 33, 4099])
def test_logits_of_minus_infinity_have_probability_zero(backend, device, n_vocab):
    logits = torch.randn(3, n_vocab, device=device)
    logits[0, : n_vocab - 1] = -torch.inf  # one candidate left
    logits[1, 1::2] = -torch.inf
    labels = torch.tensor([n_vocab - 1, 0, 2], device=device)
    check(backend, logits, labels)
    log_probs, _ = run(backend, logits, torch.tensor([0, 1, 1], device=device))
    assert log_probs[:2].tolist() == [-torch.inf, -torch.inf]


def test_nan_in_a_row_is_nan_in_its_result_and_in_no_other(backend, device):
    logits = torch.randn(3, 40, device=device)
    logits[1, 17] = torch.nan
    log_probs, _ = run(backend, logits, random_labels(40, 3, device=device))
    assert log_probs.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n_vocab", [5, 64])
def test_ignored_rows_are_not_read(backend, device, n_vocab, junk):
    logits = torch.randn(6, n_vocab, device=device)
    labels = random_labels(n_vocab, 6, device=device)
    labels[[1, 4]] = IGNORED
    logits[[1, 4]] = junk
    log_probs, _ = run(backend, logits, labels)
    assert log_probs[[1, 4]].tolist() == [0.0, 0.0]
    assert log_probs.isfinite().all()
    check(backend, logits.masked_fill(logits.isnan() | logits.isinf(), 0.0), labels)


def test_ignore_index_may_be_a_real_token(backend, device):
    logits = torch.randn(4, 9, device=device)
    labels = torch.tensor([0, 3, 0, 8], device=device)
    log_probs, _ = run(backend, logits, labels, LogitMap(ignore_index=0))
    assert (log_probs == 0).tolist() == [True, False, True, False]


def test_every_row_ignored(backend, device):
    log_probs, _ = run(backend, torch.full((3, 12), torch.nan, device=device), torch.full((3,), IGNORED, device=device))
    assert log_probs.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("label", [-1, 12, 13, 2**31, 2**31 + 3, 2**32 + 3, -(2**40), 2**62])
def test_a_label_outside_the_vocabulary_gives_nan_without_a_read_outside(backend, device, label):
    """The primitive trusts nobody: 2**32 + 3 would be column 3 in 32 bits, 2**62 a fault if it were read."""
    logits = torch.randn(2, 12, device=device)
    log_probs, lse = run(backend, logits, torch.tensor([label, 5], device=device))
    assert log_probs.isnan().tolist() == [True, False]
    assert lse.isfinite().all()


def test_no_rows(backend, device):
    for shape in ((0, 7), (0, 3, 7), (2, 0, 7)):
        log_probs, lse = run(
            backend, torch.zeros(shape, device=device), torch.zeros(0, dtype=torch.long, device=device)
        )
        assert log_probs.shape == (0,)
        assert lse.shape == (2, 0)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("n_vocab", [9, 64, 301])
def test_rows_of_any_stride(backend, device, n_vocab, dtype):
    """[N, V] cut from wider rows, and [B, N, V] without its last position: starts of every alignment."""
    wide = torch.randn(2, 3, n_vocab + 3, device=device).to(dtype)
    labels = random_labels(n_vocab, 4, device=device, ignored=0.2)
    for view in (wide[:, :-1, :n_vocab], wide[:, 1:, 3:], wide.transpose(0, 1)[:2, :, 1 : n_vocab + 1]):
        log_probs, _ = run(backend, view, labels)
        rows = view.reshape(4, n_vocab)
        peer = plain.token_log_probs(rows, labels)
        assert_as_accurate_as_plain(log_probs, peer, exact(rows, labels), scale=4.0)
    check(backend, wide.view(6, -1)[1:5:2, 2 : n_vocab + 2], labels[:2])


def test_nothing_is_written_to_the_logits(backend, device):
    logits = torch.randn(4, 70, device=device)
    before = logits.clone()
    run(backend, logits, random_labels(70, 4, device=device, ignored=0.3), MAPS[-1])
    assert torch.equal(logits, before)
