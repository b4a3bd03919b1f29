"""Layers that carry a state over a packed row, against a row of its own for every answer."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from perpo.prefix.layout import PrefixLayout
from perpo.prefix.states import register_states
from tests.perpo import tiny_models
from tests.perpo.prefix.test_attention import SHAPES, layout_of

KINDS = {"qwen3_5_text": "linear_attn", "qwen3_next": "linear_attn", "lfm2": "conv"}
RAGGED = [(9, [3, 0, 7, 1]), (2, []), (70, [66, 2]), (1, [1, 1]), (3, [0])]  # also past a chunk of 64 tokens


def gated_delta_rule(
    query: Tensor,  # [B, L, heads, D]
    key: Tensor,  # [B, L, heads, D]
    value: Tensor,  # [B, L, value heads, Dv]
    g: Tensor,  # [B, L, value heads]
    beta: Tensor,  # [B, L, value heads]
    initial_state: Tensor | None = None,  # [B, value heads, D, Dv]
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """S ← e^g S, then S ← S + β k (v − kᵀS), o = qᵀS / √D, token by token, in the precision of the inputs."""
    assert use_qk_l2norm_in_kernel
    groups = value.shape[2] // key.shape[2]
    query, key = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (query, key))
    query, key = (x.repeat_interleave(groups, 2).transpose(1, 2).double() for x in (query, key))
    value, g, beta = (x.transpose(1, 2).double() for x in (value, g, beta))
    state = query.new_zeros(*query.shape[:2], query.shape[-1], value.shape[-1])
    if initial_state is not None:
        state = initial_state.double()
    out = []
    for t in range(query.shape[2]):
        state = state * g[:, :, t, None, None].exp()
        seen = torch.einsum("bhk,bhkv->bhv", key[:, :, t], state)
        change = beta[:, :, t, None] * (value[:, :, t] - seen)
        state = state + key[:, :, t, :, None] * change[:, :, None]
        out.append(torch.einsum("bhk,bhkv->bhv", query[:, :, t], state) / query.shape[-1] ** 0.5)
    return torch.stack(out, 1).to(kwargs.get("dtype", g.dtype)), state if output_final_state else None


def in_float64(kind: str, monkeypatch: Any) -> None:
    name = kind.removesuffix("_text")
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    if hasattr(module, "torch_chunk_gated_delta_rule"):
        monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", gated_delta_rule)


def model_of(kind: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    sizes = {**tiny_models.TEXT, **tiny_models.OWN[kind]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=64, **sizes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def mixer(model: Any, kind: str) -> tuple[nn.Module, nn.Module]:
    layer = model.get_decoder().layers[0]
    return layer, getattr(layer, KINDS[kind])


def hidden_of(layout: PrefixLayout, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, layout.n_tokens, tiny_models.HIDDEN, generator=generator)
    return x.to(dtype).requires_grad_()


def separately(module: nn.Module, hidden: Tensor, layout: PrefixLayout) -> Tensor:
    out = torch.zeros_like(hidden)
    for prompt, answers in zip(layout.prompts, layout.answers, strict=True):
        for answer in [(0, 0), *answers]:
            index = torch.cat((torch.arange(*prompt), torch.arange(*answer)))
            new = index if answer == (0, 0) else index[prompt[1] - prompt[0] :]
            row = module(hidden_states=hidden[:, index])
            out = out.index_copy(1, new, row[:, len(index) - len(new) :])
    return out


def with_gradients(out: Tensor, hidden: Tensor, module: nn.Module) -> list[Tensor]:
    towards = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).sin()
    return [out, *torch.autograd.grad(out, [hidden, *module.parameters()], towards.to(out.dtype))]


def assert_same(ours: list[Tensor], theirs: list[Tensor], allowed: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= allowed * (b.norm() + 1e-3)


def both_ways(kind: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of a packed row, and of separate rows."""
    model, layout = model_of(kind, dtype), layout_of(RAGGED)
    hidden = hidden_of(layout, dtype)
    _, module = mixer(model, kind)
    expected = with_gradients(separately(module, hidden, layout), hidden, module)
    register_states(model)
    return with_gradients(module(hidden_states=hidden, attention_mask=layout), hidden, module), expected


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_separate_rows(kind: str, monkeypatch: Any) -> None:
    in_float64(kind, monkeypatch)
    assert_same(*both_ways(kind, torch.float64), 1e-6)  # Qwen's gated norm computes in fp32


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_row_is_as_near_to_the_truth_as_separate_rows(kind: str) -> None:
    """In fp32, with the chunks of 64 tokens of transformers, which begin elsewhere in a packed row."""
    ours, theirs = both_ways(kind, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        in_float64(kind, patch)
        _, truth = both_ways(kind, torch.float64)
    for a, b, exact in zip(ours, theirs, truth, strict=True):
        assert (a - exact).norm() <= 2 * (b - exact).norm()


@settings(max_examples=20, deadline=None)
@given(shapes=SHAPES)
def test_any_layout(shapes: Any) -> None:
    layout = layout_of(shapes)
    hidden = hidden_of(layout, torch.float64)
    model = model_of("lfm2", torch.float64)
    _, module = mixer(model, "lfm2")
    expected = with_gradients(separately(module, hidden, layout), hidden, module)
    register_states(model)
    assert_same(with_gradients(module(hidden, attention_mask=layout), hidden, module), expected, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_computed_once_and_answers_as_one_batch(kind: str) -> None:
    model = model_of(kind, torch.float32)
    register_states(model)
    _, module = mixer(model, kind)
    layout = layout_of([(50, [4, 6, 5]), (20, [3])])
    seen = []
    first = next(child for child in module.modules() if isinstance(child, nn.Linear))
    first.register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].shape[:2])))
    module(hidden_states=hidden_of(layout, torch.float32), attention_mask=layout)
    assert seen == [(1, 50), (3, 6), (1, 20), (1, 3)]


@pytest.mark.parametrize("kind", KINDS)
def test_other_calls_and_copies_are_as_before(kind: str) -> None:
    model = model_of(kind, torch.float32).eval()
    ids = torch.arange(10).unsqueeze(0)
    plain = model(input_ids=ids).logits
    tokens = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    register_states(model)
    register_states(model)
    layer, module = mixer(model, kind)
    assert len(layer._forward_pre_hooks) == 1
    assert torch.equal(model(input_ids=ids).logits, plain)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False), tokens)
    other = copy.deepcopy(model)
    nn.init.zeros_(module.out_proj.weight)  # of the first, not of its copy
    assert torch.equal(other(input_ids=ids).logits, plain)


def test_the_layout_reaches_layers_that_are_handed_no_other_keywords() -> None:
    model = model_of("lfm2", torch.float32)
    register_states(model)
    layer, module = mixer(model, "lfm2")
    layout = layout_of([(5, [2, 3])])
    hidden = hidden_of(layout, torch.float32)
    expected = hidden + module(layer.operator_norm(hidden), attention_mask=layout)
    expected = expected + layer.feed_forward(layer.ffn_norm(expected))
    assert torch.equal(layer(hidden, attention_mask=None, prefix_layout=layout), expected)


def test_a_row_that_is_not_of_the_layout_is_refused() -> None:
    model = model_of("lfm2", torch.float32)
    register_states(model)
    _, module = mixer(model, "lfm2")
    layout = layout_of([(5, [2, 3])])
    with pytest.raises(ValueError, match=r"made for one row of 10 tokens, got hidden states \(1, 9, 32\)"):
        module(hidden_states=hidden_of(layout, torch.float32)[:, 1:], attention_mask=layout)
