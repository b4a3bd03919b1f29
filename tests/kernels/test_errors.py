"""Errors: which argument, what was expected, what came."""

import pytest
import torch

import perpo_kernels as pk

T, H, V = 4, 3, 7
CASES = []


def case(error, *fragments):
    """Register a call that must raise `error` with each fragment in its message."""

    def register(fn):
        CASES.append(pytest.param(fn, error, fragments, id=" | ".join(fragments)))
        return fn

    return register


def inputs(**changes):
    """Arguments of linear_perpo_loss that fit: two candidates of two tokens in one list."""
    return {
        "hidden": torch.zeros(T, H),
        "weight": torch.zeros(V, H),
        "labels": torch.zeros(T, dtype=torch.long),
        "rewards": torch.tensor([1.0, 0.0]),
        "cu_seqlens": torch.tensor([0, 2, 4], dtype=torch.int32),
        "cu_lists": torch.tensor([0, 2], dtype=torch.int32),
        "backend": "eager",
    } | changes


def linear_loss(**changes):
    return pk.linear_perpo_loss(**inputs(**changes))


def linear_tokens(**changes):
    given = inputs(**changes)
    return pk.linear_token_log_probs(
        **{k: v for k, v in given.items() if k not in ("rewards", "cu_seqlens", "cu_lists")}
    )


def tokens(logits=None, labels=None, **options):
    logits = torch.zeros(T, V) if logits is None else logits
    labels = torch.zeros(T, dtype=torch.long) if labels is None else labels
    return pk.token_log_probs(logits, labels, backend="eager", **options)


def loss(log_probs=None, rewards=None, *args, **options):
    log_probs = torch.zeros(2, 3) if log_probs is None else log_probs
    rewards = torch.zeros(2, 3) if rewards is None else rewards
    return pk.perpo_loss(log_probs, rewards, *args, **{"backend": "eager"} | options)


# ------------------------------------------------------------------------------------------------------------- logits

case(TypeError, "logits", "torch.Tensor", "list")(lambda: tokens(logits=[[0.0]]))
case(TypeError, "logits", "float32, float16, bfloat16 or float64", "torch.int64")(
    lambda: tokens(logits=torch.zeros(T, V, dtype=torch.long))
)
case(ValueError, "logits", "at least one dimension", "scalar")(lambda: tokens(logits=torch.tensor(0.0)))
case(ValueError, "labels", "logits.shape[:-1]", "[4]", "[3]", "nothing is shifted")(
    lambda: tokens(labels=torch.zeros(3, dtype=torch.long))
)
case(TypeError, "labels", "int64", "torch.int32", ".long()")(lambda: tokens(labels=torch.zeros(T, dtype=torch.int32)))
case(TypeError, "labels", "torch.Tensor", "list")(lambda: tokens(labels=[0, 0, 0, 0]))
case(ValueError, "labels", "meta", "cpu")(lambda: tokens(labels=torch.zeros(T, dtype=torch.long, device="meta")))
case(ValueError, "temperature", "> 0", "0")(lambda: tokens(temperature=0))
case(ValueError, "temperature", "> 0", "-1.0")(lambda: tokens(temperature=-1.0))
case(ValueError, "temperature", "finite", "nan")(lambda: tokens(temperature=float("nan")))
case(ValueError, "temperature", "finite", "inf")(lambda: tokens(temperature=float("inf")))
case(TypeError, "temperature", "number", "str")(lambda: tokens(temperature="1"))
case(TypeError, "temperature", "number", "bool")(lambda: tokens(temperature=True))
case(TypeError, "temperature", "number", "Tensor")(lambda: tokens(temperature=torch.tensor(1.0)))
case(TypeError, "ignore_index", "int", "NoneType")(lambda: tokens(ignore_index=None))
case(ValueError, "ignore_index", "2^63", "-9223372036854775809")(lambda: linear_tokens(ignore_index=-1 - 2**63))
case(ValueError, "backend", "auto, triton, eager, reference", "'magic'")(
    lambda: pk.token_log_probs(torch.zeros(T, V), torch.zeros(T, dtype=torch.long), backend="magic")
)

