"""`ListDPOTrainer` beside the real `trl.DPOTrainer`: the same pairs give the same losses; TRL's names and its data."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import HfArgumentParser

from perpo.data.record import ListRecord
from perpo.integrations.trl_dpo import ListDPOTrainer
from perpo.integrations.trl_dpo_config import LOSSES, ListDPOConfig
from perpo.training.config import PerPOConfig
from perpo_kernels import objectives

from .. import tiny_models, tiny_runs

SAID = (("it is 4", "about seven"), ("left", "right, I think"), ("a glass", "no"), ("yes", "not at all"))
TEXTS = [{"prompt": f"Question {i}:", "chosen": f" {c}", "rejected": f" {r}"} for i, (c, r) in enumerate(SAID)]


def message(role: str, content: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


DIALOGUES = [
    {
        "prompt": message("user", row["prompt"]),
        "chosen": message("assistant", row["chosen"]),
        "rejected": message("assistant", row["rejected"]),
    }
    for row in TEXTS
]
WITHOUT_PROMPT = [{one: row["prompt"] + row[one] for one in ("chosen", "rejected")} for row in DIALOGUES]


def settings(folder: Path, **options: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 3,
    }
    return defaults | options


def built(seed: int = 0) -> tuple[Any, Any]:
    """A text model. TRL also trains on what the template writes after the end of a turn, the line end of ChatML, which
    no model ever generates; so this template writes none."""
    model, tokenizer = tiny_models.build("qwen2", seed=seed)
    tokenizer.chat_template = tiny_models.CHATML.replace("<|im_end|>\n", "<|im_end|>")
    return model, tokenizer


def trainer(folder: Path, data: Any = DIALOGUES, family: str = "", **options: Any) -> ListDPOTrainer:
    model, processor = tiny_models.build(family) if family else built()
    given = {name: options.pop(name) for name in ("eval_dataset", "ref_model", "peft_config") if name in options}
    args = ListDPOConfig(**settings(folder, **options))
    return ListDPOTrainer(model, args=args, train_dataset=data, processing_class=processor, **given)


def losses(runner: Any) -> list[float]:
    runner.train()
    return [log["loss"] for log in runner.state.log_history if "loss" in log]


# ------------------------------------------------------------------------------------------------- beside TRL's trainer


@pytest.mark.parametrize("rows", [TEXTS, DIALOGUES, WITHOUT_PROMPT], ids=["texts", "messages", "no prompt column"])
def test_on_pairs_it_trains_as_trl_does(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """Three steps, each of which depends on the gradients of those before."""
    data = datasets.Dataset.from_list(rows)
    model, processor = built()
    theirs = trl.DPOTrainer(
        model,
        copy.deepcopy(model),
        trl.DPOConfig(**settings(tmp_path / "theirs")),
        train_dataset=data,
        processing_class=processor,
    )
    expected = losses(theirs)
    ours = losses(trainer(tmp_path / "ours", data, loss_type="sigmoid"))
    assert ours[0] == pytest.approx(0.6931, abs=1e-4)
    assert ours == pytest.approx(expected, rel=2e-4)  # theirs are logged with four decimals
    assert abs(ours[2] - ours[0]) > 0.05


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_loss_has_the_value_that_its_name_has_there(loss_type: str, tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(DIALOGUES)
    reference, _ = built(seed=7)
    options: dict[str, Any] = {"loss_type": loss_type, "beta": 0.3}
    if loss_type == "robust":
        options["label_smoothing"] = 0.2
    model, processor = built()
    common: dict[str, Any] = {"eval_dataset": data, "train_dataset": data, "processing_class": processor}
    theirs = trl.DPOTrainer(
        copy.deepcopy(model),
        copy.deepcopy(reference),
        trl.DPOConfig(**settings(tmp_path / "theirs", **options)),
        **common,
    )
    ours = ListDPOTrainer(model, reference, ListDPOConfig(**settings(tmp_path / "ours", **options)), **common)
    expected, got = theirs.evaluate(), ours.evaluate()
    assert got["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    if not ours.objective.length_normalized:  # the rewards shown are β times the scores of the objective
        assert got["eval_rewards/margins"] == pytest.approx(expected["eval_rewards/margins"], rel=1e-4)


def test_perpo_on_pairs_is_dpo(tmp_path: Path) -> None:
    assert losses(trainer(tmp_path / "a")) == losses(trainer(tmp_path / "b", loss_type="sigmoid"))


def test_every_name_of_trl_s_config_is_known_here() -> None:
    theirs = {field.name for field in dataclasses.fields(trl.DPOConfig)}
    assert theirs - {field.name for field in dataclasses.fields(ListDPOConfig)} == set()


def test_the_values_of_a_fresh_config_of_trl_are_accepted(tmp_path: Path) -> None:
    """A script that writes TRL's defaults out goes through."""
    own = {f.name for f in dataclasses.fields(trl.DPOConfig)} & {f.name for f in dataclasses.fields(ListDPOConfig)}
    own -= {f.name for f in dataclasses.fields(PerPOConfig)}
    fresh = trl.DPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert len(own) > 15
    config = ListDPOConfig(str(tmp_path), use_cpu=True, **{name: getattr(fresh, name) for name in own})
    assert config.list_objective == objectives.dpo(0.1)


