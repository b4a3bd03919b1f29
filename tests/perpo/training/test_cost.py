"""The cost model against what small models really take."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

from benchmarks.harness import peak_extra_bytes
from perpo.cli.main import main
from perpo.encoding.batch import ListBatch, candidate_tensors, separate_rows
from perpo.encoding.packed import packed_row
from perpo.encoding.positions import PromptPositions
from perpo.model import sharing
from perpo.model.language_head import accept_rows, causal_lm, perpo_output, sequence_log_probs
from perpo.model.trainable import TrainableConfig
from perpo.training.activations import BLOCK
from perpo.training.cost import ListShape, Planner, Training
from perpo.training.degree import DegreeHead
from tests.perpo import tiny_models

CONFIG = LlavaConfig(
    text_config={
        "model_type": "llama",
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    vision_config={
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    image_token_index=2000,
)
LISTS = ListShape(prompt_tokens=120, response_tokens=12, k=6)


def adapters(r: int) -> TrainableConfig:
    """Of rank r; 0: the language model itself is trained."""
    return TrainableConfig(lora=r > 0, lora_r=r or None, lora_alpha=2 * r or None)


def step(training: Training, lists: ListShape, backward: bool = True) -> Any:
    """A forward and backward pass of a real model, its gradients being there already; or a pass without gradients."""
    model: Any = LlavaForConditionalGeneration(CONFIG)
    prepared = training.trainable.apply(model)
    model = prepared.model if prepared.peft_config is None else get_peft_model(model, prepared.peft_config)
    core = causal_lm(model).train()
    if training.gradient_checkpointing:
        core.gradient_checkpointing_enable({"use_reentrant": False})
    accept_rows(model)
    sharing.prepare(model, "on")
    prompts = [{"input_ids": torch.randint(0, 1000, (1, lists.prompt_tokens))}]
    responses = [[list(range(lists.response_tokens + 1))] * lists.k]  # the last token is not fed
    known = candidate_tensors(responses, [[0.1 * i for i in range(lists.k)]])
    if lists.shared:
        inputs, rows, layout = packed_row(prompts, responses, PromptPositions(core))
        batch = ListBatch(inputs, rows, **known, layout=layout)
    else:
        inputs, rows, _ = separate_rows(prompts, responses, 0)
        batch = ListBatch(inputs, rows, **known)

    def run() -> None:
        model(**batch.keywords, head_call=lambda hidden, head: perpo_output(hidden, head, batch)).loss.backward()

    def judge() -> None:
        with torch.no_grad():
            sequence_log_probs(model, batch)

    if not backward:
        return judge
    run()
    return run


@pytest.mark.parametrize("lora_r", [8, 0])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shared", [True, False])
def test_memory_of_a_step_is_foreseen_to_a_fifth(lora_r: int, checkpointing: bool, shared: bool) -> None:
    training = Training(adapters(lora_r), checkpointing, torch.float32, max_chunk_bytes=64 << 20)
    lists = dataclasses.replace(LISTS, shared=shared)
    parts = Planner(CONFIG, training).memory(lists)
    measured = peak_extra_bytes(step(training, lists), "cpu")
    assert parts["activations"] + parts["momentary"] == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("lora_r", [8, 0])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shared", [True, False])
def test_operations_of_a_step_are_foreseen_to_a_tenth(lora_r: int, checkpointing: bool, shared: bool) -> None:
    """Of the linear layers: the counter sees neither flash attention on a CPU nor into the loss."""
    training = Training(adapters(lora_r), checkpointing, torch.float32)
    lists = dataclasses.replace(LISTS, shared=shared)
    planner = Planner(CONFIG, training)
    run = step(training, lists)
    with FlopCounterMode(display=False) as counter:
        run()
    planner.heads = planner.vision_parameters = planner.vocabulary = 0
    assert planner.operations(lists) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_pairs_are_those_of_the_masks() -> None:
    for shared in (True, False):
        lists = dataclasses.replace(LISTS, shared=shared, n=2)
        seen = sum(int(mask.sum()) for _, mask in lists.layout.masks(None, torch.device("cpu")))
        assert lists.pairs == pytest.approx(seen, rel=0.02)  # a token sees itself, which P² / 2 leaves out by half


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shared", [True, False])
def test_attention_costs_what_its_products_cost(checkpointing: bool, shared: bool) -> None:
    """By torch's count of fused attention: two products forward, five backward, a query and key that see each other."""
    lists = dataclasses.replace(LISTS, shared=shared)
    planner = Planner(CONFIG, Training(adapters(8), checkpointing, torch.float32))
    whole = planner.operations(lists)
    planner.heads = 0
    one = (1, CONFIG.text_config.num_attention_heads, 1, 16)  # a query and a key, 128 / 8 numbers each
    forward, backward = sdpa_flop_count(one, one, one), sdpa_backward_flop_count(one, one, one, one)
    seen = sum(int(mask.sum()) for _, mask in lists.layout.masks(None, torch.device("cpu")))
    expected = CONFIG.text_config.num_hidden_layers * seen * (forward * (1 + checkpointing) + backward)
    assert whole - planner.operations(lists) == pytest.approx(expected, rel=0.02)