# --------------------------------------------------------------------------------------------------------------- head

case(TypeError, "hidden", "torch.Tensor", "NoneType")(lambda: linear_tokens(hidden=None))
case(TypeError, "hidden", "float32", "torch.int32")(lambda: linear_tokens(hidden=torch.zeros(T, H, dtype=torch.int32)))
case(TypeError, "weight", "torch.Tensor", "str")(lambda: linear_tokens(weight="lm_head"))
case(ValueError, "weight", "[V, H]", "[3]")(lambda: linear_tokens(weight=torch.zeros(H)))
case(ValueError, "weight", "hidden.shape[-1] = 3", "[7, 5]")(lambda: linear_tokens(weight=torch.zeros(V, 5)))
case(ValueError, "weight", "must be on cpu", "meta")(lambda: linear_tokens(weight=torch.zeros(V, H, device="meta")))
case(TypeError, "weight", "dtype of hidden, torch.float32", "torch.bfloat16", "autocast")(
    lambda: linear_tokens(weight=torch.zeros(V, H, dtype=torch.bfloat16))
)
case(TypeError, "bias", "dtype of hidden", "torch.float16")(
    lambda: linear_tokens(bias=torch.zeros(V, dtype=torch.float16))
)
case(ValueError, "bias", "[V] = [7]", "[6]")(lambda: linear_tokens(bias=torch.zeros(6)))
case(ValueError, "bias", "must be on cpu", "meta")(lambda: linear_tokens(bias=torch.zeros(V, device="meta")))
case(ValueError, "labels", "hidden.shape[:-1]", "[4]", "[2]")(
    lambda: linear_tokens(labels=torch.zeros(2, dtype=torch.long))
)
case(ValueError, "softcap", "> 0", "0")(lambda: linear_tokens(softcap=0))
case(ValueError, "logit_scale", "> 0", "-2")(lambda: linear_tokens(logit_scale=-2))
case(ValueError, "max_chunk_bytes", "positive integer or None", "0")(lambda: linear_tokens(max_chunk_bytes=0))
case(ValueError, "max_chunk_bytes", "positive integer or None", "1.5")(lambda: linear_tokens(max_chunk_bytes=1.5))
case(ValueError, "hidden", "packed [T, H]", "[1, 4, 3]", "gather")(
    lambda: linear_loss(hidden=torch.zeros(1, T, H), labels=torch.zeros(1, T, dtype=torch.long))
)

# ------------------------------------------------------------------------------------------------------------- labels

case(ValueError, "labels", "[0, 7)", "ignore_index=-100", "2 do not", "first is 7 at [1]")(
    lambda: tokens(labels=torch.tensor([0, 7, -100, -1]))
)
case(ValueError, "labels", "first is -1 at [1, 0]")(
    lambda: tokens(logits=torch.zeros(2, 2, V), labels=torch.tensor([[0, 1], [-1, 9]]))
)
case(ValueError, "labels", "[0, 7)", "first is 9 at [3]")(lambda: linear_tokens(labels=torch.tensor([0, 1, -100, 9])))
case(ValueError, "labels", "[0, 7)", "first is 9 at [2]")(lambda: linear_loss(labels=torch.tensor([0, 1, 9, 9])))
case(ValueError, "labels", "[0, 7)", "first is 9 at [2]")(
    lambda: linear_loss(labels=torch.tensor([0, 1, 9, 9]), weight=torch.zeros(V, H, requires_grad=True))
)
case(ValueError, "labels", "ignore_index=0", "first is -100 at [0]")(
    lambda: tokens(labels=torch.tensor([-100, 0, 1, 2]), ignore_index=0)
)
for name in ("eager", "triton", "reference"):  # the check is of the function, not of one backend
    case(ValueError, "labels", "[0, 7)", "first is 7 at [1]")(
        lambda name=name: pk.token_log_probs(torch.zeros(T, V), torch.tensor([0, 7, 1, 1]), backend=name)
    )
    case(ValueError, "labels", "[0, 7)", "first is 9 at [3]")(
        lambda name=name: linear_tokens(labels=torch.tensor([0, 1, -100, 9]), backend=name)
    )
    case(ValueError, "cu_seqlens", "start at 0", "end at the number of tokens, 4", "[0, 2, 3]")(
        lambda name=name: linear_loss(cu_seqlens=torch.tensor([0, 2, 3]), backend=name)
    )
    case(ValueError, "cu_lists", "end at the number of candidates, 2", "[0, 3]")(
        lambda name=name: linear_loss(cu_lists=torch.tensor([0, 3]), backend=name)
    )
    case(ValueError, "cu_lists", "end at the number of candidates, 6", "[0, 4]")(
        lambda name=name: loss(torch.zeros(6), torch.zeros(6), cu_lists=torch.tensor([0, 4]), backend=name)
    )

