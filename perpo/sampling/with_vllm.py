"""Answers from vLLM, for scale: it batches over questions and shares prompts by itself.

Several engines side by side are several processes, each with its own CUDA_VISIBLE_DEVICES, RANK and WORLD_SIZE.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from perpo.encoding.encoder import Encoder
from perpo.sampling.sampler import Answer, Question, Sampling

MATTERING = ("revision", "dtype", "quantization", "mm_processor_kwargs", "hf_overrides")  # to what the answers are


class VllmSampler:
    """Questions in batches of 64, each with a seed of its own.

    Args:
        model_name_or_path: what vLLM loads.
        encoder: of the same model; it renders prompts and decodes answers as for training.
        sampling: temperature and so on.
        options: further arguments of `vllm.LLM`: tensor_parallel_size, max_model_len, gpu_memory_utilization, …

    Raises:
        ValueError: vLLM is not installed.
    """

    batch_size = 64

    def __init__(
        self,
        model_name_or_path: str,
        encoder: Encoder,
        sampling: Sampling,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            self._vllm = importlib.import_module("vllm")
        except ImportError as error:
            raise ValueError(
                f"vllm cannot be imported ({error}): pip install 'perpo[vllm]', or sample with transformers"
            ) from error
        self.encoder = encoder
        self.sampling = sampling
        settings = {"enable_prefix_caching": True, **(options or {})}
        if encoder.sees_images:
            settings.setdefault("limit_mm_per_prompt", {"image": 1})
        self._model = {"model": model_name_or_path}
        self._model |= {name: str(settings[name]) for name in MATTERING if settings.get(name)}
        self._engine = self._vllm.LLM(model=model_name_or_path, **settings)

    def identity(self) -> dict[str, str]:
        return {**self._model, **self.encoder.fingerprint(), **self.sampling.identity()}

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
        text = self.encoder.render(question.prompt, question.image is not None)
        bos = self.encoder.tokenizer.bos_token
        ids = self.encoder.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]
        prompt: dict[str, Any] = {"prompt_token_ids": ids}
        if question.image is not None:
            prompt["multi_modal_data"] = {"image": question.image}
        return prompt

    def _settings(self, n: int, seed: int) -> Any:
        return self._vllm.SamplingParams(
            n=n,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            max_tokens=self.sampling.max_new_tokens,
            seed=seed,
            stop_token_ids=list(self.encoder.end_ids),
        )
