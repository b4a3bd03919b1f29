"""Answers from a Hugging Face model in this process, its image and prompt encoded once for all answers.

The prompt but for its last token is fed once; a copy of the resulting key-value cache, repeated n times, is what n
answers go on from, each starting with the last prompt token. Both steps are `model.generate`, so positions (M-RoPE
included), caches and masks are the model's own. On the first question n = 2 forked answers are compared with plain
generation; a model that cannot be forked so, or gives other logits, is run with one prefill an answer from then on.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from perpo.encoding.encoder import Encoder
from perpo.sampling.sampler import Answer, Question, Sampling
from perpo.storage.fingerprints import weights_fingerprint

CHECKED_TOKENS = 3  # of the answers that forking is checked on: the fork itself and steps after it
# Allowed rms difference of logits, in units of their spread. Rounding stays below it, a wrong position does not.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.08, torch.float16: 0.08}


class ForkingNotExact(UserWarning):
    """Image and prompt are encoded once an answer, since sharing them would change the answers."""


class Prefix(NamedTuple):
    """An encoded question, and the cache after all of its tokens but the last."""

    inputs: dict[str, Tensor]  # of the whole prompt, on the model's device
    cache: Any  # of one row and P − 1 tokens; None: not to be forked
    rope_deltas: dict[nn.Module, Tensor]  # Qwen-VL and its kin keep them in the model rather than in the cache


class TransformersSampler:
    """See the module. The model is put into eval mode.

    Args:
        model: with its language head, on its device; adapters are used as they are.
        encoder: its processor.
        sampling: temperature and so on.
        answers_at_once: as many answers are generated together, to save memory; part of what the answers depend on.
            None: all.
        share_prompt: False encodes image and prompt again for every answer.
    """

    batch_size = 1

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
        self.model: Any = model.eval()
        self.encoder = encoder
        self.sampling = sampling
        self.answers_at_once = answers_at_once
        self.forks: bool | None = None if share_prompt else False  # None: not known before the first question
        self._last: tuple[Question, Prefix] | None = None  # a second attempt at a question does not encode it again

    def identity(self) -> dict[str, str]:
        return {
            "weights": weights_fingerprint(self.model),
            "adapters": _adapters_fingerprint(self.model),
            **self.encoder.fingerprint(),
            **self.sampling.identity(),
            "answers_at_once": str(self.answers_at_once),
        }

    def sample(self, questions: Sequence[Question], n: int, attempt: int = 0) -> list[list[Answer]]:
        return [self._answers(question, n, attempt) for question in questions]

    def _answers(self, question: Question, n: int, attempt: int) -> list[Answer]:
        prefix = self._prefix(question)
        if self.sampling.temperature == 0:  # all answers are the same
            ids = self._generate(prefix, 1, **self._options).sequences
            return [self._answer(ids[0, prefix.inputs["input_ids"].shape[1] :].tolist())] * n
        at_once = self.answers_at_once or n
        answers: list[Answer] = []
        with _random_numbers(self.sampling.seed_of(question.id, attempt), self.model.device):
            for start in range(0, n, at_once):
                ids = self._generate(prefix, min(at_once, n - start), **self._options).sequences
                answers += map(self._answer, ids[:, prefix.inputs["input_ids"].shape[1] :].tolist())
        return answers

    def _answer(self, ids: list[int]) -> Answer:
        return Answer(self.encoder.decode(ids), any(token in self.encoder.end_ids for token in ids))

    @property
    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"max_new_tokens": self.sampling.max_new_tokens}
        if self.sampling.temperature > 0:
            options |= {"do_sample": True, "temperature": self.sampling.temperature, "top_p": self.sampling.top_p}
        return options

    # ------------------------------------------------------------------------------------------------------- details

    def _prefix(self, question: Question) -> Prefix:
        if self._last is not None and self._last[0] is question:
            return self._last[1]
        self._last = None  # frees its memory first
        inputs = {
            name: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in self.encoder.prompt(question.prompt, question.image).items()
        }
        prefix = Prefix(inputs, None, {})
        if self.forks is None:
            reason = self._why_not_forked(prefix)
            self.forks = reason is None
            if reason is not None:
                warnings.warn(
                    f"{type(self.model).__name__}: {reason}. Image and prompt are encoded once for every answer, "
                    f"instead of once for all of them: k answers to a prompt of {inputs['input_ids'].shape[1]} tokens "
                    "cost k times its prefill and k times the vision tower",
                    ForkingNotExact,
                    stacklevel=2,
                )
        if self.forks:
            prefix = self._filled(prefix)
        self._last = question, prefix
        return prefix

    def _filled(self, prefix: Prefix) -> Prefix:
        """The prefix with its cache: `generate` takes in all tokens but the last, and what it then says is dropped."""
        n_prompt = prefix.inputs["input_ids"].shape[1]
        shorter = {
            name: value[:, :-1] if value.dim() == 2 and value.shape == (1, n_prompt) else value
            for name, value in prefix.inputs.items()
        }
        out = self.model.generate(**shorter, generation_config=self._config(max_new_tokens=1))
        deltas = {m: d for m in self.model.modules() if isinstance(d := vars(m).get("rope_deltas"), Tensor)}
        return prefix._replace(cache=out.past_key_values, rope_deltas=deltas)

    def _generate(self, prefix: Prefix, n: int, **options: Any) -> Any:
        if prefix.cache is None:
            # Not num_return_sequences: it interleaves the tiles of an image that has several (InternVL).
            rows = {name: value.repeat(n, *[1] * (value.dim() - 1)) for name, value in prefix.inputs.items()}
            return self.model.generate(**rows, generation_config=self._config(**options))
        cache = copy.deepcopy(prefix.cache)  # generation writes into it
        cache.batch_repeat_interleave(n)
        for module, deltas in prefix.rope_deltas.items():
            module.rope_deltas = deltas
        tokens = {name: prefix.inputs[name].repeat(n, 1) for name in ("input_ids", "attention_mask")}
        return self.model.generate(**tokens, past_key_values=cache, generation_config=self._config(**options))

    def _config(self, **options: Any) -> GenerationConfig:
        """What is None in it, `generate` takes from the model; so nothing that would bend the distribution is."""
        neutral: dict[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
        neutral |= {"do_sample": False, "min_length": 0}
        if options.get("do_sample"):
            neutral |= {"top_k": 0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
        for name in ("min_p", "min_new_tokens"):  # a value, even a neutral one, costs time or warns
            if getattr(self.model.generation_config, name, None) is not None:
                neutral[name] = 0
        return GenerationConfig(
            **(neutral | options),
            eos_token_id=list(self.encoder.end_ids),
            pad_token_id=self.encoder.pad_id,
            use_cache=True,
            return_dict_in_generate=True,
        )

    def _why_not_forked(self, plain: Prefix) -> str | None:
        """None where forked answers are those of plain generation; otherwise what goes wrong."""
        options = {"max_new_tokens": CHECKED_TOKENS, "output_logits": True}
        if plain.inputs["input_ids"].shape[1] < 2:
            return "a prompt of a single token leaves nothing to share"
        expected = self._generate(plain, 1, **options)
        try:
            forked = self._generate(self._filled(plain), 2, **options)
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, NotImplementedError, TypeError, ValueError, LookupError, RuntimeError) as error:
            return f"its key-value cache cannot be repeated for several answers ({type(error).__name__}: {error})"
        n_prompt = plain.inputs["input_ids"].shape[1]
        for step, (want, got) in enumerate(zip(expected.logits, forked.logits, strict=False)):
            difference = (got.float() - want.float()).square().mean(dim=-1).sqrt().max() / want.float().std()
            if not difference <= TOLERANCE.get(self.model.dtype, 0.08):  # NaN compares false
                return f"answers that share their prompt have other logits than plain ones (by {difference:.1e})"
            if (forked.sequences[:, n_prompt + step] != expected.sequences[:, n_prompt + step]).any():
                break  # a tie, broken by rounding: what follows is no longer comparable
        return None


def _adapters_fingerprint(model: nn.Module) -> str:
    """Hash of what `weights_fingerprint` leaves out, since to a reference it does not matter."""
    digest = hashlib.sha256()
    names = [name for name, _ in model.named_parameters() if "lora_" in name or "modules_to_save." in name]
    for name in names:
        digest.update(name.encode() + model.get_parameter(name).detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16] if names else "none"


@contextmanager
def _random_numbers(seed: int, device: torch.device) -> Iterator[None]:
    """torch's random numbers from this seed inside the block, and as before behind it."""
    devices = [device] if device.type != "cpu" else []
    kind = device.type if devices else "cuda"
    with torch.random.fork_rng(devices=devices, device_type=kind):
        torch.manual_seed(seed)
        yield