# -------------------------------------------------------------------------------------------------------------- lists

case(TypeError, "log_probs", "torch.Tensor", "list")(lambda: loss([[0.0]]))
case(TypeError, "log_probs", "float32", "torch.int64")(lambda: loss(torch.zeros(2, 3, dtype=torch.long)))
case(ValueError, "log_probs", "[G, k], or [S] together with cu_lists", "[6]")(
    lambda: loss(torch.zeros(6), torch.zeros(6))
)
case(ValueError, "log_probs", "[G, k]", "[1, 2, 3]")(lambda: loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)))
case(ValueError, "log_probs", "packed [S] when cu_lists is given", "[2, 3]")(
    lambda: loss(cu_lists=torch.tensor([0, 6]))
)
case(TypeError, "rewards", "torch.Tensor", "list")(lambda: loss(None, [[1.0]]))
case(TypeError, "rewards", "float32", "torch.int64")(lambda: loss(None, torch.zeros(2, 3, dtype=torch.long)))
case(ValueError, "rewards", "shape of log_probs, [2, 3]", "[3, 2]")(lambda: loss(None, torch.zeros(3, 2)))
case(ValueError, "rewards", "must not require grad", "rewards.detach()")(
    lambda: loss(None, torch.zeros(2, 3, requires_grad=True))
)
case(ValueError, "rewards", "must be on cpu", "meta")(lambda: loss(None, torch.zeros(2, 3, device="meta")))
case(ValueError, "ref_log_probs", "shape of log_probs", "[2, 2]")(lambda: loss(None, None, torch.zeros(2, 2)))
case(ValueError, "ref_log_probs", "must not require grad", "ref_log_probs.detach()")(
    lambda: loss(None, None, torch.zeros(2, 3, requires_grad=True))
)
case(TypeError, "valid", "bool", "torch.float32")(lambda: loss(valid=torch.ones(2, 3)))
case(TypeError, "valid", "torch.Tensor", "list")(lambda: loss(valid=[[True]]))
case(ValueError, "valid", "shape of log_probs", "[3]")(lambda: loss(valid=torch.ones(3, dtype=torch.bool)))
case(ValueError, "reduction", "'mean', 'sum' or 'none'", "'batchmean'")(lambda: loss(reduction="batchmean"))
case(ValueError, "beta", "> 0", "0")(lambda: loss(beta=0))
case(ValueError, "gamma", ">= 0", "-1")(lambda: loss(gamma=-1))
case(TypeError, "beta", "number", "str")(lambda: loss(beta="0.1"))
case(TypeError, "gamma", "number", "list")(lambda: loss(gamma=[]))

# ------------------------------------------------------------------------------------------------------------- layout

