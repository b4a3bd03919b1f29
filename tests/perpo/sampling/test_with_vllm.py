"""vLLM is asked for the same distribution as transformers; a stand-in takes the place of its engine."""

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import get_peft_model

from perpo.encoding.encoder import Encoder
from perpo.model.trainable import language_lora
from perpo.sampling.sampler import Answer, Question, Sampling
from perpo.sampling.with_vllm import OtherTokens, VllmSampler

from .. import tiny_models

PICTURE = tiny_models.picture((60, 44))
ASKED = Question("a", "Where is the glass?", PICTURE)


class StandIn:
    """`vllm`, giving two prepared answers to every prompt; and each of its modules that is used.

    The real one: `test_real_vllm`.
    """

    __version__ = "0.32.0"

    class VLLMClientError(Exception):
        """No ValueError."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.engine: dict[str, Any] = {}
        self.asked: list[Any] = []
        self.adapter: Any = None
        self.on_cpu = False
        self.finish_reasons = ["stop", "length"]
        self.refused: str | None = None
        self.current_platform = SimpleNamespace(is_cpu=lambda: self.on_cpu)

    def LLM(self, **settings: Any) -> "StandIn":
        self.engine = settings
        return self

    def SamplingParams(self, **settings: Any) -> SimpleNamespace:
        return SimpleNamespace(**settings)

    def LoRARequest(self, name: str, number: int, path: str) -> tuple[str, int, str]:
        return name, number, path

    def generate(self, prompts: list[Any], settings: list[Any], use_tqdm: bool, lora_request: Any) -> list[Any]:
        if self.refused is not None:
            raise self.VLLMClientError(self.refused)
        self.asked += [prompts, settings]
        self.adapter = lora_request
        words = self.encoder.tokenizer
        ids = [[*words("yes")["input_ids"], self.encoder.end_ids[0]], words("no way")["input_ids"][:5]]
        answers = [
            SimpleNamespace(token_ids=one, finish_reason=reason)
            for one, reason in zip(ids, self.finish_reasons, strict=True)
        ]
        return [
            SimpleNamespace(outputs=answers[: setting.n], prompt_token_ids=self.expanded(prompt))
            for prompt, setting in zip(prompts, settings, strict=True)
        ]

    def expanded(self, prompt: dict[str, Any]) -> list[int]:
        """The token of an image as often as the model has places for it."""
        token = self.encoder.processor.image_token_id
        return [i for one in prompt["prompt_token_ids"] for i in [one] * (16 if one == token else 1)]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    model, processor = tiny_models.build("llava")
    made = StandIn(Encoder.for_model(processor, model))
    for name in ("vllm", "vllm.exceptions", "vllm.platforms", "vllm.lora.request"):
        monkeypatch.setitem(sys.modules, name, made)
    return made


def test_vllm_is_asked_with_unexpanded_tokens_and_a_seed_for_each_record(vllm: StandIn) -> None:
    made = VllmSampler("some/model", vllm.encoder, Sampling(0.7, 0.9, 5, seed=3), {"dtype": "bfloat16"})
    answers = made.sample([ASKED, Question("b", "Why?", None)], 2, attempt=1)
    assert answers == [[Answer("yes", True), Answer("no wa", False)]] * 2
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
        "ignore_eos": True,
        "detokenize": False,
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
    monkeypatch.setitem(sys.modules, "vllm", None)
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


def test_an_old_vllm_is_refused(vllm: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.11.2", raising=False)
    with pytest.raises(ValueError, match=r"vllm 0\.11\.2 is not supported: pip install 'vllm>=0\.32'"):
        VllmSampler("some/model", vllm.encoder, Sampling())


def test_what_vllm_refuses_is_a_bad_record(vllm: StandIn) -> None:
    made = VllmSampler("some/model", vllm.encoder, Sampling())
    vllm.refused = "The decoder prompt (length 300) is longer than the maximum model length of 256."
    with pytest.raises(ValueError, match="vllm: The decoder prompt"):
        made.sample([ASKED], 1)


def test_an_answer_that_max_model_len_cuts_is_no_answer(vllm: StandIn) -> None:
    """Training would take it for one that was cut by max_new_tokens."""
    made = VllmSampler("some/model", vllm.encoder, Sampling(max_new_tokens=6))
    with pytest.raises(ValueError, match="max_model_len: prompt and image leave room for 5 tokens"):
        made.sample([ASKED], 2)
    vllm.finish_reasons = ["stop", "abort"]
    with pytest.raises(RuntimeError, match="record 'a': finish_reason 'abort'"):
        made.sample([ASKED], 2)


def test_other_tokens_than_in_training_are_said_once(vllm: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    made = VllmSampler("some/model", vllm.encoder, Sampling(max_new_tokens=5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.sample([ASKED], 2)
    made = VllmSampler("some/model", vllm.encoder, Sampling(max_new_tokens=5))
    monkeypatch.setattr(vllm, "expanded", lambda prompt: prompt["prompt_token_ids"])
    with pytest.warns(OtherTokens, match="tokens of record 'a' and its image, training"):
        made.sample([ASKED], 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.sample([ASKED], 2)


def test_several_greedy_answers_are_drawn_once(vllm: StandIn) -> None:
    made = VllmSampler("some/model", vllm.encoder, Sampling(temperature=0))
    assert made.sample([ASKED], 2) == [[Answer("yes", True)] * 2]
    with pytest.raises(ValueError, match=r"temperature=0\.001: vllm draws at 0\.01"):
        VllmSampler("some/model", vllm.encoder, Sampling(temperature=0.001))


def test_on_a_cpu_prompts_are_not_read_in_parts(vllm: StandIn) -> None:
    vllm.on_cpu = True
    VllmSampler("some/model", vllm.encoder, Sampling())
    assert vllm.engine["enable_chunked_prefill"] is False
    VllmSampler("some/model", vllm.encoder, Sampling(), {"enable_chunked_prefill": True})
    assert vllm.engine["enable_chunked_prefill"] is True


def test_an_adapter_goes_to_vllm_and_into_the_identity(vllm: StandIn, tmp_path: Path) -> None:
    model, _ = tiny_models.build("llava")
    names = {"rank 24": 24, "rank 600": 600}
    for name, rank in names.items():
        get_peft_model(model, language_lora(model, r=rank)).save_pretrained(tmp_path / name)
        model, _ = tiny_models.build("llava")
    folder = str(tmp_path / "rank 24")
    made = VllmSampler("some/model", vllm.encoder, Sampling(max_new_tokens=5), adapter=folder)
    assert vllm.engine["enable_lora"] is True
    assert vllm.engine["max_lora_rank"] == 32
    made.sample([ASKED], 1)
    assert vllm.adapter == ("perpo", 1, folder)
    plain = VllmSampler("some/model", vllm.encoder, Sampling(max_new_tokens=5)).identity()
    assert made.identity()["adapters"]
    assert "adapters" not in plain
    with pytest.raises(ValueError, match=r"vllm can do nothing with rank 600 .*perpo merge"):
        VllmSampler("some/model", vllm.encoder, Sampling(), adapter=str(tmp_path / "rank 600"))
    whole = get_peft_model(model, language_lora(model, r=4, train_projector=True))
    whole.save_pretrained(tmp_path / "projector")
    with pytest.raises(ValueError, match=r"vllm can do nothing with .*projector.* in the adapter"):
        VllmSampler("some/model", vllm.encoder, Sampling(), adapter=str(tmp_path / "projector"))
