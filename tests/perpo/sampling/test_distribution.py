"""Tokens are drawn from softmax(logits / temperature) cut to top_p alone, and an answer depends on its seed alone."""

from collections import Counter
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from perpo.sampling.sampler import Question, Sampling
from perpo.sampling.with_transformers import TransformersSampler

from ..tiny_samplers import ASKED, PICTURE, ids_of, sampler


def next_log_probs(made: TransformersSampler, question: Question, begun: list[int]) -> torch.Tensor:  # [V]
    """log softmax(logits / temperature) of the token after `begun`, by a plain forward pass."""
    inputs = made.encoder.prompt(question.prompt, question.image)
    for key, value in (("input_ids", begun), ("attention_mask", [1] * len(begun))):
        inputs[key] = torch.cat([inputs[key], torch.tensor([value], dtype=torch.int64)], 1)
    with torch.no_grad():
        logits = made.model(**inputs).logits[0, -1].double()
    return (logits / (made.sampling.temperature or 1)).log_softmax(-1)


def nucleus(p: torch.Tensor, top_p: float) -> torch.Tensor:  # [V], [V]
    """p on the smallest set of most likely tokens that holds top_p, by definition, 0 elsewhere; sums to 1."""
    order = p.argsort(descending=True)
    n_kept = next(n for n in range(1, p.numel() + 1) if p[order[:n]].sum() >= top_p or n == p.numel())
    kept = torch.zeros_like(p)
    kept[order[:n_kept]] = p[order[:n_kept]]
    return kept / kept.sum()


def assert_shares(drawn: list[int], p: torch.Tensor) -> None:
    """Pearson's χ² of the drawn tokens within five standard deviations, rare tokens counted as one."""
    n = len(drawn)
    counts = torch.bincount(torch.tensor(drawn), minlength=p.numel()).double()
    assert not counts[p == 0].any()
    likely = p * n > 5
    assert likely.sum() > 3
    groups = [(counts[likely], p[likely]), (counts[~likely].sum()[None], p[~likely].sum()[None])]
    chi2 = sum(((c - n * q).square() / (n * q)).sum() for c, q in groups if q.sum() * n > 5)
    dof = int(likely.sum())
    assert chi2 < dof + 5 * (2 * dof) ** 0.5


# Options of a generation config that change which tokens `generate` gives, or how many, or stop it with an error.
HOSTILE: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.01,
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 0.99,
    "top_h": 0.1,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5,
    "repetition_penalty": 9.0,
    "encoder_repetition_penalty": 9.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "bad_words_ids": [[i] for i in range(200)],
    "sequence_bias": [[[7], 50.0]],
    "suppress_tokens": list(range(200)),
    "begin_suppress_tokens": list(range(200)),
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 7,
    "exponential_decay_length_penalty": (1, 9.0),
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "watermarking_config": {"bias": 9.0, "seeding_scheme": "selfhash", "context_width": 1},
    "guidance_scale": 3.0,
    "token_healing": True,
    "num_beams": 3,
    "num_return_sequences": 1,
    "length_penalty": 5.0,
    "early_stopping": True,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "prompt_lookup_num_tokens": 3,
    "max_length": 2,
    "max_new_tokens": 1,
    "min_length": 900,
    "min_new_tokens": 30,
    "max_time": 0.0,
    "stop_strings": ["a", "e"],
    "use_cache": False,
    "cache_implementation": "static",
    "max_cache_len": 3,
    "prefill_chunk_size": 2,
    "return_dict_in_generate": False,
    "output_scores": True,
    "eos_token_id": 7,
    "pad_token_id": 7,
    "something_of_their_own": 3,
}


@pytest.fixture(scope="module")
def undisturbed() -> dict[float, list[list[list[int]]]]:
    """Token ids by temperature."""
    return {t: ids_of(sampler(sampling=Sampling(t, 0.95, 8)), [ASKED], 6) for t in (0.0, 1.0)}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_models_generation_config_takes_no_part(name: str, undisturbed: dict[float, list[list[list[int]]]]) -> None:
    """Whatever it says: training computes log-probs of softmax(logits / temperature)."""
    for temperature, ids in undisturbed.items():
        made = sampler(sampling=Sampling(temperature, 0.95, 8))  # its encoder knows the real end tokens
        config = made.model.generation_config
        setattr(config, name, HOSTILE[name])
        made.model.train()
        assert ids_of(made, [ASKED], 6) == ids
        assert made.model.generation_config is config
        assert getattr(config, name) == HOSTILE[name]
        assert all(module.training for module in made.model.modules())