# ---------------------------------------------------------------------------------------------------------------- lists


def lists(with_images: bool = True) -> list[dict[str, Any]]:
    rows = []
    for record in tiny_runs.records():
        answers = [message("assistant", text) for text in record.responses]
        row: dict[str, Any] = {"prompt": message("user", record.prompt), "responses": answers}
        row |= {"rewards": list(record.rewards or ()), "source": "made up"}
        rows.append(row | ({"images": [record.image]} if with_images else {}))
    return rows


@pytest.mark.parametrize("as_dataset", [False, True])
def test_lists_with_images_train_as_records_do(as_dataset: bool, tmp_path: Path) -> None:
    """With cached reference log-probs, which DPOTrainer refuses for images."""
    data: Any = datasets.Dataset.from_list(lists()) if as_dataset else lists()
    runner = trainer(tmp_path / "rows", data, "llava", precompute_ref_log_probs=True)
    assert [record.k for record in runner.train_dataset or ()] == [3, 2, 3, 2]
    got = losses(runner)
    assert list((tmp_path / "rows" / "reference").glob("part-*.jsonl"))
    records = trainer(tmp_path / "records", tiny_runs.records(), "llava")
    assert got == losses(records)
    assert got[0] > 0


def test_pairs_with_an_image_column(tmp_path: Path) -> None:
    rows = [row | {"image": tiny_models.picture(seed=i)} for i, row in enumerate(DIALOGUES)]
    runner = trainer(tmp_path, datasets.Dataset.from_list(rows), "qwen2_5_vl")
    assert [record.rewards for record in runner.train_dataset or ()] == [(1.0, 0.0)] * 4
    assert losses(runner)[0] == pytest.approx(0.6931, abs=1e-4)


def test_the_model_may_be_a_name(tmp_path: Path) -> None:
    model, processor = tiny_models.build("llava")
    model.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    args = ListDPOConfig(**settings(tmp_path / "out", model_init_kwargs={"attn_implementation": "eager"}))
    runner = ListDPOTrainer(str(tmp_path / "llava"), args=args, train_dataset=lists())
    assert runner.model.config._attn_implementation == "eager"
    assert losses(runner)[0] > 0


def test_a_prompt_that_is_a_text_is_fed_as_it_stands(tmp_path: Path) -> None:
    runner = trainer(tmp_path, TEXTS[:1], max_steps=1)
    batch = runner.data_collator(runner.train_dataset)
    fed = runner.encoder.tokenizer.decode(batch.inputs["input_ids"].flatten())
    assert fed.startswith("Question 0: it is 4")
    assert "im_start" not in fed
    assert batch.labels[-1] == runner.encoder.tokenizer.eos_token_id
    runner.train()
    runner.save_model(str(tmp_path / "model"))
    saved = (tmp_path / "model" / "chat_template.jinja").read_text()
    assert saved == built()[1].chat_template  # not the one that writes nothing


# ----------------------------------------------------------------------------------------------------------- the names


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)


