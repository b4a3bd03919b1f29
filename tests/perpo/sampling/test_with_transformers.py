"""Forked and greedy answers are those of plain generation, whatever the batch; their identity."""

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import DynamicCache

from perpo.encoding.encoder import Encoder
from perpo.sampling.sampler import Answer, Question, Sampling
from perpo.sampling.with_transformers import ForkingNotExact, TransformersSampler, left_padded

from .. import tiny_models, tiny_runs
from ..tiny_samplers import ALMOST_GREEDY, ASKED, PICTURE, ids_of, sampler


def plain(made: TransformersSampler, question: Question) -> str:
    """What the model itself says, greedily."""
    inputs = made.encoder.prompt(question.prompt, question.image)
    ids = made.model.generate(**inputs, do_sample=False, max_new_tokens=made.sampling.max_new_tokens)
    return made.encoder.decode(ids[0, inputs["input_ids"].shape[1] :])


@contextmanager
def seen_by_tower(model: Any) -> Iterator[list[int]]:
    """The number of pixel values in each call of the vision tower."""
    names = ("visual", "vision_tower", "vision_model")
    tower = next(getattr(model.model, name) for name in names if hasattr(model.model, name))
    calls: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        calls.append(given[0].numel())

    handle = tower.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_k_answers_are_those_of_plain_generation_from_one_look_at_the_image(family: str) -> None:
    made = sampler(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ForkingNotExact)
        for question in (
            ASKED,
            Question("b", "Why?", None),
            Question("c", "And where?", tiny_models.picture((28, 60))),
        ):
            answers = made.sample([question], 3)[0]
            plain(made, Question("", "In between?", tiny_models.picture((56, 56))))  # Qwen-VL's model remembers it
            answers += made.sample([question], 2, attempt=1)[0]
            assert [answer.text for answer in answers] == [plain(made, question)] * 5
    assert made.forks
    with seen_by_tower(made.model) as once:
        plain(made, ASKED)
    with seen_by_tower(made.model) as shared:
        made.sample([ASKED], 4)
        made.sample([ASKED], 4, attempt=1)
    assert shared == once
    separate = sampler(family, share_prompt=False)
    with seen_by_tower(separate.model) as each:
        answers = separate.sample([ASKED], 4)[0]
    assert sum(each) == 4 * sum(once)
    assert [answer.text for answer in answers] == [plain(separate, ASKED)] * 4


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_rounding_is_not_taken_for_a_difference(family: str) -> None:
    model, processor = tiny_models.build(family, dtype=torch.bfloat16)
    made = TransformersSampler(model, Encoder.for_model(processor, model), ALMOST_GREEDY)
    made.sample([ASKED], 2)
    assert made.forks


def _raise(cache: DynamicCache, repeats: int) -> None:
    raise NotImplementedError("no batches")


def _spoil(cache: DynamicCache, repeats: int) -> None:
    for layer in cache.layers:
        layer.batch_repeat_interleave(repeats)
        layer.values = layer.values.roll(1, dims=2)


@pytest.mark.parametrize(("broken", "reason"), [(_raise, "no batches"), (_spoil, "other logits than plain ones")])
def test_what_cannot_be_forked_exactly_is_not_forked_and_says_what_that_costs(
    broken: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DynamicCache, "batch_repeat_interleave", broken)
    made = sampler("qwen2_vl")
    with pytest.warns(ForkingNotExact, match=rf"(?s){reason}.*k times its prefill"):
        answers = made.sample([ASKED], 3)[0]
    assert made.forks is False
    assert [answer.text for answer in answers] == [plain(made, ASKED)] * 3


def test_without_temperature_the_likeliest_answer_is_given() -> None:
    made = sampler(sampling=Sampling(temperature=0, max_new_tokens=8))
    assert {answer.text for answer in made.sample([ASKED], 3)[0]} == {plain(made, ASKED)}


# ---------------------------------------------------------------------------------------------------------- greedy


def questions_of_several_sizes() -> list[Question]:
    sizes = ((40, 28), (70, 30), (28, 56))
    asked = [
        Question(f"r{i}", "Where is " + "it? " * (i + 1), tiny_models.picture(size, i)) for i, size in enumerate(sizes)
    ]
    return [asked[0], Question("no image", "Why?", None), *asked[1:], Question("nor here", "And why is that?", None)]


