"""vLLM is asked for the same distribution as transformers; a stand-in takes the place of its engine."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perpo.encoding.encoder import Encoder
from perpo.sampling.sampler import Answer, Question, Sampling
from perpo.sampling.with_vllm import VllmSampler

from .. import tiny_models

PICTURE = tiny_models.picture((60, 44))
ASKED = Question("a", "Where is the glass?", PICTURE)


class StandIn:
    """`vllm`, giving two prepared answers to every prompt."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.engine: dict[str, Any] = {}
        self.asked: list[Any] = []

    def LLM(self, **settings: Any) -> "StandIn":
        self.engine = settings
        return self

    def SamplingParams(self, **settings: Any) -> SimpleNamespace:
        return SimpleNamespace(**settings)

    def generate(self, prompts: list[Any], settings: list[Any], use_tqdm: bool) -> list[Any]:
        self.asked += [prompts, settings]
        words = self.encoder.tokenizer
        one = SimpleNamespace(token_ids=[*words("yes")["input_ids"], self.encoder.end_ids[0]], finish_reason="stop")
        cut = SimpleNamespace(token_ids=words("no")["input_ids"], finish_reason="length")
        return [SimpleNamespace(outputs=[one, cut])] * len(prompts)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    model, processor = tiny_models.build("llava")
    made = StandIn(Encoder.for_model(processor, model))
    monkeypatch.setitem(sys.modules, "vllm", made)  # type: ignore[arg-type]
    return made


def test_vllm_is_asked_with_unexpanded_tokens_and_a_seed_for_each_record(vllm: StandIn) -> None:
    made = VllmSampler("some/model", vllm.encoder, Sampling(0.7, 0.9, 5, seed=3), {"dtype": "bfloat16"})
    answers = made.sample([ASKED, Question("b", "Why?", None)], 2, attempt=1)
    assert answers == [[Answer("yes", True), Answer("no", False)]] * 2
    prompts, settings = vllm.asked
    ids = prompts[0]["prompt_token_ids"]
    processor = vllm.encoder.processor
    assert ids.count(processor.image_token_id) == 1
    assert ids.count(processor.tokenizer.bos_token_id) == 1
    assert prompts[0]["multi_modal_data"] == {"image": PICTURE}
    assert "multi_modal_data" not in prompts[1]
    assert [s.seed for s in settings] == [made.sampling.seed_of("a", 1), made.sampling.seed_of("b", 1)]


def test_nothing_between_logits_and_answers_is_left_to_a_default(vllm: StandIn) -> None:
    """vLLM's own default is the model's generation config: its penalties, top-k and largest number of tokens."""
    made = VllmSampler("some/model", vllm.encoder, Sampling(0.7, 0.9, 5, seed=3), {"dtype": "bfloat16"})
    assert vllm.engine == {
        "model": "some/model",
        "dtype": "bfloat16",
        "generation_config": "vllm",
        "enable_prefix_caching": True,
        "limit_mm_per_prompt": {"image": 1},
    }
    made.sample([ASKED], 2)
    assert vars(vllm.asked[1][0]) | {"seed": 0} == {
        "n": 2,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "min_tokens": 0,
        "max_tokens": 5,
        "seed": 0,
        "stop_token_ids": list(vllm.encoder.end_ids),
    }


@pytest.mark.parametrize(
    "options",
    [{"generation_config": "auto"}, {"override_generation_config": {"top_k": 1}}, {"logits_processors": ["my:Own"]}],
)
def test_options_that_change_the_distribution_are_refused(vllm: StandIn, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"engine_options: {next(iter(options))} changes the distribution"):
        VllmSampler("some/model", vllm.encoder, Sampling(), options)
    VllmSampler("some/model", vllm.encoder, Sampling(), {"generation_config": "vllm"})


def test_the_identity_holds_what_the_answers_depend_on_and_not_what_only_speed_does(vllm: StandIn) -> None:
    def identity(encoder: Encoder = vllm.encoder, **options: Any) -> dict[str, str]:
        return VllmSampler("some/model", encoder, Sampling(), options).identity()

    plain = identity()
    assert plain["engine"] == "vllm"
    assert plain["model"] == "some/model"
    assert identity(tensor_parallel_size=2, gpu_memory_utilization=0.5, max_num_seqs=8, enforce_eager=True) == plain
    for other in ({"dtype": "float16"}, {"quantization": "fp8"}, {"max_model_len": 512}, {"load_format": "dummy"}):
        assert identity(**other) != plain
    assert identity(Encoder(vllm.encoder.processor, [7])) != plain


def test_a_prompt_beyond_the_limit_is_refused_as_by_transformers(vllm: StandIn) -> None:
    vllm.encoder.max_prompt_length = 8
    made = VllmSampler("some/model", vllm.encoder, Sampling())
    with pytest.raises(ValueError, match="max_prompt_length=8: this prompt has"):
        made.sample([ASKED], 1)
    assert not vllm.asked


def test_without_vllm_the_message_says_what_to_install(vllm: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"pip install 'perpo\[vllm\]'"):
        VllmSampler("some/model", vllm.encoder, Sampling())


def test_a_picture_of_which_the_model_sees_a_part_is_refused_before_anything_is_drawn(vllm: StandIn) -> None:
    images = vllm.encoder.processor.image_processor
    images.do_center_crop, images.size = True, {"shortest_edge": images.crop_size["height"]}
    made = VllmSampler("some/model", vllm.encoder, Sampling())
    with pytest.raises(ValueError, match=r"image: .* crops a picture of 60×44 to its centre"):
        made.sample([ASKED], 1)
    assert not vllm.asked


def test_a_model_in_a_folder_is_known_by_what_is_in_it(vllm: StandIn, tmp_path: Path) -> None:
    def identity(folder: Path) -> dict[str, str]:
        return VllmSampler(str(folder), vllm.encoder, Sampling()).identity()

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    first = identity(tmp_path / "a")
    assert identity(tmp_path / "b") == first
    (tmp_path / "a" / "README.md").write_text("no part of it")
    assert identity(tmp_path / "a") == first
    (tmp_path / "a" / "model.safetensors").write_bytes(b"trained")
    assert {name for name, value in identity(tmp_path / "a").items() if value != first[name]} == {"model"}