def test_sharing_saves_the_tokens_that_it_says() -> None:
    separate = dataclasses.replace(LISTS, shared=False)
    assert LISTS.layout.n_tokens == 120 + 6 * 12
    assert separate.layout.n_tokens == 6 * (120 + 12)


def test_as_many_lists_fit_as_their_memory_says() -> None:
    planner = Planner(CONFIG, Training(adapters(8), False, torch.float32))
    fixed = {"weights", "gradients", "optimizer"}
    for n in (1, 3):
        parts = planner.memory(dataclasses.replace(LISTS, n=n))
        room = sum(parts.values())
        assert planner.fitting(LISTS, room * 1.05) in (n, n + 1)
        assert planner.fitting(LISTS, sum(parts[name] for name in fixed)) == 0


def test_the_command_prints_both_ways(tmp_path: Path, capsys: Any) -> None:
    CONFIG.save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--k", "6", "--prompt_tokens", "120", "--response_tokens", "12"]
    assert main(["plan", *arguments, "--gpu_memory", "1", "--tflops", "1"]) == 0
    printed = capsys.readouterr().out
    lines = {line[:22].strip(): line[22:].split() for line in printed.splitlines()}
    assert lines["tokens"] == ["192", "792"]
    assert {"seconds", "lists in 1 GiB", "in all (GiB)"} <= set(lines)
    assert "Left out: workspaces of flash attention" in printed


def printed(capsys: Any, *arguments: str) -> tuple[dict[str, list[str]], str]:
    """What `perpo plan` prints: its rows, and all of it."""
    lists = ["--k", "6", "--prompt_tokens", "120", "--response_tokens", "12"]
    assert main(["plan", *arguments, *lists]) == 0
    text = capsys.readouterr().out
    return {line[:22].strip(): line[22:].split() for line in text.splitlines()}, text


def test_the_file_of_a_run_can_be_planned(tmp_path: Path, capsys: Any) -> None:
    CONFIG.save_pretrained(tmp_path)
    run = {"model": str(tmp_path), "dtype": "float32", "train_file": "lists.jsonl", "output_dir": "out", "lora_r": 4}
    run |= {"train_projector": True, "learning_rate": 1e-4, "max_candidates": 3, "per_device_train_batch_size": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run | {"optim": "adafactor", "max_tokens_per_row": 500}))
    rows, text = printed(capsys, "--config", str(tmp_path / "run.yaml"))
    assert rows["tokens"] == ["312", "792"]  # 2 × (120 + 3 · 12), 2 × 3 × (120 + 12)
    assert "Set, but not counted: max_tokens_per_row=500, optim=adafactor." in text
    assert "What a trained projector keeps" in text
    training = Training(TrainableConfig(lora_r=4, train_projector=True), dtype=torch.float32)
    assert f"{Planner(CONFIG, training).trained / 1e6:.1f} million trained" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora", "false", "--train_vision_tower", "true"], "a trained vision tower has activations that are not"),
        (["--lora", "false", "--train_lm_head", "true"], "a trained language head has activations that are not"),
        (["--lora_target_modules", "vision_tower.encoder.layers.0.mlp.fc1"], "a trained vision tower"),
        (["--objective", "mdpo"], "objective='mdpo' also feeds answers under a corrupted image"),
        (["--max_length", "100"], "max_length=100 is less than the 1030 tokens"),
        (["--fsdp", "full_shard"], "fsdp spreads weights over GPUs; say over how many with --shards"),
        (["--dtype", "float32", "--bf16", "true"], "weights in fp32 with products in 16 bits are not planned"),
        (["--shards", "8", "--degree_weight", "0.1"], "degree_weight > 0 is not supported under FSDP"),
        (
            ["--shards", "8", "--reference", "model", "--ref_model_name_or_path", "a/b", "c/d"],
            "several reference models is not supported under FSDP",
        ),
    ],
)
def test_what_would_make_the_numbers_wrong_is_refused(
    options: list[str], message: str, tmp_path: Path, capsys: Any
) -> None:
    CONFIG.save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), *options]) == 1
    assert message in capsys.readouterr().err


