"""logits_dtype=torch.float32: a head in 16 bits whose logits, and so its log-probs, are those of an fp32 head."""

import pytest
import torch

import perpo_kernels as pk

from . import plain
from .accuracy import assert_as_accurate_as_plain, assert_equal_to_rounding, interpreter_truncation, one_more_rounding
from .problems import RAGGED, ragged_lists, random_head, value_and_gradients

LOW = (torch.bfloat16, torch.float16)
ROW = 64 + 128  # bytes of a row of D and of one of logits at V = 17, padded to cache lines
CHUNKS = {"default": None, "whole lists": 10 * ROW, "two sweeps": 3 * ROW}
TRAINABLE = {"frozen head": ("hidden",), "all": ("hidden", "weight", "bias")}


def build(device, dtype):
    lists = ragged_lists(RAGGED, device)
    return random_head(lists.n_tokens, 5, 17, device, dtype, ignored=0.2), lists


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("chunk", [None, 3 * ROW])
@pytest.mark.parametrize("grad", [False, True])
def test_log_probs_are_those_of_an_fp32_head(backend, device, dtype, chunk, grad):
    head, _ = build(device, dtype)
    head.hidden.requires_grad_(grad)
    options = {"backend": backend, "max_chunk_bytes": chunk, "softcap": 5.0}
    ours = pk.linear_token_log_probs(
        head.hidden, head.weight, head.labels, head.bias, logits_dtype=torch.float32, **options
    )
    wide = pk.linear_token_log_probs(
        head.hidden.float(), head.weight.float(), head.labels, head.bias.float(), **options
    )
    assert_equal_to_rounding(ours.detach(), wide.detach(), scale=8)
    narrow = pk.linear_token_log_probs(head.hidden, head.weight, head.labels, head.bias, **options)
    assert (narrow - wide).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS.keys())
@pytest.mark.parametrize("trainable", TRAINABLE.values(), ids=TRAINABLE.keys())
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_and_gradients_are_as_accurate_as_an_fp32_head_s(backend, device, dtype, chunk, trainable, reduction):
    """But for D and the gradients, which are rounded to the head's dtype."""
    head, lists = build(device, dtype)
    lists = lists._replace(cu_seqlens=lists.cu_seqlens.cpu(), cu_lists=lists.cu_lists.cpu())
    inputs = {"hidden": head.hidden, "weight": head.weight, "bias": head.bias}
    given = {**lists._asdict(), "labels": head.labels}

    def ours_of(**kwargs):
        return pk.linear_perpo_loss(
            **kwargs, backend=backend, max_chunk_bytes=chunk, reduction=reduction, logits_dtype=torch.float32
        ).loss

    def plain_of(hidden, weight, bias, **kwargs):
        losses = plain.linear_perpo_loss(hidden.float(), weight.float(), bias=bias.float(), **kwargs)
        return losses if reduction == "none" else losses.mean()

    def exact_of(**kwargs):
        return pk.linear_perpo_loss(**kwargs, backend="reference", reduction=reduction).loss

    ours, gradients = value_and_gradients(ours_of, inputs, trainable, 1.0, **given)
    peer, peers = value_and_gradients(plain_of, inputs, trainable, 1.0, **given)
    doubles = {name: x.double() for name, x in inputs.items()}
    wide = {**given, "rewards": lists.rewards.double(), "ref_log_probs": lists.ref_log_probs.double()}
    exact, exacts = value_and_gradients(exact_of, doubles, trainable, 1.0, **wide)
    assert_as_accurate_as_plain(ours, peer, exact)
    extra = one_more_rounding(dtype) + 2 * interpreter_truncation(backend, dtype, device)
    for name in trainable:
        assert gradients[name].dtype == dtype
        assert_as_accurate_as_plain(gradients[name], peers[name], exacts[name], extra=extra)


def test_the_reference_takes_it_too(device):
    head, _ = build(device, torch.bfloat16)
    got = pk.linear_token_log_probs(
        head.hidden, head.weight, head.labels, logits_dtype=torch.float32, backend="reference"
    )
    wide = pk.linear_token_log_probs(head.hidden.float(), head.weight.float(), head.labels, backend="reference")
    assert torch.equal(got, wide)


def test_autocast_and_the_module(backend, device):
    head, lists = build(device, torch.float32)
    loss = pk.LinearPerPOLoss(logits_dtype=torch.float32, backend=backend)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = loss(head.hidden.requires_grad_(), head.weight, head.labels, **lists._asdict())
    out.loss.backward()
    low = head.hidden.detach().bfloat16(), head.weight.bfloat16(), head.labels
    expected = pk.linear_perpo_loss(*low, **lists._asdict(), logits_dtype=torch.float32, backend=backend)
    assert torch.equal(out.loss.detach(), expected.loss)


@pytest.mark.parametrize(("dtype", "of"), [
    (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (None, torch.float64),
])  # fmt: skip
def test_the_head_s_own_dtype_changes_nothing(device, dtype, of):
    head, _ = build(device, of)
    plainly = pk.linear_token_log_probs(head.hidden, head.weight, head.labels)
    assert torch.equal(pk.linear_token_log_probs(head.hidden, head.weight, head.labels, logits_dtype=dtype), plainly)


@pytest.mark.parametrize(("dtype", "of"), [
    (torch.float16, torch.bfloat16), (torch.float32, torch.float64), (torch.float64, torch.float32),
    ("float32", torch.bfloat16),
])  # fmt: skip
def test_other_dtypes_are_refused(device, dtype, of):
    head, _ = build(device, of)
    with pytest.raises(ValueError, match=r"logits_dtype must be torch\.float32 or None"):
        pk.linear_token_log_probs(head.hidden, head.weight, head.labels, logits_dtype=dtype)
