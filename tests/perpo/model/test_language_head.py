"""The language head of any model, frozen, adapted or replaced, as the model itself applies it."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from perpo.encoding.batch import ListBatch, collate_lists
from perpo.encoding.encoder import Encoder
from perpo.model.head_check import check_language_head
from perpo.model.language_head import causal_lm, response_hidden_states, sequence_log_probs, token_log_probs

from .. import tiny_models, tiny_runs


def llava_batch() -> tuple[Any, ListBatch]:
    model, processor = tiny_models.build("llava")
    encoder = Encoder.for_model(processor, model)
    prompts = [encoder.prompt("Where is it?", tiny_models.picture())]
    return model, collate_lists(prompts, [[encoder.response("[1]"), encoder.response("[2, 3]")]], encoder.pad_id)


def full_log_probs(model: Any, batch: ListBatch) -> torch.Tensor:
    logits = model(**batch.inputs).logits
    rows = logits.reshape(-1, logits.shape[-1])[batch.response_rows]
    return torch.log_softmax(rows.float(), -1).gather(1, batch.labels[:, None])[:, 0]


def adapted(model: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    peft_model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **options))
    for name, parameter in peft_model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return peft_model


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["frozen", "lora", "modules_to_save"],
)
@pytest.mark.parametrize("adapter_on", [True, False])
def test_values_and_gradients_equal_full_logits_under_peft(options: dict[str, Any], adapter_on: bool) -> None:
    model, batch = llava_batch()
    model = adapted(model, **options).eval()
    weights = torch.randn(batch.labels.numel())
    if not adapter_on:
        with model.disable_adapter(), torch.no_grad():
            torch.testing.assert_close(token_log_probs(model, batch), full_log_probs(model, batch))
        return
    grads = []
    for log_probs in (token_log_probs, full_log_probs):
        model.zero_grad()
        value = log_probs(model, batch)
        (value * weights).sum().backward()
        grads.append([value.detach()] + [p.grad for p in model.parameters() if p.requires_grad])
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any("lm_head" in name for name in trained) == ("lm_head" in str(options))
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)


def test_an_adapter_that_is_no_plain_lora_is_refused_on_the_head() -> None:
    model, batch = llava_batch()
    model = adapted(model, target_modules=["lm_head"], use_dora=True)
    with pytest.raises(ValueError, match="leave the head out of target_modules"):
        token_log_probs(model, batch)


SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (CohereForCausalLM, CohereConfig(**SIZES, logit_scale=0.25)),
        (GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=4.0)),
        (Gemma2ForCausalLM, Gemma2Config(**SIZES, final_logit_softcapping=0.5)),
    ],
    ids=["cohere", "granite", "gemma2"],
)
def test_scale_and_soft_cap_are_found_and_a_wrong_one_is_noticed(model_class: Any, config: Any) -> None:
    model = model_class(config)
    for parameter in model.parameters():
        parameter.data.normal_()
    check_language_head(model)
    wrong = copy.deepcopy(model)
    wrong.get_output_embeddings().register_forward_hook(
        lambda module, args, out: out * 1.5 if args[0].dim() == 3 else out
    )
    with pytest.raises(ValueError, match="in a way that is not known here"):
        check_language_head(wrong)


def test_a_copy_of_an_installed_model_runs_its_own_weights() -> None:
    model, batch = llava_batch()
    before = response_hidden_states(model, batch)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.mul_(0.5)
    assert not torch.allclose(response_hidden_states(other, batch), before)
    torch.testing.assert_close(response_hidden_states(model, batch), before)
    torch.testing.assert_close(token_log_probs(other, batch), full_log_probs(other, batch))


def test_a_model_without_a_head_is_refused() -> None:
    model, batch = llava_batch()
    with pytest.raises(ValueError, match="AutoModelForImageTextToText"):
        response_hidden_states(model.model, batch)


# ------------------------------------------------------------------------------------------------------- generation


def greedy(model: Any, inputs: dict[str, torch.Tensor]) -> list[int]:
    ids = model.eval().generate(**inputs, do_sample=False, max_new_tokens=6)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("family", [*tiny_models.FAMILIES, *tiny_models.MORE_FAMILIES])
def test_a_scored_model_generates_as_before(family: str) -> None:
    """`generate` reads off a model's forward pass which inputs it takes: those of the picture, a mask, positions."""
    model, processor = tiny_models.build(family)
    encoder = Encoder.for_model(processor, model)
    inputs = encoder.prompt("Where is it?", tiny_models.picture())
    batch = collate_lists([inputs], [[encoder.response("[1]"), encoder.response("[2, 3]")]], encoder.pad_id)
    takes, said = inspect.signature(model.forward), greedy(model, inputs)
    sequence_log_probs(model, batch)
    assert inspect.signature(model.forward) == takes
    assert inspect.signature(copy.deepcopy(model).forward) == takes
    assert greedy(model, inputs) == said
    with_adapter = adapted(model, target_modules=["q_proj"])
    said = greedy(with_adapter, inputs)
    sequence_log_probs(with_adapter, batch)
    assert greedy(with_adapter, inputs) == said
    assert greedy(with_adapter.merge_and_unload(), inputs) == said


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_trained_model_generates_in_the_same_process_and_merged(family: str, tmp_path: Path) -> None:
    trainer = tiny_runs.trainer(family, tmp_path)
    trainer.train()
    fresh, processor = tiny_models.build(family)
    inputs = Encoder.for_model(processor, fresh).prompt("Where is it?", tiny_models.picture())
    said = greedy(trainer.model, inputs)
    merged = trainer.model.merge_and_unload()
    assert greedy(merged, inputs) == said
    fresh.load_state_dict(causal_lm(merged).state_dict())
    assert greedy(fresh, inputs) == said
