"""Answers from vLLM, for scale: it batches over questions and shares prompts by itself.

Several engines side by side are several processes, each with its own CUDA_VISIBLE_DEVICES, RANK and WORLD_SIZE.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


class VllmSampler:
    """Questions in batches of 64, each with a seed of its own.

    Args:
        model_name_or_path: what vLLM loads.
        encoder: of the same model; it renders prompts and decodes answers as for training.
        sampling: temperature and so on.
        options: further arguments of `vllm.LLM`: tensor_parallel_size, max_model_len, gpu_memory_utilization, …

    Raises:
        ValueError: vLLM is not installed; options that change the distribution of answers.
    """

    batch_size = 64

    def __init__(
        self,
        model_name_or_path: str,
        encoder: Encoder,
        sampling: Sampling,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        settings = {"enable_prefix_caching": True, **(options or {})}
        if other := [name for name, plain in PLAIN.items() if settings.pop(name, plain) not in (plain, None)]:
            raise ValueError(
                f"engine_options: {', '.join(other)} changes the distribution that answers are drawn from, and "
                "training takes it to be softmax(logits / temperature) cut to top_p. Leave it out; temperature, "
                "top_p and max_new_tokens are settings of their own"
            )
        try:
            self._vllm = importlib.import_module("vllm")
        except ImportError as error:
            raise ValueError(
                f"vllm cannot be imported ({error}): pip install 'perpo[vllm]', or sample with transformers"
            ) from error
        self.encoder = encoder
        self.sampling = sampling
        if encoder.sees_images:
            settings.setdefault("limit_mm_per_prompt", {"image": 1})
        folder = Path(model_name_or_path)
        content = fingerprint(model_fingerprints(folder)) if folder.is_dir() else model_name_or_path
        self._model = {"engine": "vllm", "model": content}
        self._model |= {name: str(settings[name]) for name in sorted(settings.keys() - ONLY_SPEED) if settings[name]}
        # Its default, "auto", takes penalties, top-k and a largest number of tokens from the model's generation config.
        self._engine = self._vllm.LLM(model=model_name_or_path, generation_config="vllm", **settings)

    def identity(self) -> dict[str, str]:
        return {
            **self._model,
            **self.encoder.fingerprint(),
            "end tokens": str(self.encoder.end_ids),
            **self.sampling.identity(),
        }

    def sample(self, questions: Sequence[Question], n: int, attempt: int = 0) -> list[list[Answer]]:
        prompts = [self._prompt(question) for question in questions]
        settings = [self._settings(n, self.sampling.seed_of(question.id, attempt)) for question in questions]
        outputs = self._engine.generate(prompts, settings, use_tqdm=False)
        return [
            [Answer(self.encoder.decode(one.token_ids), one.finish_reason != "length") for one in output.outputs]
            for output in outputs
        ]

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
        )
