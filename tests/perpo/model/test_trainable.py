"""What is trained: inside the language model, with what a model comes with, and nothing in silence."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText

from perpo.model.adapters import adapted_layers, merge_adapters
from perpo.model.language_head import causal_lm
from perpo.model.load import load_model, load_processor
from perpo.model.merge import save_merged
from perpo.model.trainable import TrainableConfig, freeze, language_lora, projector_names, trained_parts

from .. import tiny_models

INPUTS = {"input_ids": torch.arange(5, 15).unsqueeze(0)}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**INPUTS).logits.float()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder as `perpo train` leaves it: an adapter on a base model, and the processor."""
    base, processor = tiny_models.build("llava")
    base.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "run")
    torch.manual_seed(0)
    config = language_lora(load_model(str(tmp_path / "model")), r=4, alpha=8)
    config.init_lora_weights = False
    get_peft_model(load_model(str(tmp_path / "model")), config).save_pretrained(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl", "smolvlm", "qwen2_5_vl"])
def test_layers_named_without_a_path_are_those_of_the_language_model(family: str) -> None:
    model, _ = tiny_models.build(family)
    decoder = next(name for name, module in model.named_modules() if module is model.get_decoder())
    everywhere = [name for name, _ in model.named_modules() if name.endswith((".q_proj", ".v_proj"))]
    adapted = get_peft_model(model, language_lora(model, r=2, alpha=4, target_modules=["q_proj", "v_proj"]))
    names = [name.removeprefix("base_model.model.") for name in adapted_layers(adapted)]
    assert names == [name for name in everywhere if name.startswith(f"{decoder}.")]
    assert len(names) == 2 * tiny_models.LAYERS
    assert f"(adapters on {len(names)} layers)" in trained_parts(adapted)


def test_a_full_path_names_a_layer_anywhere() -> None:
    model, _ = tiny_models.build("llava")
    path = next(name for name, _ in model.named_modules() if "vision" in name and name.endswith("q_proj"))
    for given in (path, path.removeprefix("model.")):
        config = language_lora(model, r=2, target_modules=[given, "down_proj"])
        adapted = get_peft_model(tiny_models.build("llava")[0], config)
        names = [name.removeprefix("base_model.model.") for name in adapted_layers(adapted)]
        assert names[0] == path
        assert [name.rpartition(".")[2] for name in names[1:]] == ["down_proj"] * tiny_models.LAYERS


def test_a_layer_that_is_not_there_is_an_error() -> None:
    model, _ = tiny_models.build("llava")
    with pytest.raises(ValueError, match=r"no linear layer 'fc1', but .*q_proj.*give its path, as 'model.vision_tower"):
        language_lora(model, target_modules=["fc1"])
    with pytest.raises(ValueError, match=r"has no layer 'vision_tower\.nothing'"):
        language_lora(model, target_modules=["vision_tower.nothing"])


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llava", {"multi_modal_projector"}),
        ("qwen2_5_vl", {"visual.merger"}),
        ("qwen3_vl", {"visual.merger", "visual.deepstack_merger_list.0", "visual.deepstack_merger_list.1"}),
        ("glm4v", {"visual.merger", "visual.downsample"}),
    ],
)
def test_the_projector_is_trained_also_inside_a_vision_tower(family: str, expected: set[str]) -> None:
    model, _ = tiny_models.build(family)
    assert set(projector_names(model)) == expected
    freeze(model, projector=False)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    in_tower = {n for n, _ in model.named_parameters() if "visual" in n or "vision_tower" in n}
    of_projector = {n for n, _ in model.named_parameters() if any(f"model.{e}." in n for e in expected)}
    assert of_projector <= trained
    assert not (in_tower - of_projector) & trained
    adapted = get_peft_model(tiny_models.build(family)[0], language_lora(model, r=2, train_projector=True))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert {re.sub(r".*model\.(.*)\.modules_to_save.*", r"\1", n) for n in trained if "lora_" not in n} == expected


def test_a_model_without_projector_says_so() -> None:
    model, _ = tiny_models.build("llama")
    with pytest.raises(ValueError, match="train_projector: LlamaForCausalLM has no projector"):
        TrainableConfig(lora=False, train_projector=True).apply(model)


