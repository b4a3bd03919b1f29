"""What does it save to encode image and prompt once for k sampled answers?

Hypothesis. Sampling k answers costs one prefill and R steps of k rows instead of k prefills and the same steps; the
longer the prompt and the shorter the answers, the nearer to k.

Floor. `extra.ideal_ratio`: k (P + R) / (P + kR), as if a decoded token cost what a prefilled one does. It costs more
(a step reads the weights and k caches for k tokens, and each has Python and launches), so the ratio is not reached
where answers are long. `one prefill` is that part alone.

Shapes. `benchmarks.problems.PREFIXES`, on the CPU without `--full` the first and a small page; on a GPU answers of 128
tokens at most, since every token costs each case the same step. A LLaVA and a Qwen2.5-VL of `benchmarks.small_models`;
random weights, all answers R tokens (the end token is never sampled in practice: 1 in V a token).
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import small_models
from benchmarks.harness import OURS, Case
from benchmarks.problems import Prefix, Setting
from perpo.sampling.sampler import Question, Sampling
from perpo.sampling.with_transformers import TransformersSampler


class FixedEncoder:
    """In place of a processor: one prompt whatever is asked."""

    end_ids = (0,)
    pad_id = 0

    def __init__(self, prompt: dict[str, Tensor]) -> None:
        self.encoded = prompt

    def prompt(self, prompt: object, image: object = None) -> dict[str, Tensor]:
        return self.encoded

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_generation(benchmark: Any, compare: Any, setting: Setting, prefix: Prefix, family: str) -> None:
    if not small_models.measured(family, setting, prefix):
        pytest.skip("two prompts are measured for this family")
    if setting.size == "gpu":
        prefix = prefix._replace(n_response=min(128, prefix.n_response))
    model, prompt = small_models.build(family, setting.size, prefix.n_prompt, setting.device, setting.dtype)

    def sampler(share_prompt: bool, n_tokens: int) -> Any:
        sampling = Sampling(max_new_tokens=n_tokens)
        # For the type checker: renders and encodes, which is all that is asked of it.
        return TransformersSampler(model, FixedEncoder(prompt), sampling, share_prompt=share_prompt)  # type: ignore[arg-type]

    def case(name: str, share_prompt: bool, k: int, n_tokens: int, **extra: Any) -> Case:
        made = sampler(share_prompt, n_tokens)

        def run() -> object:  # a new question each time: the same one again would not be encoded again
            with torch.no_grad():
                return made.sample([Question("a", "", None)], k)

        return Case(name, run, extra=extra)

    shared = case(OURS, True, prefix.k, prefix.n_response, answer_tokens=prefix.k * prefix.n_response)
    cases = [
        shared,
        case(
            "a prefill for each answer",
            False,
            prefix.k,
            prefix.n_response,
            answer_tokens=prefix.k * prefix.n_response,
            ideal_ratio=round(prefix.ideal, 2),
        ),
        case("one prefill", False, 1, 1, note="and one token"),
    ]
    shape = small_models.SHAPES[setting.size]
    shapes = {**prefix._asdict(), "model": family, "V": shape.n_vocab, "H": shape.hidden, "layers": shape.layers}
    compare("generation", f"{family} {prefix}", cases, shapes, long=True, by_host=True)
