"""`perpo generate`: from images with ground truth to lists of scored answers.

perpo generate --model Qwen/Qwen2.5-VL-7B-Instruct --records boxes.jsonl --output lists.jsonl \\
    --task grounding --answer-format qwen2.5-vl

Run again after a kill, the same command goes on. Several processes share the records by RANK and WORLD_SIZE, as
torchrun sets them; each takes the GPU of its LOCAL_RANK.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, GenerationConfig

from perpo.cli.rewarding import RewardSettings
from perpo.cli.settings import ModelConfig
from perpo.data.documents import mapping
from perpo.data.read import ReadSettings, usable_records
from perpo.encoding.encoder import Encoder
from perpo.encoding.prompt_check import PromptCheck
from perpo.model.adapters import base_of
from perpo.rewards.formats import box_format
from perpo.rewards.scoring import bad_truths
from perpo.sampling.candidates import CandidateConfig, Outcome, generate
from perpo.sampling.sampler import Sampler, Sampling
from perpo.sampling.server import ServerSettings
from perpo.sampling.with_openai import OpenAISampler
from perpo.sampling.with_transformers import TransformersSampler
from perpo.sampling.with_vllm import VllmSampler
from perpo.storage.checksums import check_weights


@dataclass
class GenerateConfig(RewardSettings, ReadSettings, ServerSettings):
    """Which records, how answers to them are drawn and scored, and where they go."""

    records: str = field(
        metadata={
            "help": "Images, prompts and true answers: .jsonl, .json or .parquet, or of the hub: hf://owner/name:split."
        }
    )
    output: str = field(
        metadata={"help": "Lists for `perpo train`: .jsonl or .parquet. Finished records are kept in OUTPUT.parts."}
    )
    k: int = field(default=20, metadata={"help": "Answers to a record."})
    max_samples: int | None = field(
        default=None,
        metadata={"help": "Answers drawn at most in search of k different ones; then repeats are kept. Default: 2 k."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Of the distribution that answers are drawn from."})
    top_p: float = field(default=1.0, metadata={"help": "Draw from the likeliest tokens with this probability."})
    max_new_tokens: int = field(default=128, metadata={"help": "An answer is cut after so many tokens."})
    seed: int = field(default=0, metadata={"help": "The same seed draws the same answers for the same record."})
    image_root: str | None = field(
        default=None, metadata={"help": "Folder that image paths are under; default: any path is allowed."}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "A prompt with more tokens, image included, makes a bad record."}
    )
    answers_at_once: int | None = field(
        default=None, metadata={"help": "Answers to a record generated together; fewer take less memory. Default: all."}
    )
    engine: str = field(
        default="transformers",
        metadata={
            "help": "What runs the model; openai: a server at base_url (vllm serve, SGLang, …).",
            "choices": ["transformers", "vllm", "openai"],
        },
    )
    engine_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Arguments of vllm.LLM, as JSON or YAML mapping: {"tensor_parallel_size": 2}; for openai, further '
            "fields of each request."
        },
    )
    sampling: Sampling = field(init=False)
    candidates: CandidateConfig = field(init=False)

    def __post_init__(self) -> None:
        self.engine_options = mapping("engine_options", self.engine_options)
        if self.engine_options and self.engine == "transformers":
            raise ValueError(
                "engine_options are arguments of vllm.LLM, or fields of a server's requests: set engine='vllm' or "
                "'openai', or leave them out"
            )
        if self.answers_at_once is not None and self.engine != "transformers":
            raise ValueError("answers_at_once is for engine='transformers'; others see to their memory by themselves")
        self._check_engine()
        if self.answer_format is not None:
            box_format(self.answer_format)
        if self.temperature == 0 and self.k > 1:
            raise ValueError(f"temperature=0 gives the same answer {self.k} times: set it above 0, or k=1")
        self.sampling = Sampling(self.temperature, self.top_p, self.max_new_tokens, self.seed)
        self.candidates = CandidateConfig(
            self.k, self.max_samples, self.named(self.reward), self.skip_bad, self.image_root
        )

    def _check_engine(self) -> None:
        if self.engine == "openai":
            self.check_server()
            return
        plain = ServerSettings()
        given = [one.name for one in fields(ServerSettings) if getattr(self, one.name) != getattr(plain, one.name)]
        if given:
            raise ValueError(f"{', '.join(given)}: only for a server: set engine='openai' too, or leave it out")


SETTINGS = (ModelConfig, GenerateConfig)
OUT_OF_MEMORY = "set answers_at_once to fewer answers\n"


def run(model_config: ModelConfig, config: GenerateConfig) -> None:
    """Read, sample, score, write, and say what came of it."""
    outcome = sample_lists(model_config, config)
    print(outcome.totals.summary())
    if outcome.n_missing:
        print(f"{outcome.n_missing} records are still with other processes; the last of them writes {config.output}")
    else:
        print(f"written to {config.output}")


def sample_lists(model_config: ModelConfig, config: GenerateConfig) -> Outcome:
    """Read, sample, score, write."""
    rank, world_size = _number("RANK", 0), _number("WORLD_SIZE", 1)
    if not Path(config.output).parent.is_dir():
        raise ValueError(f"output: there is no folder {str(Path(config.output).parent)!r}")

    @cache
    def processor() -> Any:
        return model_config.load_processor(model_config.model_name_or_path, model_config.model_revision)

    records, _ = usable_records(
        config.records,
        config,
        require=("answer",),
        root=config.image_root,
        prepare=config.with_task,
        bad_truths=partial(bad_truths, reward=config.candidates.reward),
        checks=lambda: [PromptCheck(processor(), config.max_prompt_length)],
        show=rank == 0,
    )
    sampler = _sampler(model_config, config, processor())
    return generate(records, sampler, config.output, config.candidates, rank=rank, world_size=world_size)


def _sampler(model_config: ModelConfig, config: GenerateConfig, processor: Any) -> Sampler:
    if config.engine == "vllm":
        return _vllm_sampler(model_config, config, processor)
    name, revision, length = model_config.model_name_or_path, model_config.model_revision, config.max_prompt_length
    if config.engine == "openai":
        encoder = Encoder(processor, _Unloaded.find(model_config).end_ids, max_prompt_length=length)
        return OpenAISampler(name, encoder, config.sampling, config, mapping("engine_options", config.engine_options))
    model = model_config.load_model(name, revision)
    encoder = Encoder.for_model(processor, model, max_prompt_length=length)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", _number("LOCAL_RANK", 0))
        torch.cuda.set_device(device)  # or every process takes memory on the first GPU too
    return TransformersSampler(model.to(device), encoder, config.sampling, answers_at_once=config.answers_at_once)


def _vllm_sampler(model_config: ModelConfig, config: GenerateConfig, processor: Any) -> Sampler:
    model = _Unloaded.find(model_config)
    for one in filter(None, (model.name, model.adapter)):
        check_weights(one)
    dtype = model_config.dtype
    if dtype == "auto" and model.config.dtype == torch.float32:
        dtype = "float32"  # as it was saved: vLLM's "auto" rounds such a model to 16 bits
    settings = {"dtype": dtype, "trust_remote_code": model_config.trust_remote_code, "revision": model.revision}
    if model_config.processor_options:
        settings["mm_processor_kwargs"] = model_config.processor_options
    settings |= mapping("engine_options", config.engine_options)
    encoder = Encoder(processor, model.end_ids, max_prompt_length=config.max_prompt_length)
    return VllmSampler(model.name, encoder, config.sampling, settings, adapter=model.adapter)


class _Unloaded(NamedTuple):
    """What `load_model` and `Encoder.for_model` read off a model, without loading it."""

    name: str  # of the base model, if there is an adapter
    revision: str | None
    adapter: str | None  # its folder
    config: Any
    end_ids: list[int]

    @classmethod
    def find(cls, model_config: ModelConfig) -> Self:
        name, revision, adapter = model_config.model_name_or_path, model_config.model_revision, None
        if found := base_of(name, revision):
            adapter = name if Path(name).is_dir() else snapshot_download(name, revision=revision)
            name, revision = found
        where = {} if revision is None else {"revision": revision}
        config = AutoConfig.from_pretrained(name, trust_remote_code=model_config.trust_remote_code, **where)
        try:
            generation = GenerationConfig.from_pretrained(name, **where)
        except OSError:  # it has none
            generation = GenerationConfig.from_model_config(config)
        eos = generation.eos_token_id
        return cls(name, revision, adapter, config, [] if eos is None else [eos] if isinstance(eos, int) else list(eos))


def _number(variable: str, default: int) -> int:
    value = os.environ.get(variable, "")
    if value and not value.isdecimal():
        raise ValueError(f"the environment's {variable} must be a number, got {value!r}")
    return int(value) if value else default
