"""Answers from vLLM, for scale: it batches over questions and shares prompts by itself.

Several engines side by side are several processes, each with its own CUDA_VISIBLE_DEVICES, RANK and WORLD_SIZE.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from packaging.version import Version
from safetensors import safe_open

from perpo.encoding.encoder import Encoder
from perpo.sampling.sampler import Answer, Question, Sampling
from perpo.storage.fingerprints import fingerprint, model_fingerprints

# Arguments of `vllm.LLM` that change time or memory alone. Answers may depend on all others, and so does the identity.
ONLY_SPEED = {
    *("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "distributed_executor_backend"),
    *("gpu_memory_utilization", "swap_space", "cpu_offload_gb", "mm_processor_cache_gb", "limit_mm_per_prompt"),
    *("max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching", "enable_chunked_prefill", "enforce_eager"),
    *("compilation_config", "disable_custom_all_reduce", "max_parallel_loading_workers", "download_dir"),
    *("disable_log_stats", "trust_remote_code"),
}
# Arguments that put something between logits and answers, and their one value that does not.
PLAIN = {"generation_config": "vllm", "override_generation_config": None, "logits_processors": None}
# The oldest that is tested; those before it ask for other releases of transformers than perpo does.
OLDEST = "0.32"
LEAST_TEMPERATURE = 0.01  # of vLLM, which takes it in the place of a smaller one that is not 0
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that it makes room for
# Names of weights in a language model's layers; of an adapter's other weights vLLM uses none.
_LANGUAGE = re.compile(r"base_model\.model\.((model|language_model|text_model)\.)*layers\.\d+\..*")


class OtherTokens(UserWarning):
    """vLLM makes other tokens of a question than training does: another processor or other settings of it."""


class VllmSampler:
    """Questions in batches of 64, each with a seed of its own.

    Args:
        model_name_or_path: what vLLM loads.
        encoder: of the same model; it renders prompts and decodes answers as for training.
        sampling: temperature and so on.
        options: further arguments of `vllm.LLM`: tensor_parallel_size, max_model_len, gpu_memory_utilization, …
        adapter: a folder with a LoRA adapter of the language model, for vLLM to put on the model.

    Raises:
        ValueError: vLLM is not installed, or is too old; options that it does not know, or that change the
            distribution of answers; a temperature or an adapter that it cannot do.
    """

    batch_size = 64

    def __init__(
        self,
        model_name_or_path: str,
        encoder: Encoder,
        sampling: Sampling,
        options: Mapping[str, Any] | None = None,
        *,
        adapter: str | None = None,
    ) -> None:
        settings = {"enable_prefix_caching": True, **(options or {})}
        if other := [name for name, plain in PLAIN.items() if settings.pop(name, plain) not in (plain, None)]:
            raise ValueError(
                f"engine_options: {', '.join(other)} changes the distribution that answers are drawn from, and "
                "training takes it to be softmax(logits / temperature) cut to top_p. Leave it out; temperature, "
                "top_p and max_new_tokens are settings of their own"
            )
        if 0 < sampling.temperature < LEAST_TEMPERATURE:
            raise ValueError(
                f"temperature={sampling.temperature}: vllm draws at {LEAST_TEMPERATURE} in its place; set it to 0 or "
                f"to at least {LEAST_TEMPERATURE}"
            )
        if adapter is not None:
            settings = {"enable_lora": True, "max_lora_rank": _rank(Path(adapter)), **settings}
        self._vllm, self._refusal, on_cpu = _load()
        if on_cpu:  # there vLLM cannot undo a draw with a seed, as it has to after each part of a prompt but the last
            settings.setdefault("enable_chunked_prefill", False)
        self.encoder = encoder
        self.sampling = sampling
        if encoder.sees_images:
            settings.setdefault("limit_mm_per_prompt", {"image": 1})
        self._model = {"engine": "vllm", "model": _content(model_name_or_path)}
        if adapter is not None:
            self._model["adapters"] = _content(adapter)
        self._model |= {name: str(settings[name]) for name in sorted(settings.keys() - ONLY_SPEED) if settings[name]}
        # Its default, "auto", takes penalties, top-k and a largest number of tokens from the model's generation config.
        try:
            self._engine = self._vllm.LLM(model=model_name_or_path, generation_config="vllm", **settings)
        except (TypeError, self._refusal) as error:  # an argument that it does not know, or of the wrong kind
            raise ValueError(f"engine_options: {error}") from error
        except RuntimeError as error:
            raise ValueError(f"vllm did not start, for the reason in its log above: {error}") from error
        self._adapter = None
        if adapter is not None:
            self._adapter = importlib.import_module("vllm.lora.request").LoRARequest("perpo", 1, adapter)
        self._unchecked = {True, False}  # questions with and without an image, until the tokens of one are compared

    def identity(self) -> dict[str, str]:
        return {
            **self._model,
            **self.encoder.fingerprint(),
            "end tokens": str(self.encoder.end_ids),
            **self.sampling.identity(),
        }

    def sample(self, questions: Sequence[Question], n: int, attempt: int = 0) -> list[list[Answer]]:
        prompts = [self._prompt(question) for question in questions]
        n_drawn = n if self.sampling.temperature > 0 else 1  # vLLM refuses several greedy answers
        settings = [self._settings(n_drawn, self.sampling.seed_of(question.id, attempt)) for question in questions]
        try:
            outputs = self._engine.generate(prompts, settings, use_tqdm=False, lora_request=self._adapter)
        except self._refusal as error:  # no ValueError; a prompt beyond max_model_len, for example
            raise ValueError(f"vllm: {error}") from error
        for question, output in zip(questions, outputs, strict=True):
            self._check_tokens(question, output.prompt_token_ids)
        return [
            [self._answer(one, question.id) for one in output.outputs] * (n // n_drawn)
            for question, output in zip(questions, outputs, strict=True)
        ]

    def _answer(self, one: Any, record_id: str) -> Answer:
        """
        Raises:
            ValueError: max_model_len cut it, not max_new_tokens.
            RuntimeError: vLLM broke it off.
        """
        if one.finish_reason not in ("stop", "length"):  # "abort", "error"
            raise RuntimeError(f"vllm broke off an answer to record {record_id!r}: finish_reason {one.finish_reason!r}")
        complete = one.finish_reason == "stop"
        if not complete and len(one.token_ids) < self.sampling.max_new_tokens:
            raise ValueError(
                f"max_model_len: prompt and image leave room for {len(one.token_ids)} tokens of an answer, of "
                f"max_new_tokens={self.sampling.max_new_tokens}; raise it in engine_options, or give the image "
                "processor fewer pixels"
            )
        return Answer(self.encoder.decode(one.token_ids), complete)

    def _check_tokens(self, question: Question, ids: Sequence[int]) -> None:
        """Warn if the first question of a kind became other tokens than in training."""
        kind = question.image is not None
        if kind not in self._unchecked:
            return
        self._unchecked.remove(kind)
        expected = self.encoder.prompt(question.prompt, question.image)["input_ids"][0].tolist()
        if expected != list(ids):
            warnings.warn(
                f"vllm makes {len(ids)} tokens of record {question.id!r}{' and its image' if kind else ''}, training "
                f"{len(expected)}, or others: it asks the model in another form than it is trained in. Sample with "
                "engine=transformers, or bring vllm's processor in line (mm_processor_kwargs in engine_options)",
                OtherTokens,
                stacklevel=2,
            )

    def _prompt(self, question: Question) -> dict[str, Any]:
        """Token ids, since vLLM puts a begin-of-text token before any text; it fills in those of the image."""
        if question.image is not None:
            self.encoder.check_frame(question.image.size)
        if self.encoder.max_prompt_length is not None:
            self.encoder.prompt(question.prompt, question.image)  # raises where it is longer, image included
        text = self.encoder.render(question.prompt, question.image is not None)
        bos = self.encoder.tokenizer.bos_token
        ids = self.encoder.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]
        prompt: dict[str, Any] = {"prompt_token_ids": ids}
        if question.image is not None:
            prompt["multi_modal_data"] = {"image": question.image}
        return prompt

    def _settings(self, n: int, seed: int) -> Any:
        """All that vLLM puts between logits and tokens, with nothing left to a default."""
        return self._vllm.SamplingParams(
            n=n,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            top_k=-1,
            min_p=0.0,
            repetition_penalty=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            min_tokens=0,
            max_tokens=self.sampling.max_new_tokens,
            seed=seed,
            stop_token_ids=list(self.encoder.end_ids),
            ignore_eos=True,  # the tokenizer's, which ends an answer only if it is one of these
            detokenize=False,
        )


def _content(name_or_path: str) -> str:
    """What identifies a model: all in its folder, or its name on the hub."""
    folder = Path(name_or_path)
    return fingerprint(model_fingerprints(folder)) if folder.is_dir() else name_or_path


def _rank(adapter: Path) -> int:
    """The least rank that vLLM has to make room for.

    Raises:
        ValueError: the adapter has parts that vLLM does not take.
    """
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        other = [name for name in file.keys() if not _LANGUAGE.fullmatch(name)]  # noqa: SIM118 - no mapping
    if config.get("use_dora"):
        other = ["DoRA"]
    rank = max([config["r"], *config.get("rank_pattern", {}).values()])
    if other or rank > LORA_RANKS[-1]:
        raise ValueError(
            f"model: vllm can do nothing with {other[0] if other else f'rank {rank}'} in the adapter {adapter}; give "
            "it the merged model (perpo merge), or sample with engine=transformers"
        )
    return next(size for size in LORA_RANKS if size >= rank)


def _load() -> tuple[ModuleType, type[Exception], bool]:
    """vLLM, what it raises for a request that it cannot serve, and whether it runs on the CPU."""
    # Its engine in a process of its own outlives a kill of this one, and keeps the memory that a resumed run needs.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # it logs to stdout, where results go
    try:
        vllm = importlib.import_module("vllm")
        if Version(vllm.__version__) < Version(OLDEST):
            raise ValueError(f"vllm {vllm.__version__} is not supported: pip install 'vllm>={OLDEST}'")
        _ = vllm.LLM  # what imports most of it
        refusal = importlib.import_module("vllm.exceptions").VLLMClientError
        on_cpu = importlib.import_module("vllm.platforms").current_platform.is_cpu()
    except (ImportError, RuntimeError, OSError, AttributeError) as error:  # other than the first two: a broken install
        raise ValueError(
            f"vllm cannot be imported ({error}): pip install 'perpo[vllm]', or sample with transformers"
        ) from error
    return vllm, refusal, on_cpu
