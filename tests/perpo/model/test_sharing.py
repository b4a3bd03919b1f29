"""A packed row against a row for every candidate, on tiny models of every family: log-probs and all gradients."""

from __future__ import annotations

import copy
import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, masking_utils

from perpo.encoding.batch import ListBatch, candidate_tensors, separate_rows
from perpo.encoding.encoder import Encoder
from perpo.encoding.packed import packed_row
from perpo.encoding.positions import PromptPositions
from perpo.model import sharing
from perpo.model.language_head import accept_rows, causal_lm, response_hidden_states, token_log_probs
from perpo.prefix import attention, flex_attention, states
from perpo.prefix.attention import NAME
from tests.perpo import tiny_models
from tests.perpo.prefix.test_states import gated_delta_rule

VISION_FAMILIES = (*tiny_models.FAMILIES, *tiny_models.MORE_FAMILIES, *tiny_models.STAND_IN_FAMILIES)
FAMILIES = (*VISION_FAMILIES, *tiny_models.TEXT_FAMILIES)

EXACT = 1e-6  # some families compute rotary embeddings or a norm in fp32 whatever the weights' type

# Two lists: ragged, with an answer of one token (only the end of the turn), one without any token, and a repeat.
QUESTIONS = ("Where is it?", "What?")
ANSWERS = (("[0.1, 0.2]", "here it is", "", "here it is"), ("x", "[1, 2, 3, 4]"))


def batches(model: nn.Module, processor: Any, *, text_only: bool = False) -> tuple[ListBatch, ListBatch]:
    """The same two lists as one packed row and as a row for every candidate."""
    core = causal_lm(model)
    encoder = Encoder.for_model(processor, core)
    pictures = (None, None) if text_only else (tiny_models.picture(), tiny_models.picture((28, 60), seed=1))
    prompts = [
        {name: x.to(core.dtype) if x.is_floating_point() else x for name, x in encoder.prompt(words, picture).items()}
        for words, picture in zip(QUESTIONS, pictures, strict=True)
    ]
    responses = [[encoder.response(text) for text in texts] for texts in ANSWERS]
    responses[0][3] = []  # cut to nothing
    known = candidate_tensors(responses)
    inputs, rows, n_tokens = separate_rows(prompts, responses, encoder.pad_id, encoder.answer_values)
    separate = ListBatch(inputs, rows, **known, n_tokens=n_tokens)
    positions = PromptPositions(core)
    inputs, rows, layout = packed_row(prompts, responses, positions, encoder.answer_values)
    inputs, host = positions.without_waits(inputs)
    return ListBatch(inputs, rows, **known, layout=layout, n_tokens=layout.n_tokens, host=host), separate


@pytest.fixture(autouse=True)
def _gated_delta_rule_in_float64(monkeypatch: Any) -> None:
    """transformers' own computes in fp32 whatever its inputs are; tests/perpo/prefix/test_states.py runs that."""
    for kind in ("qwen3_5", "qwen3_5_moe", "qwen3_next"):
        module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", gated_delta_rule)


def built(family: str) -> tuple[Any, Any, bool]:
    """In float64, so that nothing hides behind rounding; some gradients are 0 but for that."""
    model, processor = tiny_models.build(family, dtype=torch.float64)
    if family == "gemma2":
        model.set_attn_implementation("eager")  # the only one that knows its soft cap
    if family in tiny_models.EXPERT_FAMILIES:
        model.set_experts_implementation("eager")  # the only one that takes float64
    return model, processor, family in tiny_models.TEXT_FAMILIES


