"""Tensors from elsewhere: other devices, inference mode, sparse, sharded; and arguments that a caller got wrong."""

import pytest
import torch

import perpo_kernels as pk
from perpo_kernels.objectives import Objective

T, V, H = 4, 7, 3
LABELS = torch.tensor([1, 0, 3, 2])


def packed(device="cpu"):
    return {
        "cu_seqlens": torch.tensor([0, 2, 4], dtype=torch.int32, device=device),
        "cu_lists": torch.tensor([0, 2], dtype=torch.int32, device=device),
    }


def linear_loss(hidden=None, weight=None, labels=LABELS, rewards=None, **rest):
    torch.manual_seed(0)
    hidden = torch.randn(T, H) if hidden is None else hidden
    weight = torch.randn(V, H) if weight is None else weight
    rewards = torch.tensor([1.0, 0.0]) if rewards is None else rewards
    return pk.linear_perpo_loss(hidden, weight, labels, rewards, **{**packed(), **rest})


# ------------------------------------------------------------------------------------------------------ inference mode


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_layout_made_under_inference_mode(backend, device, reduction, trainable):
    with torch.inference_mode():
        layout = packed(device)
        rewards = torch.tensor([1.0, 0.0], device=device)
        references = torch.tensor([-1.0, -2.0], device=device)
        labels = LABELS.to(device).clone()
    hidden = torch.randn(T, H, device=device, requires_grad=True)
    weight = torch.randn(V, H, device=device, requires_grad=trainable)
    ours = pk.linear_perpo_loss(
        hidden, weight, labels, rewards, ref_log_probs=references, reduction=reduction, backend=backend, **layout
    )
    plain = pk.linear_perpo_loss(
        hidden,
        weight,
        labels.clone(),
        rewards.clone(),
        ref_log_probs=references.clone(),
        reduction=reduction,
        backend=backend,
        **packed(device),
    )
    leaves = [x for x in (hidden, weight) if x.requires_grad]
    for a, b in zip(
        torch.autograd.grad(ours.loss.sum(), leaves), torch.autograd.grad(plain.loss.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_lists_made_under_inference_mode(backend, device, reduction):
    with torch.inference_mode():
        cu_lists = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
        rewards = torch.rand(5, device=device)
        valid = torch.ones(5, dtype=torch.bool, device=device)
    log_probs = torch.randn(5, device=device, requires_grad=True)
    pk.perpo_loss(
        log_probs, rewards, cu_lists=cu_lists, valid=valid, reduction=reduction, backend=backend
    ).sum().backward()
    assert log_probs.grad.abs().sum() > 0


@pytest.mark.parametrize("linear", [False, True])
def test_labels_made_under_inference_mode(backend, device, linear):
    with torch.inference_mode():
        labels = LABELS.to(device).clone()
    x = torch.randn(T, H if linear else V, device=device, requires_grad=True)
    if linear:
        weight = torch.randn(V, H, device=device, requires_grad=True)
        pk.linear_token_log_probs(x, weight, labels, backend=backend).sum().backward()
        assert weight.grad.abs().sum() > 0
    else:
        pk.token_log_probs(x, labels, backend=backend).sum().backward()
    assert x.grad.abs().sum() > 0


# -------------------------------------------------------------------------------------------------------- meta tensors


def test_shapes_on_meta_tensors():
    meta = torch.device("meta")
    hidden, weight = torch.empty(T, H, device=meta), torch.empty(V, H, device=meta, requires_grad=True)
    labels = torch.empty(T, dtype=torch.long, device=meta)
    assert pk.linear_token_log_probs(hidden, weight, labels).shape == (T,)
    for reduction, shape in (("mean", ()), ("none", (1,))):
        out = pk.linear_perpo_loss(
            hidden, weight, labels, torch.empty(2, device=meta), reduction=reduction, **packed(meta)
        )
        assert out.loss.shape == shape
        assert out.log_probs.shape == (2,)
    assert pk.token_log_probs(torch.empty(T, V, device=meta), labels).shape == (T,)
    assert pk.perpo_loss(torch.empty(2, 3, device=meta), torch.empty(2, 3, device=meta)).shape == ()


# ------------------------------------------------------------------------------------------------------------ refusals


def refused(kind, *words, call):
    with pytest.raises(kind) as caught:
        call()
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))