def test_all_of_it_takes_no_part_inside_an_adapter_either(undisturbed: dict[float, list[list[list[int]]]]) -> None:
    for temperature, ids in undisturbed.items():
        made = sampler(sampling=Sampling(temperature, 0.95, 8))
        made.model = get_peft_model(made.model, LoraConfig(r=2, target_modules=["q_proj"]), "default")
        config = GenerationConfig()
        for name, value in HOSTILE.items():
            setattr(config, name, value)
        made.model.generation_config = config  # PeftModel gives it to the model that it wraps, at every call
        made.model.get_base_model().generation_config = config
        assert ids_of(made, [ASKED], 6) == ids
        assert made.model.generation_config is made.model.get_base_model().generation_config is config


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 1.0), (0.5, 1.0), (1.0, 0.7), (1.5, 0.3)])
def test_tokens_are_drawn_from_softmax_of_logits_cut_to_top_p(family: str, temperature: float, top_p: float) -> None:
    made = sampler(family, Sampling(temperature, top_p, max_new_tokens=2))
    for name in ("top_k", "min_p", "suppress_tokens", "repetition_penalty"):
        setattr(made.model.generation_config, name, HOSTILE[name])
    (drawn,) = ids_of(made, [ASKED], 10_000)
    assert_shares([ids[0] for ids in drawn], nucleus(next_log_probs(made, ASKED, []).exp(), top_p))
    often = Counter(ids[0] for ids in drawn).most_common(1)[0][0]  # and the token after the most frequent one
    if family == "llava" and temperature <= 1:  # others are not frequent enough
        after = [ids[1] for ids in drawn if ids[0] == often]
        assert_shares(after, nucleus(next_log_probs(made, ASKED, [often]).exp(), top_p))


@pytest.mark.parametrize("sampling", [Sampling(1.0, 1.0, 8), Sampling(1.5, 0.7, 8, seed=3)], ids=["plain", "top_p"])
def test_the_answers_are_those_that_generate_itself_samples_from_this_seed(sampling: Sampling) -> None:
    made = sampler(sampling=sampling)
    rows = {name: x.repeat(4, *[1] * (x.dim() - 1)) for name, x in made.encoder.prompt(*ASKED[1:]).items()}
    options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0, "max_new_tokens": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sampling.seed_of("a", 0))
        expected = made.model.eval().generate(**rows, do_sample=True, **options)[:, rows["input_ids"].shape[1] :]
    assert [answer.text for answer in made.sample([ASKED], 4)[0]] == [made.encoder.decode(row) for row in expected]


def test_answers_to_one_question_are_independent_of_each_other() -> None:
    made = sampler(sampling=Sampling(2.0, max_new_tokens=1))
    p = next_log_probs(made, ASKED, []).exp()
    (drawn,) = ids_of(made, [ASKED], 8000)
    n_same = sum(one == two for one, two in zip(drawn[::2], drawn[1::2], strict=True))
    chance = float(p.square().sum())
    assert abs(n_same - 4000 * chance) < 5 * (4000 * chance * (1 - chance)) ** 0.5


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
    in_parts = sampler(sampling=hot, answers_at_once=2).sample(questions, 3)
    assert [len(answers) for answers in in_parts] == [3, 3]
    assert len(set(in_parts[0])) == 3
    assert sampler(sampling=hot, share_prompt=False).sample(questions, 3) == first


def test_a_prefill_is_not_kept_from_one_set_of_weights_to_the_next() -> None:
    hot = Sampling(temperature=1.5, max_new_tokens=8)
    made, other = sampler(sampling=hot), sampler(sampling=hot, seed=1)
    before, expected = made.sample([ASKED], 2), other.sample([ASKED], 2)
    made.model.load_state_dict(other.model.state_dict())
    assert made.sample([ASKED], 2) == expected != before


def test_logits_that_are_not_numbers_are_an_error_that_names_the_record() -> None:
    for temperature in (0.0, 1.0):
        made = sampler(sampling=Sampling(temperature, max_new_tokens=4), share_prompt=False)
        config = made.model.generation_config
        with torch.no_grad():
            made.model.lm_head.weight[5] = float("nan")
        with pytest.raises(ValueError, match="record 'a': the model's logits are NaN"):
            made.sample([ASKED], 2)
        assert made.model.generation_config is config
