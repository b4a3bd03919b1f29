"""`perpo.list_loss` on any model in any wrapping is the loss through all logits: value, log-probs, every gradient.

In float64, so that nothing but the mathematics is compared.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    Qwen2Config,
    T5Config,
    T5ForConditionalGeneration,
)

import perpo
from perpo.encoding.encoder import Encoder
from perpo_kernels import checks, layout, linear_perpo_loss, objectives

from ...processes import ROOT, ranks
from .. import tiny_models
from ..training.test_step_waits import waits
from .padded_batches import CU_LISTS, batch, gradients, plain_log_probs, plain_loss

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "tied": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "soft cap": lambda: Gemma2Config(**SIZES, final_logit_softcapping=0.5, attn_implementation="eager"),
    "logit scale": lambda: CohereConfig(**SIZES, logit_scale=0.25),
    "logits scaling": lambda: GraniteConfig(**SIZES, logits_scaling=4.0),
}
ADAPTERS = {
    "lora": {"target_modules": ["q_proj", "v_proj"]},
    "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind if kind in CONFIGS else "llama"]()).double()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    if kind in ADAPTERS:
        model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, lora_dropout=0.0, **ADAPTERS[kind]))
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.double()


def assert_equal_to_logits(model: Any, called: Any = None, tolerance: float = 1e-11) -> None:
    """Loss, log-probs and gradients of `called`, which wraps `model`."""
    data, called = batch(), model if called is None else called
    rewards, refs = data["rewards"].double(), -torch.linspace(5, 9, 5, dtype=torch.float64)
    out = perpo.list_loss(called, **data | {"rewards": rewards}, cu_lists=CU_LISTS, ref_log_probs=refs)
    out.loss.backward()
    ours = gradients(model)
    log_probs = plain_log_probs(model, data["inputs"], data["labels"])
    loss = plain_loss(log_probs, rewards, refs)
    loss.backward()
    plain = gradients(model)
    near: dict[str, Any] = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(out.loss, loss, **near)
    torch.testing.assert_close(out.log_probs, log_probs.detach(), **near)
    assert ours.keys() == plain.keys()
    assert ours
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, plain[name], **near, msg=name)


@pytest.mark.parametrize("kind", [*CONFIGS, *ADAPTERS])
def test_it_is_the_loss_through_all_logits(kind: str) -> None:
    model = model_of(kind)
    assert_equal_to_logits(model)
    trained = "".join(name for name, p in model.named_parameters() if p.requires_grad)
    assert ("lm_head" in trained) == (kind not in ("tied", "lora")) or kind in ("soft cap", "logit scale")


@pytest.mark.parametrize("kind", ["tied", "soft cap", "lora on the head"])
def test_sequence_log_probs_are_those_through_all_logits_and_differentiable(kind: str) -> None:
    model, data = model_of(kind), batch()
    upstream = torch.randn(5, dtype=torch.float64)
    ours = perpo.sequence_log_probs(model, data["inputs"], data["labels"])
    (ours * upstream).sum().backward()
    grads = gradients(model)
    plain = plain_log_probs(model, data["inputs"], data["labels"])
    (plain * upstream).sum().backward()
    torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-11)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-11, atol=1e-11, msg=name)


def test_a_model_that_is_its_own_reference_has_scores_of_zero() -> None:
    model, data = model_of("llama").float(), batch()
    with torch.no_grad():
        refs = perpo.sequence_log_probs(model, data["inputs"], data["labels"])
    out = perpo.list_loss(model, **data, cu_lists=CU_LISTS, ref_log_probs=refs)
    assert not refs.requires_grad
    assert out.log_probs.dtype == refs.dtype == torch.float32
    assert not out.scores.any()


def test_the_reference_with_adapters_off_is_that_of_the_base() -> None:
    model, data = model_of("lora on the head"), batch()
    perpo.list_loss(model, **data, cu_lists=CU_LISTS)
    with torch.no_grad(), model.disable_adapter():
        refs = perpo.sequence_log_probs(model, data["inputs"], data["labels"])
        plain = plain_log_probs(model, data["inputs"], data["labels"])
    torch.testing.assert_close(refs, plain)


def test_pictures_go_through_and_a_picture_matters() -> None:
    model, processor = tiny_models.build("llava")
    encoder = Encoder.for_model(processor, model)
    prompt = encoder.prompt("Where?", tiny_models.picture())
    answers = torch.randint(3, 200, (3, 4))
    ids = torch.cat([prompt["input_ids"].expand(3, -1), answers], 1)
    labels = torch.cat([torch.full_like(prompt["input_ids"].expand(3, -1), -100), answers], 1)
    inputs = {"input_ids": ids, "pixel_values": prompt["pixel_values"].expand(3, -1, -1, -1)}
    out = perpo.list_loss(model, inputs, labels, torch.rand(3), num_candidates=3)
    plain = plain_log_probs(model, inputs, labels)
    torch.testing.assert_close(out.log_probs.double(), plain, rtol=1e-4, atol=1e-4)
    other = inputs | {"pixel_values": inputs["pixel_values"].flip(-1)}
    assert not torch.allclose(perpo.sequence_log_probs(model, other, labels), out.log_probs, atol=1e-3)


def test_what_the_objective_takes_arrives() -> None:
    """Token weights [B, L], pair and list weights, an objective, a temperature: the loss of packed states."""
    model, data = model_of("llama"), batch()
    weights = torch.rand(data["labels"].shape, dtype=torch.float64)
    options: dict[str, Any] = {
        "objective": objectives.Objective(pairs="given"),
        "pair_weights": torch.rand(2, 3, 3).triu(1),
        "list_weights": torch.tensor([0.5, 2.0]),
        "temperature": 0.7,
        "reduction": "none",
    }
    out = perpo.list_loss(model, **data, cu_lists=CU_LISTS, token_weights=weights, **options)
    rows, labels, cu_seqlens = layout.pack_labels(data["labels"])
    hidden = model.model(**data["inputs"]).last_hidden_state.flatten(0, 1)[rows]
    expected = linear_perpo_loss(
        hidden,
        model.lm_head.weight,
        labels,
        data["rewards"],
        cu_seqlens=cu_seqlens,
        cu_lists=torch.tensor(CU_LISTS, dtype=torch.int32),
        token_weights=weights.flatten()[rows + 1],
        **options,
    )
    assert out.loss.shape == (2,)
    torch.testing.assert_close(out.loss, expected.loss)


def test_equal_lists_and_lists_on_any_form_are_the_same() -> None:
    model, data = model_of("llama"), batch(cu_lists=[0, 2, 4])
    forms: list[dict[str, Any]] = [
        {"num_candidates": 2},
        {"cu_lists": [0, 2, 4]},
        {"cu_lists": torch.tensor([0, 2, 4])},
    ]
    losses = [perpo.list_loss(model, **data, **form).loss for form in forms]
    assert losses[0] == losses[1] == losses[2]


def test_a_batch_is_read_back_from_the_device_in_the_two_places_that_say_so(monkeypatch: Any) -> None:
    monkeypatch.setattr(checks, "values_are_checked", lambda x: False)  # as on a device
    model = model_of("lora on the head").float()
    step(model, batch())
    read = []
    monkeypatch.setattr(torch.Tensor, "tolist", noted(torch.Tensor.tolist, read))
    with waits() as found:
        step(model, batch(1))
    assert not found, found
    of_batch = [place for place in read if place in ("pack_labels", "_check_values")]
    assert of_batch == ["pack_labels", "_check_values"]


def step(model: Any, data: dict[str, Any]) -> None:
    perpo.list_loss(model, **data, cu_lists=CU_LISTS).loss.backward()


def noted(plain: Callable[..., Any], places: list[str]) -> Any:
    def tolist(self: torch.Tensor) -> Any:
        places.append(sys._getframe(1).f_code.co_name)
        return plain(self)

    return tolist


@pytest.mark.filterwarnings("ignore")
def test_a_whole_training_step_may_be_compiled() -> None:
    model = model_of("llama")
    loss = torch.compile(
        lambda data: perpo.list_loss(model, **data, cu_lists=CU_LISTS).loss, backend="eager", dynamic=True
    )
    for seed in (0, 1):
        expected = perpo.list_loss(copy.deepcopy(model), **batch(seed), cu_lists=CU_LISTS).loss
        torch.testing.assert_close(loss(batch(seed)), expected)


# --------------------------------------------------------------------------------------------------------- wrappings


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_and_nothing_is_compiled_anew_at_each_step() -> None:
    torch._dynamo.reset()
    model = model_of("lora on the head")
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    assert_equal_to_logits(model, compiled)
    data = batch(seed=1, cu_lists=[0, 2, 4, 6])
    perpo.list_loss(compiled, **data, num_candidates=2).loss.backward()
    compiles = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    perpo.list_loss(compiled, **batch(seed=2, cu_lists=[0, 4, 8]), num_candidates=4).loss.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiles


@pytest.mark.parametrize("kind", ["llama", "lora"])
def test_a_model_that_accelerate_has_prepared_keeps_its_autocast(kind: str) -> None:
    """Its autocast is around the forward pass that the model had then; ours comes later."""
    AcceleratorState._reset_state(True)
    model, data = model_of(kind).float(), batch()
    try:
        prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
        ours = perpo.sequence_log_probs(prepared, data["inputs"], data["labels"])
        plain = plain_log_probs(prepared, data["inputs"], data["labels"])
        in_fp32 = plain_log_probs(copy.deepcopy(model_of(kind).float()), data["inputs"], data["labels"])
        rounding = (plain - in_fp32).abs().max()
        assert rounding > 1e-3
        assert (ours - plain).abs().max() < rounding
        out = perpo.list_loss(prepared, **data, cu_lists=CU_LISTS)
        assert out.loss.dtype == torch.float32
        bare = Accelerator().unwrap_model(prepared, keep_fp32_wrapper=False)
        again = perpo.sequence_log_probs(bare, data["inputs"], data["labels"])
        torch.testing.assert_close(again.double(), in_fp32, rtol=1e-5, atol=1e-5)
        bare(**data["inputs"])
    finally:
        AcceleratorState._reset_state(True)


def test_on_two_ranks_with_ddp_and_fsdp2() -> None:
    for one in ranks(2, "-m", "tests.perpo.integrations.run_wrapped"):
        shown, errors = one.communicate(timeout=400)
        assert one.returncode == 0, errors[-3000:]
        assert shown.count("equal") == 6, shown


def test_under_zero_3() -> None:
    """pip install --target /tmp/ds --no-deps deepspeed hjson py-cpuinfo, then PYTHONPATH=/tmp/ds DS_ACCELERATOR=cpu."""
    pytest.importorskip("deepspeed", reason="deepspeed is no part of perpo[test]")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *command, "-m", "tests.perpo.integrations.run_wrapped", "zero3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal zero3") == 2, done.stdout


# -------------------------------------------------------------------------------------------------- what is refused


def test_a_model_that_does_something_unknown_is_refused_on_its_first_batch_and_stays_in_its_modes() -> None:
    model, data = model_of("llama"), batch()
    model.train()
    model.model.layers[0].eval()
    body = model.model.forward
    model.model.forward = lambda *args, **kwargs: body(*args, **kwargs)
    perpo.list_loss(model, **data, cu_lists=CU_LISTS)
    assert model.training
    assert not model.model.layers[0].mlp.training
    wrong = model_of("llama")
    plain = wrong.forward
    wrong.forward = lambda *args, **kwargs: scaled(plain(*args, **kwargs))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM maps hidden states to logits in a way .*token_log_probs"):
        perpo.list_loss(wrong, **data, cu_lists=CU_LISTS)


def scaled(output: Any) -> Any:
    output.logits = output.logits * 1.1
    return output


@pytest.mark.parametrize("what", ["body", "parallel", "encoder-decoder", "prompt tuning", "text", "dora"])
def test_a_model_that_cannot_be_used_is_refused(what: str) -> None:
    model = model_of("llama")
    bad = {
        "body": lambda: model.model,
        "parallel": lambda: torch.nn.DataParallel(model),
        "encoder-decoder": lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        "prompt tuning": lambda: get_peft_model(
            model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
        ),
        "text": lambda: "llama",
        "dora": lambda: get_peft_model(model, LoraConfig(target_modules=["lm_head"], use_dora=True)),
    }[what]()
    said = {
        "body": "model: LlamaModel has no language head .* AutoModelForCausalLM",
        "parallel": "model: nn.DataParallel .* torchrun",
        "encoder-decoder": "model: T5ForConditionalGeneration is an encoder with a decoder",
        "prompt tuning": "model: PROMPT_TUNING .* use LoRA",
        "text": "model must be a torch.nn.Module, got str",
        "dora": "language head: an adapter .* leave the head out of target_modules",
    }[what]
    with pytest.raises((ValueError, TypeError), match=said):
        perpo.list_loss(bad, **batch(), cu_lists=CU_LISTS)


def test_a_row_without_labels_takes_part_in_no_pair_and_is_said() -> None:
    model, data = model_of("llama"), batch()
    data["labels"][1] = -100
    with pytest.warns(UserWarning, match="1 of 5 rows have no label: these candidates take part in no pair"):
        out = perpo.list_loss(model, **data, cu_lists=CU_LISTS)
    assert out.log_probs[1] == 0
    assert out.rewards.isnan().tolist() == [False, True, False, False, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_probs = perpo.sequence_log_probs(model, data["inputs"], data["labels"])
    assert log_probs[1] == 0


def test_padding_on_the_left_with_position_ids_is_the_same() -> None:
    model, data = model_of("llama"), batch()
    right = perpo.list_loss(model, **data, cu_lists=CU_LISTS)
    inputs, shift = data["inputs"], (data["inputs"]["attention_mask"] == 0).sum(1)
    turned = {name: roll(x, shift) for name, x in inputs.items()}
    labels = roll(data["labels"], shift)
    positions = (turned["attention_mask"].cumsum(1) - 1).masked_fill(turned["attention_mask"] == 0, 1)
    with pytest.raises(ValueError, match=r"attention_mask: 3 rows begin with padding .* or give position_ids"):
        perpo.list_loss(model, turned, labels, data["rewards"], cu_lists=CU_LISTS)
    left = perpo.list_loss(model, turned | {"position_ids": positions}, labels, data["rewards"], cu_lists=CU_LISTS)
    torch.testing.assert_close(left.loss, right.loss)


def roll(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return torch.stack([row.roll(int(n)) for row, n in zip(x, shift, strict=True)])


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no labels": (lambda a: a.update(labels=None), "labels must be given: int64"),
    "labels of nothing": (lambda a: a["labels"].fill_(-100), "labels: no position of 5 rows has a label"),
    "another shape": (lambda a: a.update(labels=a["labels"][:, 1:]), "labels must have the shape of input_ids"),
    "floating labels": (lambda a: a.update(labels=a["labels"].float()), r"labels must be int64.*labels\.long\(\)"),
    "shifted": (
        lambda a: a.update(labels=a["labels"].roll(-1, 1)),
        "labels: 5 rows have labels that are not the input",
    ),
    "on padding": (
        lambda a: a["labels"].copy_(a["inputs"]["input_ids"]),
        r"labels: 3 rows have labels where attention_mask is 0, row 0 .*masked_fill_",
    ),
    "torn apart": (
        lambda a: a.update(cu_lists=[0, 2, 5]),
        "cu_lists, num_candidates: 2 rows have another prompt than the first row of their list, row 3 the first",
    ),
    "several in a row": (
        lambda a: a["inputs"].update(position_ids=torch.arange(9).remainder(6).expand(5, 9)),
        "position_ids: they begin anew within .* rows, row .* put every answer into a row of its own",
    ),
    "padding-free": (lambda a: a["inputs"].update(cu_seq_lens_q=0), "'cu_seq_lens_q' says that several answers"),
    "labels in inputs": (lambda a: a["inputs"].update(labels=a["labels"]), "got 'labels': they are an argument"),
    "no tokens": (lambda a: a["inputs"].pop("input_ids"), "inputs must hold input_ids"),
    "no mapping": (lambda a: a.update(inputs=a["labels"]), "inputs must be a mapping of the model's keywords"),
    "both": (lambda a: a.update(num_candidates=5), "expected exactly one of them, got both"),
    "neither": (lambda a: a.update(cu_lists=None), "expected exactly one of them, got neither; num_candidates=k"),
    "no divisor": (
        lambda a: a.update(cu_lists=None, num_candidates=2),
        "num_candidates must divide the number of rows, 5, got 2; .* give cu_lists",
    ),
    "other lists": (lambda a: a.update(cu_lists=[0, 3]), "cu_lists must start at 0, .* the number of rows, 5"),
    "no rewards": (lambda a: a.update(rewards=None), "rewards must be given"),
    "other rewards": (lambda a: a.update(rewards=torch.rand(2)), r"rewards must be \[B\] = \[5\].*got \[2\]"),
    "other references": (lambda a: a.update(ref_log_probs=torch.rand(2)), r"ref_log_probs must be \[B\] = \[5\]"),
    "other weights": (lambda a: a.update(token_weights=torch.rand(5)), r"token_weights must be \[B, L\] as labels"),
    "soft cap": (lambda a: a.update(softcap=30.0), "list_loss takes no 'softcap'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_batch_that_would_train_on_something_else_is_refused_by_name(what: str) -> None:
    arguments: dict[str, Any] = batch() | {"cu_lists": CU_LISTS}
    change, said = REFUSED[what]
    change(arguments)
    with pytest.raises((ValueError, TypeError), match=said):
        perpo.list_loss(model_of("llama"), **arguments)