def test_tensors_on_another_device():
    scores = torch.randn(2, 3)
    elsewhere = {"device": "meta"}
    refused(
        ValueError,
        "cu_lists",
        "meta",
        call=lambda: pk.perpo_loss(
            torch.randn(6), torch.rand(6), cu_lists=torch.tensor([0, 3, 6], dtype=torch.int32, **elsewhere)
        ),
    )
    given = pk.objectives.Objective(pairs="given", weight="uniform")
    refused(
        ValueError,
        "pair_weights",
        "meta",
        call=lambda: pk.perpo_loss(
            scores, torch.rand(2, 3), pair_weights=torch.ones(2, 3, 3, **elsewhere), objective=given
        ),
    )
    refused(
        ValueError,
        "pair_weights",
        "meta",
        call=lambda: linear_loss(pair_weights=torch.ones(1, 2, 2, **elsewhere), objective=given),
    )
    refused(ValueError, "cu_lists", "meta", call=lambda: linear_loss(cu_lists=packed("meta")["cu_lists"]))
    refused(ValueError, "cu_seqlens", "meta", call=lambda: linear_loss(cu_seqlens=packed("meta")["cu_seqlens"]))


def test_what_is_no_tensor_or_not_of_the_right_kind():
    scores = torch.randn(2, 3)
    refused(TypeError, "rewards", "NoneType", call=lambda: pk.perpo_loss(scores, None))
    refused(TypeError, "rewards", "list", call=lambda: linear_loss(rewards=[1.0, 0.0]))
    refused(TypeError, "rewards", "torch.int64", ".float()", call=lambda: linear_loss(rewards=torch.tensor([1, 0])))
    refused(TypeError, "rewards", ".float()", call=lambda: pk.perpo_loss(scores, torch.ones(2, 3, dtype=torch.int32)))
    refused(TypeError, "rewards", ".float()", call=lambda: pk.perpo_loss(scores, torch.ones(2, 3, dtype=torch.bool)))
    refused(ValueError, "max_chunk_bytes", "10000", call=lambda: linear_loss(max_chunk_bytes=10**30))
    refused(TypeError, "max_chunk_bytes", "bool", call=lambda: linear_loss(max_chunk_bytes=True))


def test_sparse_tensors():
    sparse = torch.eye(3)[:2].to_sparse()
    refused(TypeError, "log_probs", "sparse", ".to_dense()", call=lambda: pk.perpo_loss(sparse, torch.rand(2, 3)))
    refused(TypeError, "rewards", "sparse", ".to_dense()", call=lambda: pk.perpo_loss(torch.randn(2, 3), sparse))
    refused(TypeError, "weight", "sparse", call=lambda: linear_loss(weight=torch.randn(V, H).to_sparse()))
    refused(TypeError, "hidden", "sparse", call=lambda: linear_loss(hidden=torch.randn(T, H).to_sparse_csr()))
    refused(TypeError, "logits", "sparse", call=lambda: pk.token_log_probs(torch.randn(T, V).to_sparse(), LABELS))


@pytest.mark.parametrize(
    ("lengths", "kind", "words"),
    [
        (torch.tensor([[1.0, float("nan"), 2.0]]), ValueError, ("lengths", "nan")),
        (torch.tensor([[1, -2, 2]]), ValueError, ("lengths", "-2")),
        (torch.tensor([[True, True, False]]), TypeError, ("lengths", "torch.bool")),
        (torch.tensor([[1.0, float("inf"), 2.0]]), ValueError, ("lengths", "inf")),
    ],
)
def test_lengths_that_are_none(lengths, kind, words):
    for backend in ("eager", "triton", "reference"):
        refused(
            kind,
            *words,
            call=lambda backend=backend: pk.perpo_loss(
                torch.randn(1, 3), torch.rand(1, 3), lengths=lengths, objective=pk.objectives.simpo(), backend=backend
            ),
        )