def test_one_reference_model_is_there_all_the_time(tmp_path: Path, capsys: Any) -> None:
    CONFIG.save_pretrained(tmp_path)
    bigger = copy.deepcopy(CONFIG)
    bigger.text_config.num_hidden_layers = 6
    alone = Planner(CONFIG, Training(adapters(8))).memory(LISTS)
    both = Planner(CONFIG, Training(adapters(8), references=[bigger])).memory(LISTS)
    weights = LlavaForConditionalGeneration(bigger).to(torch.bfloat16)
    assert both == {**alone, "reference": sum(p.nbytes for p in weights.parameters())}
    rows, _ = printed(
        capsys, "--model", str(tmp_path), "--reference", "model", "--ref_model_name_or_path", str(tmp_path)
    )
    assert "reference (GiB)" in rows
    assert "before it (GiB)" not in rows


def test_several_reference_models_are_there_one_at_a_time_before_training(tmp_path: Path, capsys: Any) -> None:
    """Beside the model that is trained; what a pass without gradients holds is measured."""
    training = Training(adapters(8), dtype=torch.float32, max_chunk_bytes=64 << 20)
    several = Planner(CONFIG, dataclasses.replace(training, references=[CONFIG, CONFIG]))
    assert several.memory(LISTS) == Planner(CONFIG, training).memory(LISTS)
    assert Planner(CONFIG, training).before_training(LISTS) == 0
    reference = LlavaForConditionalGeneration(CONFIG)
    momentary = several.before_training(LISTS) - several.weight_bytes - sum(p.nbytes for p in reference.parameters())
    run = step(dataclasses.replace(training, trainable=TrainableConfig(lora_r=1)), LISTS, backward=False)
    assert momentary == pytest.approx(peak_extra_bytes(run, "cpu"), rel=0.25)
    assert several.fitting(LISTS, several.before_training(LISTS) - 1) == 0
    CONFIG.save_pretrained(tmp_path / "a")
    CONFIG.save_pretrained(tmp_path / "b")
    names = [str(tmp_path / "a"), str(tmp_path / "b")]
    rows, text = printed(capsys, "--model", names[0], "--reference", "model", "--ref_model_name_or_path", *names)
    assert "before it (GiB)" in rows
    assert "the 2 reference models are run one after another" in text


def test_a_degree_head_is_counted() -> None:
    levels, hidden = 5, CONFIG.text_config.hidden_size
    alone, headed = (Planner(CONFIG, Training(adapters(8), degree_levels=n)) for n in (0, levels))
    parameters = levels * (hidden + 1)
    assert headed.trained - alone.trained == parameters
    without, with_head = alone.memory(LISTS), headed.memory(LISTS)
    growth = {name: with_head[name] - without[name] for name in without}
    assert growth["weights"] == growth["gradients"] == 4 * parameters
    assert growth["optimizer"] == 8 * parameters
    assert growth["activations"] == 4 * LISTS.k * hidden


def test_what_a_degree_head_adds_for_a_moment_is_foreseen_to_a_fifth() -> None:
    """Where nothing else is high: a chunk of few logits."""
    lists = ListShape(prompt_tokens=10, response_tokens=200, k=10)
    hidden = CONFIG.text_config.hidden_size
    head = DegreeHead(hidden, 3)
    states = torch.randn(lists.responses, hidden).to(torch.bfloat16).requires_grad_()
    candidates = candidate_tensors([[list(range(201))] * 10], [[0.1 * i for i in range(10)]])
    batch = ListBatch({}, None, **candidates)

    def run() -> None:
        head.sums(states, batch)[0].backward()

    run()  # gradients are there
    derivative, means = 4 * lists.responses * hidden, 4 * lists.k * hidden
    assert peak_extra_bytes(run, "cpu") == pytest.approx(2 * derivative + 2 * means, rel=0.2)


def test_of_shards_the_weights_of_two_layers_and_of_no_layer_are_gathered() -> None:
    planner = Planner(CONFIG, Training(adapters(8), shards=4))
    model = causal_lm(LlavaForConditionalGeneration(CONFIG))
    model = get_peft_model(model, adapters(8).apply(model).peft_config)
    layers = [p.numel() for name, p in model.named_parameters() if "language_model.layers.0." in name]
    in_layers = {id(p) for name, p in model.named_parameters() if ".layers." in name or ".embeddings." in name}
    outside = sum(p.numel() for p in model.parameters() if id(p) not in in_layers)
    parts = planner.memory(LISTS)
    assert parts["gathered"] == 2 * (2 * sum(layers) + outside)
    assert parts["weights"] == planner.weight_bytes / 4