@pytest.mark.parametrize(
    ("options", "adapters", "reference"),
    [
        ({}, False, "precomputed"),
        ({"precompute_ref_log_probs": True}, True, "precomputed"),
        ({"precompute_ref_log_probs": False}, True, "adapter_off"),
        ({"precompute_ref_log_probs": False}, False, "model"),
        ({"reference_free": True}, False, "none"),
        ({"reference": "adapter_off"}, True, "adapter_off"),
        ({"objective": "simpo"}, False, "none"),
    ],
)
def test_where_the_reference_comes_from(
    options: dict[str, Any], adapters: bool, reference: str, tmp_path: Path
) -> None:
    runner = trainer(tmp_path, peft_config=lora() if adapters else None, **options)
    assert runner.args.reference == reference
    assert (runner.ref_model is not None) == (reference == "model")


def test_all_ways_to_the_reference_train_alike(tmp_path: Path) -> None:
    ways = [{}, {"precompute_ref_log_probs": False}, {"ref_model": built()[0]}]
    first, *others = (losses(trainer(tmp_path / str(i), **way)) for i, way in enumerate(ways))
    for other in others:
        assert other == pytest.approx(first, rel=1e-5)


def test_dropout_is_off_unless_asked_for(tmp_path: Path) -> None:
    def dropped(runner: ListDPOTrainer) -> set[float]:
        return {one.p for one in runner.model.modules() if isinstance(one, nn.Dropout)}

    assert dropped(trainer(tmp_path / "a", peft_config=lora())) == {0.0}
    assert 0.5 in dropped(trainer(tmp_path / "b", peft_config=lora(), disable_dropout=False))