def test_rows_of_which_there_are_none_and_a_strided_vocabulary(backend, device):
    empty = torch.zeros(0, V, device=device, requires_grad=True)
    log_probs = pk.token_log_probs(empty, torch.zeros(0, dtype=torch.long, device=device), backend=backend)
    log_probs.sum().backward()
    assert empty.grad.shape == (0, V)
    strided = torch.randn(V, 0, device=device).t()
    assert pk.token_log_probs(strided, torch.zeros(0, dtype=torch.long, device=device), backend=backend).shape == (0,)
    columns = torch.randn(V, T, device=device).t().requires_grad_()
    labels = LABELS.to(device)
    ours = pk.token_log_probs(columns, labels, backend=backend)
    torch.testing.assert_close(ours, torch.log_softmax(columns, -1).gather(-1, labels[:, None])[:, 0])


def test_a_weight_that_is_sharded(tmp_path):
    refused(
        ValueError,
        "weight",
        "sharded",
        "GatheredParameters",
        "perpo.list_loss",
        call=lambda: linear_loss(weight=torch.empty(0)),
    )
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        weight = distribute_tensor(torch.randn(V, H), init_device_mesh("cpu", (1,)), [Shard(0)])
        for call in (
            lambda: linear_loss(weight=weight),
            lambda: pk.linear_token_log_probs(torch.randn(T, H), weight, LABELS),
        ):
            refused(TypeError, "weight", "DTensor", "full_tensor()", "forward", "perpo.list_loss", call=call)
        sharded = distribute_tensor(torch.randn(T, H), weight.device_mesh, [Shard(0)])
        refused(TypeError, "hidden", "DTensor", call=lambda: linear_loss(hidden=sharded))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "fields",
    [
        {"pairs": "none", "list_term": "softmax", "offset": 1.0},
        {"pairs": "none", "list_term": "softmax", "log_margin": 1.0},
        {"pairs": "none", "list_term": "softmax", "gamma": 3.0},
        {"pairs": "none", "list_term": "softmax", "weight": "lambda"},
        {"pairs": "none", "list_term": "softmax", "link": "hinge"},
        {"pairs": "none", "list_term": "softmax", "normalize": "pairs"},
        {"weight": "uniform", "gamma": 3.0},
        {"weight": "lambda", "gamma": 3.0},
        {"pairs": "given", "weight": "uniform", "gamma": 3.0},
    ],
)
def test_fields_of_an_objective_that_it_would_ignore(fields):
    refused(ValueError, next(reversed(fields)), call=lambda: Objective(**fields))


# ---------------------------------------------------------------------------------------------------------- references


def test_three_thirds_in_a_low_precision():
    references = torch.randn(3, 5)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        ours = pk.combine_references(references, torch.full((3,), 1 / 3, dtype=dtype))
        torch.testing.assert_close(ours, pk.combine_references(references), rtol=0, atol=1e-6)
        refused(
            ValueError,
            "weights",
            "add up to 1",
            call=lambda dtype=dtype: pk.combine_references(references, torch.tensor([0.34, 0.34, 0.33], dtype=dtype)),
        )


def test_weights_of_references_compile_without_a_graph_break():
    weights = torch.tensor([0.25, 0.75])
    compiled = torch.compile(lambda x: pk.combine_references(x, weights), fullgraph=True, backend="aot_eager")
    references = torch.randn(2, 5)
    torch.testing.assert_close(compiled(references), pk.combine_references(references, weights))