@pytest.mark.parametrize("family", [*tiny_models.FAMILIES, *tiny_models.MORE_FAMILIES])
def test_a_greedy_answer_does_not_depend_on_its_batch(family: str) -> None:
    greedy, questions = Sampling(0, max_new_tokens=5), questions_of_several_sizes()
    if family == "paligemma":  # takes no question without an image
        questions = [question for question in questions if question.image is not None]
    options = {"seed": 1}  # the weights of seed 0 make Gemma 3 say the same to everything
    together = ids_of(sampler(family, greedy, **options), questions, 1)
    assert together == [ids_of(sampler(family, greedy, **options), [question], 1)[0] for question in questions]
    assert together == ids_of(sampler(family, greedy, **options, answers_at_once=2), questions, 1)
    assert len({str(ids) for ids in together}) > 1


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_greedy_is_the_most_probable_token_again_and_again(family: str) -> None:
    made = sampler(family, Sampling(0, max_new_tokens=5))
    made.model.generation_config.update(repetition_penalty=9.0, do_sample=True, temperature=9.0, min_new_tokens=4)
    ids = made.encoder.prompt(ASKED.prompt, ASKED.image)
    said: list[int] = []
    for _ in range(5):
        with torch.no_grad():
            token = int(made.model(**ids).logits[0, -1].argmax())
        said.append(token)
        if token in made.encoder.end_ids:
            break
        for key, value in (("input_ids", token), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            if key in ids:
                ids[key] = torch.cat([ids[key], torch.tensor([[value]])], 1)
    expected = Answer(made.encoder.decode(said), said[-1] in made.encoder.end_ids)
    assert made.sample([ASKED], 2) == [[expected] * 2]


def test_rows_are_padded_on_the_left() -> None:
    prompts = [{"input_ids": torch.tensor([[5, 6, 7]])}, {"input_ids": torch.tensor([[8]])}]
    inputs = left_padded(prompts, pad_id=0)
    assert inputs["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompt_that_cannot_be_encoded_names_its_record(temperature: float) -> None:
    with pytest.raises(ValueError, match="record 'two': prompt: 2 places for a picture"):
        sampler(sampling=Sampling(temperature)).sample([Question("two", "<image><image>", PICTURE)], 1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_ends_at_any_of_several_end_tokens(temperature: float) -> None:
    sampling = Sampling(temperature, max_new_tokens=6)
    ids = ids_of(sampler(sampling=sampling), [ASKED], 1)[0][0]
    assert len(set(ids)) > 2
    model, processor = tiny_models.build("llava")
    model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id, ids[2]]
    made = TransformersSampler(model, Encoder.for_model(processor, model), sampling)
    made.encoder.decode = lambda row: json.dumps(list(row))
    (answer,) = made.sample([ASKED], 1)[0]
    assert json.loads(answer.text) == ids[: ids.index(ids[2]) + 1]  # and nothing was generated after it
    assert answer.complete


# -------------------------------------------------------------------------------------------------------- identity


def test_the_identity_holds_what_the_answers_depend_on() -> None:
    def identity(change: Callable[[Any], Any] = lambda made: None, **options: Any) -> dict[str, str]:
        made = sampler(sampling=Sampling(**options))
        made.model = get_peft_model(made.model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        for i, parameter in enumerate(made.model.parameters()):
            parameter.data = torch.linspace(-1, 1, parameter.numel()).roll(i).reshape(parameter.shape)
        change(made)
        return made.identity()

    def different(*given: Any, **options: Any) -> set[str]:
        plain, other = identity(), identity(*given, **options)
        assert plain.keys() == other.keys()
        return {name for name in plain if plain[name] != other[name]}

    def end_elsewhere(made: Any) -> None:
        made.encoder.end_ids = (7,)

    def scaled(made: Any) -> None:
        for module in made.model.modules():
            if isinstance(module, BaseTunerLayer):
                module.scale_layer(2.0)

    assert identity()["engine"] == "transformers"
    assert different() == set()
    for option in ({"temperature": 0.5}, {"top_p": 0.5}, {"seed": 1}, {"max_new_tokens": 3}):
        assert different(**option) == set(option)
    assert different(end_elsewhere) == {"end tokens", "response format"}
    assert different(scaled) == {"adapters"}
    assert different(lambda made: made.model.base_model.disable_adapter_layers()) == {"adapters"}
    assert different(lambda made: made.model.lm_head.weight.data.add_(1)) == {"weights"}
    assert different(lambda made: setattr(made, "answers_at_once", 1)) == {"answers_at_once"}
    assert "answers_at_once" not in identity(temperature=0)
    assert different(lambda made: setattr(made.model.get_base_model().generation_config, "top_k", 1)) == set()


def test_a_model_in_training_answers_as_in_evaluation(tmp_path: Path) -> None:
    trainer = tiny_runs.trainer("llava", tmp_path, dropout=0.5)
    trainer.train()
    model, encoder = trainer.model.train(), trainer.encoder
    for temperature in (0.0, 1.0):
        made = TransformersSampler(model, encoder, Sampling(temperature, max_new_tokens=6))
        answers = made.sample([ASKED], 3)
        modes = [module.training for module in model.modules()]
        assert any(modes)
        assert made.sample([ASKED], 3) == answers
        assert [module.training for module in model.modules()] == modes
        still = TransformersSampler(copy.deepcopy(model).eval(), encoder, made.sampling)
        assert still.sample([ASKED], 3) == answers