case(TypeError, "cu_seqlens", "torch.Tensor", "list")(lambda: linear_loss(cu_seqlens=[0, 2, 4]))
case(TypeError, "cu_seqlens", "int32", "torch.float32")(lambda: linear_loss(cu_seqlens=torch.tensor([0.0, 2.0, 4.0])))
case(TypeError, "cu_lists", "int32", "torch.int16")(
    lambda: linear_loss(cu_lists=torch.tensor([0, 2], dtype=torch.int16))
)
case(ValueError, "cu_lists", "one-dimensional", "[1, 2]")(lambda: linear_loss(cu_lists=torch.tensor([[0, 2]])))
case(ValueError, "cu_lists", "at least the element 0", "[0]")(
    lambda: linear_loss(cu_lists=torch.zeros(0, dtype=torch.int32))
)
case(ValueError, "rewards", "[S] = [2], as cu_seqlens says", "[3]")(lambda: linear_loss(rewards=torch.zeros(3)))
case(ValueError, "ref_log_probs", "[S] = [2]", "[1]")(lambda: linear_loss(ref_log_probs=torch.zeros(1)))
case(ValueError, "rewards", "must not require grad")(lambda: linear_loss(rewards=torch.ones(2, requires_grad=True)))
case(ValueError, "cu_seqlens", "must be on cpu", "meta")(
    lambda: linear_loss(cu_seqlens=torch.zeros(3, dtype=torch.int32, device="meta"))
)
case(ValueError, "cu_seqlens", "start at 0", "[1, 2, 4]")(lambda: linear_loss(cu_seqlens=torch.tensor([1, 2, 4])))
case(ValueError, "cu_seqlens", "never decrease", "[0, 5, 4]")(lambda: linear_loss(cu_seqlens=torch.tensor([0, 5, 4])))
case(ValueError, "cu_seqlens", "start at 0", "[1, 2, 4]")(
    lambda: linear_loss(cu_seqlens=torch.tensor([1, 2, 4]), weight=torch.zeros(V, H, requires_grad=True))
)
case(ValueError, "reduction", "'mean', 'sum' or 'none'", "None")(lambda: linear_loss(reduction=None))


@pytest.mark.parametrize(("call", "error", "fragments"), CASES)
def test_an_argument_that_does_not_fit_is_named_with_what_was_expected_and_what_came(call, error, fragments):
    with pytest.raises(error) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value), f"{fragment!r} is not in {str(caught.value)!r}"


def test_long_layouts_are_abbreviated():
    with pytest.raises(ValueError, match="…") as caught:
        loss(torch.zeros(6), torch.zeros(6), cu_lists=torch.zeros(1000, dtype=torch.int32))
    assert len(str(caught.value)) < 300


def test_a_reward_that_requires_grad_is_fine_under_no_grad():
    with torch.no_grad():
        loss(None, torch.zeros(2, 3, requires_grad=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on the CPU labels are always checked")
def test_on_a_gpu_labels_are_checked_on_request_only(monkeypatch, device):
    logits, labels = torch.zeros(2, V, device=device), torch.tensor([0, V], device=device)
    assert pk.token_log_probs(logits, labels).isnan().tolist() == [False, True]
    for on in ("1", "true"):
        monkeypatch.setenv("PERPO_CHECK", on)
        with pytest.raises(ValueError, match="labels must lie in"):
            pk.token_log_probs(logits, labels)


def test_perpo_check_decides_whether_a_device_is_asked(monkeypatch):
    """Values on a device are looked at, which synchronises, only with PERPO_CHECK=1; on the CPU always."""
    from perpo_kernels.checks import values_are_checked

    on_device = torch.empty(1, device="meta")
    for value, expected in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("PERPO_CHECK", value)
        assert values_are_checked(on_device) is expected
        assert values_are_checked(torch.empty(1))
    monkeypatch.delenv("PERPO_CHECK")
    assert not values_are_checked(on_device)