def experts() -> Any:
    """A tiny Qwen3-VL-MoE: its experts are tensors [experts, …]."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 1}
    text = {**tiny_models.TEXT, "vocab_size": 64, "head_dim": 8, "rope_parameters": rope, **moe}
    vision = {"depth": 2, "num_heads": 2, "patch_size": 7, "hidden_size": 16, "intermediate_size": 24}
    vision |= {"out_hidden_size": tiny_models.HIDDEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = AutoConfig.for_model("qwen3_vl_moe", text_config=text, vision_config=vision)
    return AutoModelForImageTextToText.from_config(config)


def test_experts_that_would_get_no_adapter_are_an_error() -> None:
    model = experts()
    with pytest.raises(ValueError, match=r"lora: [\d,]+ of the [\d,]+ parameters .*experts.*lora_target_modules"):
        TrainableConfig().apply(model)
    config = TrainableConfig(lora_target_modules=["q_proj"]).apply(model).peft_config
    assert config is not None
    assert len(adapted_layers(get_peft_model(model, config))) == tiny_models.LAYERS


def test_one_line_says_what_is_trained_by_part() -> None:
    model, _ = tiny_models.build("llava")
    freeze(model, projector=False)
    line = trained_parts(model)
    counts = {
        "projector": model.model.multi_modal_projector,
        "vision tower": model.model.vision_tower,
        "language head": model.lm_head,
        "language model": model.model.language_model,
    }
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in counts.items()}
    trained = sizes["projector"] + sizes["language model"]
    assert line == (
        f"trained: {trained:,} of {sum(sizes.values()):,} parameters: projector {sizes['projector']:,} of "
        f"{sizes['projector']:,}; vision tower 0 of {sizes['vision tower']:,}; language head 0 of "
        f"{sizes['language head']:,}; language model {sizes['language model']:,} of {sizes['language model']:,}"
    )


def test_a_folder_with_adapters_is_loaded_with_them(run: Path) -> None:
    model = load_model(str(run))
    expected = PeftModel.from_pretrained(load_model(str(run.parent / "model")), str(run))
    assert isinstance(model, PeftModel)
    assert torch.equal(logits(model), logits(expected))
    assert not torch.equal(logits(model), logits(load_model(str(run.parent / "model"))))


def test_adapters_that_a_model_comes_with_are_trained_further(run: Path) -> None:
    model = load_model(str(run))
    prepared = TrainableConfig().apply(model)
    assert prepared.model is model
    assert prepared.peft_config is None
    assert prepared.remark.startswith("training continues with the adapters that the model comes with, r=4")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("settings", [{"lora": False}, {"lora_target_modules": ["q_proj"]}, {"lora_r": 8}])
def test_otherwise_they_are_merged_and_nothing_is_lost(settings: dict[str, Any], run: Path, tmp_path: Path) -> None:
    before = logits(load_model(str(run)))
    prepared = TrainableConfig(**settings).apply(load_model(str(run)), folder=tmp_path / "second")
    assert not isinstance(prepared.model, PeftModel)
    torch.testing.assert_close(logits(prepared.model), before, atol=1e-5, rtol=1e-5)
    assert "are merged into its weights" in prepared.remark
    if prepared.peft_config is None:
        assert "language model 24,000 of 24,000" in trained_parts(prepared.model)
        return
    assert str(tmp_path / "second" / "base") in prepared.remark
    adapted = get_peft_model(prepared.model, prepared.peft_config)
    adapted.save_pretrained(tmp_path / "second")
    again = load_model(str(tmp_path / "second"))  # what is saved is the new adapter, on the merged base
    torch.testing.assert_close(logits(again), before, atol=1e-5, rtol=1e-5)


def test_merging_is_exact_unless_rounding_is_asked_for(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perpo.model.adapters.logger.propagate", True)
    expected = logits(load_model(str(run), dtype=torch.float32))
    save_merged(run, tmp_path / "merged")
    merged = load_model(str(tmp_path / "merged"))
    assert causal_lm(merged).dtype == torch.float32
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    assert load_processor(str(tmp_path / "merged")).chat_template == tiny_models.LLAVA_TEMPLATE
    assert not caplog.records
    save_merged(run, tmp_path / "small", dtype="bfloat16")
    assert causal_lm(load_model(str(tmp_path / "small"))).dtype == torch.bfloat16
    said = re.search(r"rounded to bfloat16, an error of ([\d.e-]+) times what the adapters add", caplog.text)
    assert said is not None
    base = dict(load_model(str(run.parent / "model")).named_parameters())
    whole = dict(merged.named_parameters())
    changed = [name for name, p in whole.items() if not torch.equal(p, base[name])]
    error = sum((whole[n].bfloat16().float() - whole[n]).square().sum() for n in changed)
    added = sum((whole[n] - base[n]).square().sum() for n in changed)
    assert float(said[1]) == pytest.approx(float((error / added).sqrt()), rel=0.05)


def test_only_adapters_can_be_merged(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no adapters"):
        save_merged(run.parent / "model", tmp_path / "merged")


def test_adapters_without_the_name_of_their_model_are_refused(run: Path) -> None:
    file = run / "adapter_config.json"
    file.write_text(file.read_text().replace(str(run.parent / "model"), ""))
    with pytest.raises(ValueError, match="do not say which model they are for"):
        load_model(str(run))


def test_an_adapter_of_another_kind_is_merged_too() -> None:
    model, _ = tiny_models.build("llava")
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, use_dora=True)
    adapted = get_peft_model(model, config)
    expected = logits(adapted)
    torch.testing.assert_close(logits(merge_adapters(adapted)), expected, atol=1e-4, rtol=1e-4)
