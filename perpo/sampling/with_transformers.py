"""Answers of a Hugging Face model in this process: greedy for batches of questions, or k sampled from one prefill.

Greedy answers are generated for a batch of prompts padded on the left. For sampled answers the prompt without its last
token is prefilled once; each of n answers continues from a copy of the KV cache, repeated n times, and starts with the
last prompt token. All of it is `model.generate`, so positions (M-RoPE included), caches and masks are the model's own.
On the first question n = 2 forked answers are compared with plain generation; a model whose cache cannot be forked, or
whose logits then differ, is run with one prefill for each answer from then on.

The distribution is not left to `generate`: it takes the argmax of what `Draw` makes of the logits, and for the time of
the call the model's generation config is blank (`only_logits`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from perpo.encoding.batch import TOKEN_KEYS, collate_lists
from perpo.encoding.encoder import Encoder
from perpo.model.language_head import causal_lm
from perpo.sampling.sampler import Answer, Question, Sampling
from perpo.storage.fingerprints import fingerprint, tensors_fingerprint, weights_fingerprint

CHECKED_TOKENS = 3  # of the answers that forking is checked on: the fork itself and steps after it
# Allowed rms difference of logits, in units of their spread. Rounding stays below it, a wrong position does not.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.08, torch.float16: 0.08}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


class ForkingNotExact(UserWarning):
    """Image and prompt are encoded once for each answer, since sharing them would change the answers."""


class Prefix(NamedTuple):
    """An encoded question, and the KV cache after all of its tokens but the last."""

    inputs: dict[str, Tensor]  # of the whole prompt, on the model's device
    cache: Any  # of one row and P − 1 tokens; None: every answer has a prefill of its own
    rope_deltas: dict[nn.Module, Tensor]  # Qwen-VL and its kin keep them in the model rather than in the cache


class Draw(LogitsProcessor):
    """Logits [n, V] -> numbers [n, V] whose argmax is a draw from softmax(logits / temperature) cut to top_p.

    The argmax over tokens of p / e, e ~ Exp(1), is distributed as p; `torch.multinomial` draws in the same way. Random
    numbers come from the generator and no other. Without one the logits stay as they are: their argmax is greedy.
    """

    def __init__(self, sampling: Sampling, generator: torch.Generator | None, device: torch.device) -> None:
        self.generator = generator
        self.warp = LogitsProcessorList()
        if generator is not None and sampling.temperature != 1:
            self.warp.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if generator is not None and sampling.top_p < 1:
            self.warp.append(TopPLogitsWarper(float(sampling.top_p)))
        self.any_nan = torch.zeros((), dtype=torch.bool, device=device)

    def __call__(
        self,
        input_ids: Tensor,  # [n, L]
        scores: Tensor,  # [n, V] fp32
    ) -> Tensor:  # [n, V]
        if self.generator is not None:
            scores = self.warp(input_ids, scores).softmax(-1)
            scores = scores / torch.empty_like(scores).exponential_(generator=self.generator)
        self.any_nan |= scores.isnan().any()  # an argmax would hide it; read once, after generation
        return scores


class TransformersSampler:
    """Greedy (temperature 0) or sampled answers of a model; see the module.

    The model is in evaluation mode while it answers, and as it was afterwards.

    Args:
        model: with its language head, on its device; adapters are used as they are.
        encoder: of the same model.
        sampling: temperature and so on.
        answers_at_once: at most this many answers are generated together, to save memory: answers to one question when
            sampling, questions when greedy. Sampled answers depend on it. None: all that are asked for.
        share_prompt: False encodes image and prompt again for every answer.
    """

    def __init__(
        self,
        model: nn.Module,
        encoder: Encoder,
        sampling: Sampling,
        *,
        answers_at_once: int | None = None,
        share_prompt: bool = True,
    ) -> None:
        if answers_at_once is not None and answers_at_once < 1:
            raise ValueError(f"answers_at_once must be ≥ 1, got {answers_at_once}")
        self.model: Any = model
        self.encoder = encoder
        self.sampling = sampling
        self.answers_at_once = answers_at_once
        self.forks: bool | None = None if share_prompt else False  # None: not known before the first question
        self._last: tuple[Question, Prefix] | None = None  # a further attempt at a question does not encode it again

    @property
    def batch_size(self) -> int:
        return 1 if self.sampling.temperature > 0 else self.answers_at_once or 1

    def identity(self) -> dict[str, str]:
        return {
            "engine": "transformers",
            "weights": weights_fingerprint(causal_lm(self.model)),
            "adapters": _adapters_fingerprint(self.model),
            **self.encoder.fingerprint(),
            "end tokens": str(self.encoder.end_ids),
            **self.sampling.identity(),
            **({"answers_at_once": str(self.answers_at_once)} if self.sampling.temperature > 0 else {}),
        }

    def sample(self, questions: Sequence[Question], n: int, attempt: int = 0) -> list[list[Answer]]:
        """n answers to each question; another attempt draws other answers.

        Raises:
            ValueError: a question that cannot be asked, or logits that are NaN; the message names the record.
        """
        with only_logits(self.model):
            if self.sampling.temperature == 0:
                return [[answer] * n for answer in self._greedy(questions)]
            return [self._sampled(question, n, attempt) for question in questions]

    def _greedy(self, questions: Sequence[Question]) -> list[Answer]:
        encoded = [self._encode(question) for question in questions]
        answers: dict[int, Answer] = {}
        for kind in dict.fromkeys(frozenset(inputs) for inputs in encoded):  # with an image, and without
            same = [i for i, inputs in enumerate(encoded) if set(inputs) == kind]
            for start in range(0, len(same), at_once := self.answers_at_once or len(same)):
                batch = same[start : start + at_once]
                inputs = left_padded([encoded[i] for i in batch], self.encoder.pad_id)
                names = ", ".join(repr(questions[i].id) for i in batch)
                answers |= zip(batch, self._answers(names, inputs), strict=True)
        return [answers[i] for i in range(len(questions))]

    def _sampled(self, question: Question, n: int, attempt: int) -> list[Answer]:
        prefix = self._prefix(question, attempt)
        device = prefix.inputs["input_ids"].device
        generator = torch.Generator(device).manual_seed(self.sampling.seed_of(question.id, attempt))
        answers: list[Answer] = []
        for start in range(0, n, at_once := self.answers_at_once or n):
            answers += self._answers(repr(question.id), self._fork(prefix, min(at_once, n - start)), generator)
        return answers

    # ------------------------------------------------------------------------------------------------------- details

    def _encode(self, question: Question) -> dict[str, Tensor]:
        try:
            inputs = self.encoder.prompt(question.prompt, question.image)
        except ValueError as error:
            raise ValueError(f"record {question.id!r}: {error}") from error
        return {
            name: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }

    def _answers(self, names: str, inputs: dict[str, Any], generator: torch.Generator | None = None) -> list[Answer]:
        """The answer of every row; `names` is whose rows they are."""
        draw = Draw(self.sampling, generator, inputs["input_ids"].device)
        out = self._generate(inputs, self.sampling.max_new_tokens, draw)
        if draw.any_nan:
            raise ValueError(
                f"record {names}: the model's logits are NaN or infinite; load it in bfloat16 or float32, or check its "
                "weights"
            )
        rows = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        ends = set(self.encoder.end_ids)
        return [Answer(self.encoder.decode(row), not ends.isdisjoint(row)) for row in rows]

    def _generate(self, inputs: dict[str, Any], max_new_tokens: int, draw: Draw | None = None) -> Any:
        """What `generate` returns; with logits, and greedy, where nothing is drawn."""
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(self.encoder.end_ids),
            pad_token_id=self.encoder.pad_id,
            return_dict_in_generate=True,
            output_logits=draw is None,
        )
        processors = LogitsProcessorList([] if draw is None else [draw])
        return self.model.generate(**inputs, generation_config=config, logits_processor=processors)

    def _prefix(self, question: Question, attempt: int) -> Prefix:
        if attempt and self._last is not None and self._last[0] is question:
            return self._last[1]
        self._last = None  # frees its memory first
        prefix = Prefix(self._encode(question), None, {})
        if self.forks is None:
            reason = self._why_not_forked(prefix)
            self.forks = reason is None
            if reason is not None:
                warnings.warn(
                    f"{type(self.model).__name__}: {reason}. Image and prompt are encoded once for every answer, "
                    f"instead of once for all of them: k answers to a prompt of {prefix.inputs['input_ids'].shape[1]} "
                    "tokens cost k times its prefill and k times the vision tower",
                    ForkingNotExact,
                    stacklevel=2,
                )
        if self.forks:
            prefix = self._filled(prefix)
        self._last = question, prefix
        return prefix

    def _filled(self, prefix: Prefix) -> Prefix:
        """The prefix with its cache: `generate` takes in all tokens but the last, and its answer is dropped."""
        n_prompt = prefix.inputs["input_ids"].shape[1]
        shorter = {
            name: value[:, :-1] if value.dim() == 2 and value.shape == (1, n_prompt) else value
            for name, value in prefix.inputs.items()
        }
        out = self._generate(shorter, 1)
        deltas = {m: d for m in self.model.modules() if isinstance(d := vars(m).get("rope_deltas"), Tensor)}
        return prefix._replace(cache=out.past_key_values, rope_deltas=deltas)

    def _fork(self, prefix: Prefix, n: int) -> dict[str, Any]:
        """Keywords of `generate` for n answers to one question."""
        if prefix.cache is None:
            # Not num_return_sequences: it interleaves the tiles of an image that has several (InternVL).
            return {name: value.repeat(n, *[1] * (value.dim() - 1)) for name, value in prefix.inputs.items()}
        cache = copy.deepcopy(prefix.cache)  # generation writes into it
        cache.batch_repeat_interleave(n)
        for module, deltas in prefix.rope_deltas.items():
            module.rope_deltas = deltas
        tokens = {name: prefix.inputs[name].repeat(n, 1) for name in ("input_ids", "attention_mask")}
        return {**tokens, "past_key_values": cache}

    def _why_not_forked(self, plain: Prefix) -> str | None:
        """None where forked answers are those of plain generation; otherwise what goes wrong."""
        n_prompt = plain.inputs["input_ids"].shape[1]
        if n_prompt < 2:
            return "a prompt of a single token leaves nothing to share"
        expected = self._generate(self._fork(plain, 1), CHECKED_TOKENS)
        try:
            forked = self._generate(self._fork(self._filled(plain), 2), CHECKED_TOKENS)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, NotImplementedError, TypeError, ValueError, LookupError, RuntimeError) as error:
            return f"its KV cache cannot be repeated for several answers ({type(error).__name__}: {error})"
        for step, (want, got) in enumerate(zip(expected.logits, forked.logits, strict=False)):
            difference = (got.float() - want.float()).square().mean(dim=-1).sqrt().max() / want.float().std()
            if not difference <= TOLERANCE.get(self.model.dtype, 0.08):  # NaN compares false
                return f"answers that share their prompt have other logits than plain ones (by {difference:.1e})"
            if (forked.sequences[:, n_prompt + step] != expected.sequences[:, n_prompt + step]).any():
                break  # a tie, broken by rounding: what follows is no longer comparable
        return None


@contextmanager
def only_logits(model: nn.Module) -> Iterator[None]:
    """Inside, `generate` reads nothing but token ids from generation configs, and dropout is off.

    `generate` fills every option that its caller leaves at None from `model.generation_config`. All modules are looked
    through, since PeftModel and models with a language model inside keep configs of their own.
    """
    training = [module for module in model.modules() if module.training]
    configs = {module: vars(module)["generation_config"] for module in model.modules() if _has_config(module)}
    try:
        model.eval()
        for module, config in configs.items():
            module.generation_config = GenerationConfig(**{name: getattr(config, name, None) for name in TOKEN_IDS})
        yield
    finally:
        for module, config in configs.items():
            module.generation_config = config
        for module in training:
            module.training = True


def _has_config(module: nn.Module) -> bool:
    return isinstance(vars(module).get("generation_config"), GenerationConfig)


def left_padded(prompts: Sequence[dict[str, Tensor]], pad_id: int) -> dict[str, Tensor]:
    """Encoded prompts, each a batch of one, as one batch whose rows all end with their last token."""
    prompts = [{"attention_mask": torch.ones_like(prompt["input_ids"]), **prompt} for prompt in prompts]
    inputs = collate_lists(prompts, [[[]]] * len(prompts), pad_id).inputs  # padded on the right
    width = inputs["input_ids"].shape[1]
    for key in TOKEN_KEYS.keys() & inputs.keys():
        for row, prompt in zip(inputs[key], prompts, strict=True):
            row.copy_(row.roll(width - prompt["input_ids"].shape[1]))
    return inputs


def _adapters_fingerprint(model: nn.Module) -> str:
    """Of the adapters and how they are used, which `weights_fingerprint` leaves out: no reference needs them."""
    weights = [(name, p) for name, p in model.named_parameters() if "lora_" in name or "modules_to_save." in name]
    used = [
        (
            name,
            "none" if module.disable_adapters else module.active_adapters,
            module.merged_adapters,
            getattr(module, "scaling", None),
        )
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]
    return fingerprint([tensors_fingerprint(weights), used]) if weights else "none"