@pytest.mark.parametrize("name", ["max_length", "max_completion_length"])
def test_long_answers_are_cut(name: str, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", DIALOGUES[:1])
    n_prompt = int(whole.data_collator(whole.train_dataset).response_rows[0]) + 1
    limit = n_prompt + 5 if name == "max_length" else 5
    cut = trainer(tmp_path / "cut", DIALOGUES[:1], **{name: limit})
    batch = cut.data_collator(cut.train_dataset)
    assert batch.cu_seqlens.diff().tolist() == [5, 5]
    assert batch.n_cut == 2
    if name == "max_length":
        with pytest.raises(ValueError, match=f"max_length={n_prompt}: this prompt has {n_prompt} tokens.* leaves none"):
            trainer(tmp_path / "none", DIALOGUES[:1], max_length=n_prompt)


def test_max_length_cuts_as_trl_does(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(DIALOGUES)
    model, processor = built()
    reference, _ = built(seed=7)
    whole = trainer(tmp_path, data)
    n = int(whole.data_collator(whole.train_dataset).response_rows[0]) + 1 + 5
    theirs = trl.DPOTrainer(
        copy.deepcopy(model),
        copy.deepcopy(reference),
        trl.DPOConfig(**settings(tmp_path, max_length=n)),
        train_dataset=data,
        eval_dataset=data,
        processing_class=processor,
    )
    ours = trainer(tmp_path, data, ref_model=reference, eval_dataset=data, max_length=n)
    assert ours.data_collator(ours.train_dataset).n_cut > 2
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-5)


def test_the_config_is_read_off_a_command_line(tmp_path: Path) -> None:
    words = f"--output_dir {tmp_path} --use_cpu true --loss_type hinge --model_init_kwargs".split()
    (read,) = HfArgumentParser(ListDPOConfig).parse_args_into_dataclasses([*words, '{"dtype": "auto"}'])
    assert (read.list_objective, read.model_init_kwargs) == (objectives.hinge(0.1), {"dtype": "auto"})


def test_a_config_survives_being_written_out(tmp_path: Path) -> None:
    for options in ({"loss_type": "robust", "label_smoothing": 0.1}, {"objective": "lipo"}, {"reference_free": True}):
        config = ListDPOConfig(str(tmp_path), use_cpu=True, **options)
        names = {field.name for field in dataclasses.fields(config) if field.init}
        values = {name: value for name, value in config.to_dict().items() if name in names}
        again = ListDPOConfig(**(values | {"pad_token": None}))  # transformers writes a word for every token
        assert again.list_objective == config.list_objective
        assert again.reference == config.reference


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "aot"}, "loss_type='aot' is not supported for lists; of TRL's there are sigmoid, .*perpo|"),
        ({"loss_type": ["sigmoid", "sft"]}, "one loss is trained at a time"),
        ({"loss_weights": [1.0]}, "loss_weights=.* is not supported for lists: one loss_type"),
        ({"loss_type": "sigmoid", "objective": "perpo"}, "objective: loss_type='sigmoid' says what is minimised"),
        ({"loss_type": "sigmoid", "gamma": 1.0}, "gamma: loss_type='sigmoid' says"),
        ({"loss_type": "sigmoid", "label_smoothing": 0.1}, "does not use it .nor does TRL.; give loss_type='robust'"),
        ({"label_smoothing": 0.1}, "objective='cdpo' with objective_options={'epsilon': 0.1}"),
        ({"loss_type": "robust", "label_smoothing": 0.7}, r"epsilon must lie in \[0, 0.5\)"),
        ({"f_divergence_type": "forward_kl"}, "f_divergence_type='forward_kl' is not supported"),
        ({"truncation_mode": "keep_end"}, "truncation_mode='keep_end' is not supported"),
        ({"sync_ref_model": True}, "sync_ref_model=True is not supported for lists: the reference is fixed"),
        ({"padding_free": True}, "padding_free"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of=8"),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef=0.1"),
        ({"dataset_num_proc": 4}, "set dataloader_num_workers"),
        ({"reference_free": True, "reference": "model"}, "reference_free=True means reference='none', but 'model'"),
        ({"reference_free": True, "precompute_ref_log_probs": True}, "means reference='precomputed', but 'none'"),
        ({"max_completion_length": 5, "max_response_length": 6}, "two names of one setting"),
        ({"model_init_kwargs": {"device_map": "auto"}}, "model_init_kwargs: device_map not known .known: dtype"),
        ({"max_length": 0}, "max_length must be ≥ 1"),
    ],
)
def test_settings_that_are_not_supported_say_what_to_do(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        ListDPOConfig(str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "a", "answer": "b"}], "row 1: responses: is missing: a row has prompt, responses and rewards, or"),
        ([DIALOGUES[0], {"prompt": "a", "chosen": "b"}], "row 2: chosen: a row has .* this one has prompt, chosen"),
        ([{"chosen": "ab", "rejected": "ac"}], "row 1: prompt: is missing; of chosen and rejected that are texts"),
        ([{**DIALOGUES[0], "rewards": [1, 2]}], "row 1: rewards: belong to responses"),
        ([{"prompt": "a", "responses": "bc", "rewards": [1, 2]}], "row 1: responses: must be a list of answers"),
        ([{"prompt": "a", "responses": ["b", "c"], "rewards": [1]}], "row 1: rewards: must hold one number a response"),
        ([{"prompt": "a", "responses": ["b", "c"], "rewards": [1, float("nan")]}], "row 1: rewards: item 1 must be"),
        ([{"prompt": "a", "chosen": message("assistant", "b"), "rejected": "c"}], "row 1: chosen: holds messages, but"),
        ([{**DIALOGUES[0], "chosen": message("user", "b")}], "row 1: chosen: must be one message of the assistant"),
        ([{**DIALOGUES[0], "chosen": [{"role": "assistant", "content": "", "tool_calls": [1]}]}], "tool_calls of a"),
        ([{**DIALOGUES[0], "chosen": message("assistant", None)}], "row 1: chosen: an answer must consist of text"),
        ([{**DIALOGUES[0], "chosen": message("assistant", [{"type": "image"}])}], "an answer must consist of text"),
        ([{**DIALOGUES[0], "tools": ["f"]}], "row 1: tools: is not given to the chat template"),
        ([{**DIALOGUES[0], "images": [1, 2]}], "row 1: images: holds 2 images"),
        ([DIALOGUES[0], TEXTS[1]], "prompt is a text in row 2 and messages in row 1"),
        ([], "train_dataset: it has no rows"),
        ([{"prompt": "a", "responses": ["b", "c"], "rewards": [1, 1]}], "has one response a higher reward"),
    ],
)
def test_rows_that_cannot_be_used_are_named(rows: list[Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        trainer(tmp_path, rows)


def test_streams_and_several_data_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="train_dataset: IterableDataset is a stream"):
        trainer(tmp_path, datasets.Dataset.from_list(DIALOGUES).to_iterable_dataset())
    with pytest.raises(TypeError, match=r"eval_dataset: got several data sets \(a, b\); give one"):
        trainer(tmp_path, eval_dataset={"a": DIALOGUES, "b": DIALOGUES})
    for eval_dataset in (TEXTS, tiny_runs.records()):
        with pytest.raises(ValueError, match="eval_dataset: its prompts must be of the same kind"):
            trainer(tmp_path, DIALOGUES if eval_dataset is TEXTS else TEXTS, eval_dataset=eval_dataset)


def test_arguments_that_are_not_supported_say_what_to_do(tmp_path: Path) -> None:
    model, processor = built()
    args = ListDPOConfig(**settings(tmp_path))
    common: dict[str, Any] = {"train_dataset": DIALOGUES, "processing_class": processor}
    for name in ("data_collator", "compute_metrics", "quantization_config"):
        with pytest.raises(ValueError, match=f"^{name}: "):
            ListDPOTrainer(model, args=args, **common, **{name: object()})
    with pytest.raises(TypeError, match=r"^model must be a model or the name of one, got NoneType"):
        ListDPOTrainer(None, args=args, **common)
    with pytest.raises(
        TypeError, match="ref_model must be a model or None; ref_model_name_or_path takes a name, got s"
    ):
        ListDPOTrainer(model, "gpt2", args, **common)
    with pytest.raises(TypeError, match=r"args must be a ListDPOConfig, .* got PerPOConfig"):
        ListDPOTrainer(model, args=PerPOConfig(str(tmp_path), use_cpu=True), **common)
    with pytest.raises(ValueError, match="processing_class: the model does not say where it comes from"):
        ListDPOTrainer(model, args=args, train_dataset=DIALOGUES)
    with_dtype = ListDPOConfig(**settings(tmp_path, model_init_kwargs={"dtype": "auto"}))
    with pytest.raises(ValueError, match=r"model_init_kwargs \(dtype\): the model is loaded already"):
        ListDPOTrainer(model, args=with_dtype, **common)
    with pytest.raises(ValueError, match="precompute_ref_log_probs=True is computed by the model as it is before"):
        trainer(tmp_path, ref_model=copy.deepcopy(model), precompute_ref_log_probs=True)


def test_a_model_of_experts_is_told_that_their_loss_is_missing(tmp_path: Path) -> None:
    model, processor = built()
    model.config.output_router_logits = False
    common: dict[str, Any] = {"train_dataset": DIALOGUES, "processing_class": processor}
    with pytest.raises(ValueError, match="router_aux_loss_coef: Qwen2ForCausalLM has experts"):
        ListDPOTrainer(model, args=ListDPOConfig(**settings(tmp_path)), **common)
    ListDPOTrainer(model, args=ListDPOConfig(**settings(tmp_path, router_aux_loss_coef=0.0)), **common)


def test_trained_adapters_are_no_reference_in_silence(tmp_path: Path) -> None:
    model, processor = built()
    model = get_peft_model(model, lora())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    common: dict[str, Any] = {"train_dataset": DIALOGUES, "processing_class": processor}
    with pytest.raises(ValueError, match="model: its adapters are trained already, and TRL takes them"):
        ListDPOTrainer(model, args=ListDPOConfig(**settings(tmp_path)), **common)
    args = ListDPOConfig(**settings(tmp_path, reference="adapter_off"))
    assert ListDPOTrainer(model, args=args, **common).args.reference == "adapter_off"


def test_records_stay_what_they_are_for_perpo(tmp_path: Path) -> None:
    record = ListRecord("r", None, "Where?", responses=("a", "b"), rewards=(1.0, 0.0))
    runner = trainer(tmp_path, [record])
    fed = runner.encoder.tokenizer.decode(runner.data_collator(runner.train_dataset).inputs["input_ids"].flatten())
    assert fed.startswith("<|im_start|>user\nWhere?<|im_end|>")
