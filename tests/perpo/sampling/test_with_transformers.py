"""Samplers: forked answers are those of plain generation, from the model's own distribution, by record and seed."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from perpo.encoding.encoder import Encoder
from perpo.sampling.sampler import Answer, Question, Sampling, distinct_answers
from perpo.sampling.with_transformers import ForkingNotExact, TransformersSampler
from perpo.sampling.with_vllm import VllmSampler

from .. import tiny_models

ALMOST_GREEDY = Sampling(temperature=1e-5, max_new_tokens=8)  # still runs through the sampling of k rows
PICTURE = tiny_models.picture((60, 44))
ASKED = Question("a", "Where is the glass?", PICTURE)


def sampler(family: str = "llava", sampling: Sampling = ALMOST_GREEDY, **options: Any) -> TransformersSampler:
    model, processor = tiny_models.build(family)
    return TransformersSampler(model, Encoder.for_model(processor, model), sampling, **options)


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


def test_answers_follow_the_models_own_distribution() -> None:
    """Whatever its generation config says: training computes log-probs without penalties and without top-k."""
    made = sampler(sampling=Sampling(temperature=2.0, max_new_tokens=1))
    for name, value in {"temperature": 0.01, "top_k": 1, "repetition_penalty": 9.0, "min_p": 0.5, "top_p": 0.1}.items():
        setattr(made.model.generation_config, name, value)
    prefix = made._prefix(ASKED)
    inputs = made.encoder.prompt(ASKED.prompt, ASKED.image)
    with torch.no_grad():
        p = (made.model(**inputs).logits[0, -1] / 2.0).softmax(-1)
    torch.manual_seed(0)
    n = 20_000
    drawn = made._generate(prefix, n, **made._options).sequences[:, -1]
    counts = torch.bincount(drawn, minlength=p.numel())
    likely = p > 5e-4
    chi2 = ((counts - n * p).square() / (n * p))[likely].sum()
    dof = int(likely.sum())
    assert chi2 < dof + 5 * (2 * dof) ** 0.5


def test_top_p_draws_only_from_the_nucleus() -> None:
    made = sampler(sampling=Sampling(top_p=0.3, max_new_tokens=1))
    inputs = made.encoder.prompt(ASKED.prompt, ASKED.image)
    with torch.no_grad():
        p, order = made.model(**inputs).logits[0, -1].softmax(-1).sort(descending=True)
    nucleus = set(order[: int((p.cumsum(0) < 0.3).sum()) + 1].tolist())
    drawn = made._generate(made._prefix(ASKED), 500, **made._options).sequences[:, -1]
    assert set(drawn.tolist()) == nucleus


def test_answers_depend_on_record_seed_and_attempt_and_on_nothing_else() -> None:
    hot = Sampling(temperature=1.5, max_new_tokens=8)
    made, questions = sampler(sampling=hot), [ASKED, Question("b", "Where is the glass?", PICTURE)]
    state = torch.random.get_rng_state()
    first = made.sample(questions, 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)
    again = sampler(sampling=hot).sample(questions[::-1], 3)[::-1]
    assert first == again
    others = [first[1], made.sample([ASKED], 3, attempt=1)[0]]
    others.append(sampler(sampling=Sampling(temperature=1.5, max_new_tokens=8, seed=1)).sample([ASKED], 3)[0])
    assert all(first[0] != other for other in others)
    assert len(set(first[0])) == 3
    in_parts = sampler(sampling=hot, answers_at_once=2)
    assert len(in_parts.sample([ASKED], 3)[0]) == 3


def test_without_temperature_the_likeliest_answer_is_given() -> None:
    made = sampler(sampling=Sampling(temperature=0, max_new_tokens=8))
    assert {answer.text for answer in made.sample([ASKED], 3)[0]} == {plain(made, ASKED)}


def test_an_answer_without_an_end_is_marked() -> None:
    made = sampler(sampling=Sampling(max_new_tokens=3))
    cut = [7, 8, 9]
    assert made._answer(cut).complete is False
    assert made._answer([7, made.encoder.end_ids[-1], made.encoder.pad_id]).complete


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be ≥ 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"max_new_tokens": 0}, "max_new_tokens must be ≥ 1"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


class Scripted:
    """Gives prepared answers, and notes what it was asked."""

    encoder: Any = None
    batch_size = 2

    def __init__(self, **texts: list[list[str]]) -> None:
        self.texts = texts
        self.asked: list[tuple[str, int, int]] = []

    def sample(self, questions: Any, n: int, attempt: int = 0) -> list[list[Answer]]:
        self.asked += [(question.id, n, attempt) for question in questions]
        return [[Answer(text, True) for text in self.texts[question.id][attempt][:n]] for question in questions]

    def identity(self) -> dict[str, str]:
        return {}


def test_different_answers_are_looked_for_up_to_a_limit() -> None:
    made = Scripted(
        a=[["x", "x", "y"], ["x", "z", "w"], ["?", "?", "?"]],
        b=[["1", "2", "3"]],
        c=[["o", "o", "o"], ["o", "o", "o"], ["p"]],
    )
    questions = [Question(name, "?", None) for name in "abc"]
    texts = [[answer.text for answer in answers] for answers in distinct_answers(made, questions, 3, 7)]
    assert texts == [["x", "y", "z"], ["1", "2", "3"], ["o", "p", "o"]]
    assert made.asked == [("a", 3, 0), ("b", 3, 0), ("c", 3, 0), ("a", 3, 1), ("c", 3, 1), ("c", 1, 2)]


def test_vllm_is_asked_with_unexpanded_tokens_and_a_seed_for_each_record(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class LLM:
        def __init__(self, **settings: Any) -> None:
            calls.append(settings)

        def generate(self, prompts: list[Any], settings: list[Any], use_tqdm: bool) -> list[Any]:
            calls.append((prompts, settings))
            end = encoder.end_ids[0]
            one = SimpleNamespace(token_ids=[*encoder.tokenizer("yes")["input_ids"], end], finish_reason="stop")
            cut = SimpleNamespace(token_ids=encoder.tokenizer("no")["input_ids"], finish_reason="length")
            return [SimpleNamespace(outputs=[one, cut])] * len(prompts)

    fake = SimpleNamespace(LLM=LLM, SamplingParams=lambda **settings: SimpleNamespace(**settings))
    monkeypatch.setitem(sys.modules, "vllm", fake)  # type: ignore[arg-type]
    model, processor = tiny_models.build("llava")
    encoder = Encoder.for_model(processor, model)
    made = VllmSampler("some/model", encoder, Sampling(0.7, 0.9, 5, seed=3), {"dtype": "bfloat16"})
    assert calls[0] == {
        "model": "some/model",
        "dtype": "bfloat16",
        "enable_prefix_caching": True,
        "limit_mm_per_prompt": {"image": 1},
    }
    answers = made.sample([ASKED, Question("b", "Why?", None)], 2, attempt=1)
    assert answers == [[Answer("yes", True), Answer("no", False)]] * 2
    prompts, settings = calls[1]
    ids = prompts[0]["prompt_token_ids"]
    assert ids.count(processor.image_token_id) == 1
    assert ids.count(processor.tokenizer.bos_token_id) == 1
    assert prompts[0]["multi_modal_data"] == {"image": PICTURE}
    assert "multi_modal_data" not in prompts[1]
    assert [s.seed for s in settings] == [made.sampling.seed_of("a", 1), made.sampling.seed_of("b", 1)]
    assert vars(settings[0]) | {"seed": 0} == {
        "n": 2,
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 5,
        "seed": 0,
        "stop_token_ids": list(encoder.end_ids),
    }
    assert made.identity()["model"] == "some/model"


def test_without_vllm_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"pip install 'perpo\[vllm\]'"):
        VllmSampler("some/model", sampler().encoder, ALMOST_GREEDY)