def with_gradients(model: nn.Module, batch: ListBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Token log-probs, and the gradient of a weighted sum of them for every parameter that has one."""
    model.zero_grad()
    log_probs = token_log_probs(model, batch)
    (log_probs * torch.linspace(-1, 1, len(log_probs)).cos()).sum().backward()
    return log_probs.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = (ours[name] - expected).norm() / (expected.norm() + 1e-3)
        assert error <= EXACT, f"{name}: {error}"


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_all_gradients_are_those_of_separate_rows(family: str) -> None:
    model, processor, text_only = built(family)
    packed, separate = batches(model, processor, text_only=text_only)
    expected = with_gradients(model, separate)
    assert sharing.prepare(model, "on") is not None
    log_probs, gradients = with_gradients(model, packed)
    torch.testing.assert_close(log_probs, expected[0], atol=EXACT, rtol=EXACT)
    assert_same_gradients(gradients, expected[1])
    if not text_only:
        assert any("vision" in name or "visual" in name for name in gradients), "the vision tower has gradients"


@pytest.mark.parametrize("family", VISION_FAMILIES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(family: str, reentrant: bool) -> None:
    model, processor, _ = built(family)
    packed, separate = batches(model, processor)
    expected = with_gradients(model, separate)
    sharing.prepare(model, "on")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    log_probs, gradients = with_gradients(model, packed)
    torch.testing.assert_close(log_probs, expected[0], atol=EXACT, rtol=EXACT)
    assert_same_gradients(gradients, expected[1])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "qwen3_5"])
def test_adapters_get_the_gradients_of_separate_rows(family: str) -> None:
    model, processor, _ = built(family)
    packed, separate = batches(model, processor)
    layers = ["q_proj", "v_proj", "down_proj", "in_proj_qkv", "in_proj_a"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=layers, init_lora_weights=False))
    _, theirs = with_gradients(adapted, separate)
    sharing.prepare(adapted, "on")
    _, ours = with_gradients(adapted, packed)
    assert ours
    assert all("lora" in name for name in ours)
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_image_and_prompt_are_computed_once_a_list(family: str) -> None:
    model, processor, _ = built(family)
    packed, separate = batches(model, processor)
    sharing.prepare(model, "on")
    accept_rows(model)
    rows_seen = []
    core = causal_lm(model)
    tower = core.get_encoder(modality="image")
    first = next(module for module in tower.modules() if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear))
    hooks = [
        first.register_forward_hook(lambda m, x, out: rows_seen.append(("pixels", x[0].numel()))),
        core.get_decoder().layers[0].register_forward_hook(lambda m, x, out: rows_seen.append(("tokens", x[0].shape))),
    ]
    with torch.no_grad():
        response_hidden_states(model, packed)
        shared, rows_seen[:] = list(rows_seen), []
        response_hidden_states(model, separate)
    for hook in hooks:
        hook.remove()
    pixels = [sum(n for kind, n in seen if kind == "pixels") for seen in (shared, rows_seen)]
    each = [4, 2]  # candidates of the two lists, whose images may be of different sizes
    assert pixels[0] * min(each) <= pixels[1] <= pixels[0] * max(each) * 2
    assert pixels[0] < pixels[1] / 2
    layout = packed.layout
    assert layout is not None
    assert [shape[:2] for kind, shape in shared if kind == "tokens"] == [(1, layout.n_tokens)]
    fed = sum(n for answers in layout.answer_lengths for n in answers)
    assert layout.n_tokens == sum(layout.prompt_lengths) + fed
    assert layout.n_separate == separate.n_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mask_is_made_for_a_packed_row_and_nothing_is_read_back(family: str, monkeypatch: Any) -> None:
    model, processor, text_only = built(family)
    packed, _ = batches(model, processor, text_only=text_only)
    sharing.prepare(model, "on")
    decoder = causal_lm(model).get_decoder()
    seen = []
    hook = decoder.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", None)  # it would wait for the GPU
    with torch.no_grad():
        response_hidden_states(model, packed)
    hook.remove()
    carries_state = decoder.config.layer_types[0] in states.MODULES if hasattr(decoder.config, "layer_types") else False
    assert seen == [packed.layout if carries_state else None]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3_5_text"])  # one with a window, one with a state
def test_a_compiled_model_gives_the_same(family: str) -> None:
    model, processor, _ = built(family)
    packed, _ = batches(model, processor, text_only=True)
    sharing.prepare(model, "on")
    accept_rows(model)
    compiled = torch.compile(model, backend="eager")
    expected, ours = with_gradients(model, packed), with_gradients(compiled, packed)
    torch.testing.assert_close(ours[0], expected[0])
    assert_same_gradients({name.removeprefix("_orig_mod."): g for name, g in ours[1].items()}, expected[1])


def test_a_model_that_takes_packed_rows_takes_all_others_as_before() -> None:
    for family in ("llava", "qwen2_vl", "gemma3", "qwen3_5"):
        model, processor, _ = built(family)
        plain = copy.deepcopy(model).eval()
        model.eval()
        sharing.prepare(model, "on")
        assert model.config.get_text_config()._attn_implementation == NAME
        inputs = Encoder.for_model(processor, model).prompt("Where?", tiny_models.picture())
        torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits)
        options = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(model.generate(**inputs, **options), plain.generate(**inputs, **options))


def test_a_model_that_is_not_exact_is_found_out_and_named() -> None:
    model, processor, _ = built("qwen2_5_vl")
    packed, separate = batches(model, processor)
    sharing.prepare(model, "on")
    sharing.check_exact(model, packed, separate)
    packed.inputs["position_ids"] = torch.arange(packed.layout.n_tokens).expand(3, 1, -1)  # not those of the answers
    with pytest.raises(sharing.SharingNotExact, match="Qwen2_5_VLForConditionalGeneration gives other log-probs"):
        sharing.check_exact(model, packed, separate)
    assert model.training


def test_an_unknown_architecture_is_not_shared_unless_asked_for(caplog: Any, monkeypatch: Any) -> None:
    model, _, _ = built("llava")
    monkeypatch.setattr(sharing, "VERIFIED", ())
    monkeypatch.setattr(sharing.logger, "propagate", True)
    assert sharing.prepare(model, "auto") is None
    assert "k(P + R) tokens instead of P + kR" in caplog.text
    assert model.config.text_config._attn_implementation != NAME
    assert sharing.prepare(model, "on") is not None


def text_model(kind: str, **options: Any) -> Any:
    sizes = {"vocab_size": 64, "num_local_experts": 4, "moe_intermediate_size": 16}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**tiny_models.TEXT, **sizes, **options}))


def test_layers_whose_state_cannot_be_handed_on_are_refused(monkeypatch: Any) -> None:
    model = text_model("falcon_h1", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8)
    assert sharing.prepare(model, "auto") is None
    with pytest.raises(ValueError, match="FalconH1ForCausalLM has layers of type hybrid, which carry a state"):
        sharing.prepare(model, "on")
    model = text_model("bamba", attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8)
    with pytest.raises(ValueError, match=r"linear_attention, .* and BambaDecoderLayer has no module 'linear_attn'"):
        sharing.prepare(model, "on")
    model, _, _ = built("lfm2")
    conv = type(model.model.layers[0].conv)
    monkeypatch.setattr(conv, "forward", lambda self, x, past: x)
    with pytest.raises(ValueError, match=r"Lfm2ShortConv\.forward takes x, past; expected hidden_states, attention"):
        sharing.prepare(model, "on")


def test_obstacles_are_refused_with_their_reason() -> None:
    model, _, _ = built("llava")
    model.config.text_config.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"has attention_dropout=0\.1"):
        sharing.prepare(model, "on")
    model, _, _ = built("qwen2")
    model.config.layer_types = ["chunked_attention", "full_attention"]
    assert sharing.obstacle(model) == (
        "has layers of type chunked_attention, which attention over shared prompts does not know"
    )
    model.config.layer_types = ["moe", "full_attention"]  # each token on its own
    assert sharing.obstacle(model) is None


def test_attention_sinks_are_found_inside_a_known_architecture(caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sharing.logger, "propagate", True)
    _, config, _ = tiny_models._internvl()
    text = {"model_type": "gpt_oss", "num_local_experts": 4, "head_dim": 8, "vocab_size": 300, **tiny_models.TEXT}
    config = type(config)(text_config=text, vision_config=config.vision_config, image_token_id=config.image_token_id)
    model = AutoModelForImageTextToText.from_config(config)
    assert model.config.model_type in sharing.VERIFIED
    assert sharing.prepare(model, "auto") is None
    assert "InternVLForConditionalGeneration has attention sinks" in caplog.text


def test_a_known_architecture_around_an_unknown_language_model_is_not_shared_by_default(
    caplog: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(sharing.logger, "propagate", True)
    model, _, _ = built("llava")
    model.config.text_config.model_type = "olmo"
    assert sharing.prepare(model, "auto") is None
    assert "holds a language model of type 'olmo', which sharing was not verified on" in caplog.text
    assert sharing.prepare(model, "on") is not None


def test_a_soft_cap_is_shared_where_separate_rows_have_it_and_it_is_worth_it(caplog: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sharing.logger, "propagate", True)
    model, _, _ = built("gemma2")
    model.config._attn_implementation = "sdpa"  # newer transformers refuse to set it for Gemma 2
    with pytest.raises(ValueError, match="attn_implementation='sdpa' leaves out; load it with attn_implementation='e"):
        sharing.prepare(model, "on")
    model.set_attn_implementation("eager")
    assert sharing.prepare(model, "auto") is None
    assert "'cpu' has no FlexAttention" in caplog.text
    monkeypatch.setattr(flex_attention, "has_triton", lambda: True)
    assert sharing.prepare(model, "auto", "cuda") is not None
    assert sharing.prepare(model, "on") is not None


def test_the_table_in_the_docs_is_that_of_these_tests() -> None:
    """PERPO_WRITE_DOCS=1 writes it."""
    rows = ["| `model_type` | class | tokens of a prompt see | positions |", "|---|---|---|---|"]
    found, texts = {}, set()
    for family in FAMILIES:
        model, _, _ = built(family)
        texts.add(model.config.get_text_config().model_type)
        kind = model.config.model_type
        positions = PromptPositions(model)
        sees = {"gemma3": "those before them, and all of their image", "paligemma": "the whole prompt"}
        axes = "three axes (M-RoPE)" if positions.body is not None else "one axis"
        found[kind] = f"| {kind} | {type(model).__name__} | {sees.get(kind, 'those before them')} | {axes} |"
    assert set(found) == set(sharing.VERIFIED)
    assert texts == set(sharing.VERIFIED_TEXT)
    rows += [found[kind] for kind in sharing.VERIFIED]
    page = Path(__file__).parents[3] / "docs" / "shared_prefix.md"
    text, _, _ = page.read_text(encoding="utf-8").partition("| `model_type` |")
    if os.environ.get("PERPO_WRITE_DOCS"):
        page.write_text(text + "\n".join(rows) + "\n", encoding="utf-8")
    assert page.read_text(encoding="utf-8") == text + "\n".join(rows) + "\n"


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_the_attention_that_a_user_chose_stays_for_all_other_calls(family: str) -> None:
    model, _, _ = built(family)
    model.set_attn_implementation("eager")
    plain = copy.deepcopy(model).eval()
    model.eval()
    sharing.prepare(model, "on")
    ids = torch.randint(0, 200, (2, 30), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)  # bitwise: sdpa rounds otherwise


def test_it_is_said_if_other_calls_run_otherwise_than_chosen(caplog: Any, monkeypatch: Any) -> None:
    model, _, _ = built("llava")
    monkeypatch.setattr(attention.logger, "propagate", True)
    sharing.prepare(model, "on")
    sharing.prepare(model, "on")
    assert "attn_implementation" not in caplog.text
    model.set_attn_implementation("flex_attention")
    sharing.prepare(model, "on")
    assert "attn_implementation='flex_attention': what LlavaForConditionalGeneration's language" in caplog.text