def test_a_text_model_has_a_plan_too() -> None:
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    planner = Planner(config, Training(adapters(4)))
    assert planner.vision_parameters == 0
    assert planner.memory(LISTS)["activations"] > 0


TOWER = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "patch_size": 7}


def qwen_tower(model: Any, pixels: torch.Tensor) -> None:
    grid = torch.tensor([[1, pixels.shape[2] // 7, pixels.shape[3] // 7]])
    patches = pixels.unfold(2, 7, 7).unfold(3, 7, 7).permute(0, 2, 3, 1, 4, 5).reshape(int(grid.prod()), -1)
    model.get_encoder(modality="image")(patches.repeat_interleave(2, 1), grid_thw=grid)  # two frames


@pytest.mark.parametrize(
    ("family", "vision", "tokens", "tower"),
    [
        ("internvl", {**TOWER, "num_hidden_layers": 4, "image_size": [56, 56], "patch_size": [7, 7]}, 16, None),
        ("qwen2_5_vl", {**TOWER, "depth": 4, "num_heads": 4}, 16, qwen_tower),
        ("gemma3", {**TOWER, "num_hidden_layers": 4, "image_size": 56, "vision_use_head": False}, 4, None),
        ("smolvlm", {**TOWER, "num_hidden_layers": 4, "image_size": 56}, 16, None),
        ("llava", {**TOWER, "num_hidden_layers": 4, "image_size": 56}, 64, None),
    ],
)
def test_operations_of_the_tower_are_foreseen_to_a_fifth(family: str, vision: Any, tokens: int, tower: Any) -> None:
    """An image of 8 x 8 patches, which the language model sees as fewer tokens in some families."""
    config = tiny_models.build(family)[0].config
    for name, value in vision.items():
        setattr(config.vision_config, name, value)
    lists = ListShape(prompt_tokens=tokens, response_tokens=1, k=2)
    planner = Planner(config, Training(adapters(0)))
    planner.linear_parameters = planner.linear_trained = planner.heads = planner.vocabulary = 0
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    pixels = torch.zeros(1, 3, 56, 56)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(model, pixels) if tower else model.get_encoder(modality="image")(pixels)
    attention = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "bmm" in str(op))
    assert planner.operations(lists) == pytest.approx(counter.get_total_flops() - attention, rel=0.2)


@pytest.mark.parametrize("family", ["gemma3", "gemma2", "mistral", "internvl", "qwen2_5_vl"])
def test_windows_and_soft_caps_take_the_memory_of_models_without(family: str) -> None:
    config = tiny_models.build(family)[0].config
    text = config.get_text_config()
    lists = ListShape(prompt_tokens=60, response_tokens=8, k=3)  # the windows are of 16 tokens
    training = Training(adapters(4), dtype=torch.bfloat16)
    ours = Planner(config, training).memory(lists)
    text.sliding_window, text.attn_logit_softcapping = 4096 if text.sliding_window else None, None
    assert ours == Planner(config, training).memory(lists)
    assert ours["activations"] > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_of_every_type_are_counted(checkpointing: bool) -> None:
    config = tiny_models.build("qwen3_5")[0].config
    text, kinds = config.get_text_config(), ["linear_attention", "linear_attention", "full_attention"] * 2
    text.layer_types, text.num_hidden_layers = kinds, len(kinds)
    lists = ListShape(prompt_tokens=70, response_tokens=8, k=3)
    planner = Planner(config, Training(adapters(4), checkpointing, torch.float32))
    whole, parts = planner._passes(lists, kinds), planner.memory(lists)
    indices = 2 * BLOCK  # of a layout, counted with each of the four layers that carry a state
    assert parts["activations"] == whole.kept + 3 * indices
    text.layer_types = ["full_attention"] * 6
    assert Planner(config, planner.training).operations(lists) > planner.operations(lists)


def test_what_cannot_be_planned_is_said(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--model", "x", "--k", "0"])
    assert "k must be ≥ 1, got 0" in capsys.readouterr().err
    assert main(["plan", "--model", str(tmp_path / "none")]) == 1
    assert "perpo plan:" in capsys.readouterr().err
