"""`ListGRPOTrainer` on the real `trl.GRPOTrainer`: lists stay whole, and its losses are those of plain float64."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import HfArgumentParser
from trl import GRPOConfig

from perpo.integrations import trl_versions
from perpo.integrations.trl_grpo import ListGRPOTrainer, check_lists, right_padded, shuffle_lists
from perpo.integrations.trl_grpo_config import OF_ITS_LOSS, ListGRPOConfig
from perpo_kernels import objectives, reference
from perpo_kernels.problem import ListProblem

from .. import tiny_models

pytestmark = pytest.mark.filterwarnings("ignore:.* rows have no label")
WORDS = ("Where?", "What is it, then?", "How many are there?", "Read.", "Why?", "Which one?", "Who?", "And this?")


def score(completions: list[Any], **columns: Any) -> list[float | None]:
    """Anything that depends on the whole text."""
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [sum(text.encode()) % 101 / 100 for text in texts]


def config(folder: Path, **options: Any) -> ListGRPOConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 6,
        "num_generations": 3,
        "max_completion_length": 6,
        "max_steps": 2,
        "seed": 3,
    }
    return ListGRPOConfig(**(defaults | options))


class Watched(ListGRPOTrainer):
    """Keeps what each forward pass is given, the weights that it is done with, and the loss."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        weights = copy.deepcopy(self.accelerator.unwrap_model(model).state_dict())
        loss = super()._compute_loss(model, inputs)
        self.seen.append((dict(inputs), weights, loss.detach()))
        return loss


def trainer(folder: Path, family: str = "qwen2", rewards: Any = score, **options: Any) -> Watched:
    model, processor = tiny_models.build(family)
    peft_config = options.pop("peft_config", None)
    rows = [{"prompt": [{"role": "user", "content": word}]} for word in WORDS]
    if family != "qwen2":
        processor.tokenizer.padding_side = options.pop("padding_side", "left")
        rows = [row | {"image": tiny_models.picture(seed=i)} for i, row in enumerate(rows)]
        model.generation_config.suppress_tokens = list(range(256, len(processor.tokenizer)))  # it says places of images
    made = Watched(
        model,
        reward_funcs=rewards,
        args=config(folder, **options),
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor,
        peft_config=peft_config,
    )
    made.seen = []
    return made


def with_weights(runner: Watched, weights: dict[str, Tensor]) -> Any:
    """The trainer's model itself, in float64: TRL has put a forward pass on it that a copy would share."""
    model = runner.accelerator.unwrap_model(runner.model).double().eval()
    model.load_state_dict(weights)
    return model


def plain_log_probs(model: Any, inputs: dict[str, Any]) -> Tensor:  # [B]
    """Of TRL's batch as it is, padded on the left, from the logits."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    pictures = {
        name: inputs[name].double() if inputs[name].is_floating_point() else inputs[name]
        for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids")
        if name in inputs
    }
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **pictures).logits.double()
    n = inputs["completion_ids"].shape[1]
    of_tokens = logits[:, -n - 1 : -1].log_softmax(-1).gather(2, inputs["completion_ids"][..., None])[..., 0]
    return (of_tokens * inputs["completion_mask"]).sum(1)


def plain_loss(runner: Watched, k: int, inputs: dict[str, Any], log_probs: Tensor, against: Tensor | None) -> Tensor:
    lists = torch.arange(0, len(log_probs) + 1, k, dtype=torch.int32)
    lengths = inputs["completion_mask"].sum(1).double() if runner.objective.length_normalized else None
    problem = ListProblem(
        inputs["rewards"].double(), lists, ref_log_probs=against, lengths=lengths, objective=runner.objective
    )
    return reference.list_losses(log_probs, problem).mean() / runner.args.gradient_accumulation_steps


def plain_losses(runner: Watched, k: int, ref: Any = None) -> list[float]:
    """Of each forward pass, from its own answers; `ref`: inputs -> reference log-probs, None: those of the weights."""
    losses = []
    for inputs, weights, _ in runner.seen:
        with torch.no_grad():
            log_probs = plain_log_probs(with_weights(runner, weights), inputs)
            against = log_probs if ref is None else ref(inputs)
        losses.append(float(plain_loss(runner, k, inputs, log_probs, against)))
    return losses


def assert_whole_lists(runner: Watched, k: int) -> None:
    for inputs, _, _ in runner.seen:
        check_lists(inputs["prompt_ids"], k)
        texts = runner.processing_class.batch_decode(inputs["completion_ids"], skip_special_tokens=True)
        assert inputs["rewards"].tolist() == pytest.approx(score(texts))


# ------------------------------------------------------------------------------------------------------------ the lists


@pytest.mark.parametrize(
    ("options", "n_passes"),
    [
        ({}, 2),
        ({"gradient_accumulation_steps": 2}, 4),
        ({"steps_per_generation": 3, "max_steps": 3}, 3),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 4}, 4),
    ],
)
def test_lists_stay_whole(options: dict[str, Any], n_passes: int, tmp_path: Path) -> None:
    runner = trainer(tmp_path, **options)
    runner.train()
    assert len(runner.seen) == n_passes
    assert_whole_lists(runner, 3)
    assert len({tuple(inputs["prompt_ids"][0].tolist()) for inputs, _, _ in runner.seen}) > 1


def test_shuffling_moves_whole_lists_and_all_that_belongs_to_them() -> None:
    torch.manual_seed(0)
    n, k = 24, 3
    batch = {"prompt_ids": torch.arange(n)[:, None] // k, "rewards": torch.arange(n), "num_images": list(range(n))}
    moved = shuffle_lists(batch | {"num_items_in_batch": torch.tensor(7), "tool_mask": None}, k)
    assert moved["rewards"].tolist() == moved["num_images"] != list(range(n))
    assert sorted(moved["num_images"]) == list(range(n))
    assert moved["rewards"].view(-1, k).diff(dim=1).eq(1).all()
    assert torch.equal(moved["prompt_ids"][:, 0], moved["rewards"] // k)
    assert (moved["num_items_in_batch"].item(), moved["tool_mask"]) == (7, None)
    check_lists(moved["prompt_ids"], k)
    with pytest.raises(ValueError, match="num_generations=4: the answers of this process are not lists of 4"):
        check_lists(moved["prompt_ids"], 4)


def test_rows_begin_with_their_prompt() -> None:
    inputs = {
        "prompt_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]),
        "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "completion_ids": torch.tensor([[1, 2], [3, 0]]),
        "completion_mask": torch.tensor([[1, 1], [1, 0]]),
        "mm_token_type_ids": torch.tensor([[0, 4, 0, 0, 0], [4, 0, 0, 0, 0]]),
    }
    rows, labels = right_padded(inputs, inputs["completion_mask"])
    assert rows["input_ids"].tolist() == [[5, 6, 1, 2], [7, 8, 9, 3]]
    assert rows["attention_mask"].tolist() == [[1, 1, 1, 1]] * 2
    assert rows["mm_token_type_ids"].tolist() == [[4, 0, 0, 0]] * 2
    assert labels.tolist() == [[-100, -100, 1, 2], [-100, -100, -100, 3]]


PROCESSES = """
import sys
from pathlib import Path
import pytest
from tests.perpo.integrations.test_trl_grpo import (
    assert_whole_lists, plain_log_probs, plain_losses, trainer, with_weights
)
runner = trainer(Path(sys.argv[1]), steps_per_generation=2, max_steps=4)
runner.train()
assert_whole_lists(runner, 3)
trained = [p.detach().clone() for p in runner.accelerator.unwrap_model(runner.model).parameters()]
losses = [float(loss) for *_, loss in runner.seen]
assert len(losses) == 4
first, second = runner.seen[0][1], runner.seen[2][1]  # the models that answered
def sampler(inputs):
    i = next(i for i, (seen, *_) in enumerate(runner.seen) if seen is inputs)
    return plain_log_probs(with_weights(runner, first if i < 2 else second), inputs)
assert losses == pytest.approx(plain_losses(runner, 3, sampler), rel=1e-4)
print("prompts", {str(inputs["prompt_ids"][0].tolist()) for inputs, _, _ in runner.seen})
print("weight", float(sum(p.double().abs().sum() for p in trained)))
"""


@pytest.mark.slow
def test_lists_stay_whole_over_two_processes(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(PROCESSES)
    command = (
        f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 {tmp_path}/run.py {tmp_path}/out"
    )
    root = Path(__file__).parents[3]
    environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command.split(), env=environment, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("prompts") == 2
    assert len(set(re.findall(r"^weight .*$", done.stdout, re.MULTILINE))) == 1  # the ranks end with one model


# ------------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("objective", ["perpo", "sdpo", "lipo", "ipo"])
def test_the_loss_is_that_of_plain_floats_on_its_own_answers(objective: str, tmp_path: Path) -> None:
    """No reference model: scores are 0 where the model has not moved since it answered."""
    runner = trainer(tmp_path, objective=objective, gradient_accumulation_steps=2)
    runner.train()
    expected = [float(value) for *_, value in runner.seen]
    assert plain_losses(runner, 3) == pytest.approx(expected, rel=1e-5)
    assert all(value > 0 for value in expected)
    log = runner.state.log_history[0]
    assert log["loss"] == pytest.approx(sum(expected[:2]), rel=1e-4)
    assert {"rewards/margins", "lists/active", "reward", "rewards/score/mean", "completions/mean_length"} <= log.keys()


def test_the_gradient_is_that_of_plain_floats(tmp_path: Path) -> None:
    """Against itself the loss is a constant; what it teaches is in the gradient."""
    runner = trainer(tmp_path, max_steps=1)
    runner.train()
    ((inputs, weights, _),) = runner.seen
    runner.model.load_state_dict(weights)
    runner.model.zero_grad()
    ListGRPOTrainer._compute_loss(runner, runner.model, inputs).backward()
    ours = {name: p.grad.double() for name, p in runner.model.named_parameters() if p.grad is not None}
    model = with_weights(runner, weights)
    model.zero_grad()
    log_probs = plain_log_probs(model, inputs)
    plain_loss(runner, 3, inputs, log_probs, log_probs.detach()).backward()
    for name, p in model.named_parameters():
        assert (p.grad - ours[name]).norm() <= 1e-4 * p.grad.norm(), name
    assert sum(grad.norm() for grad in ours.values()) > 0.1


def test_answers_that_are_used_again_are_scored_against_who_gave_them(tmp_path: Path) -> None:
    runner = trainer(tmp_path, num_iterations=2, steps_per_generation=2, max_steps=4)
    runner.train()
    first = runner.seen[0][1]
    losses = plain_losses(runner, 3, lambda inputs: plain_log_probs(with_weights(runner, first), inputs))
    assert losses == pytest.approx([float(value) for *_, value in runner.seen], rel=1e-4)
    assert abs(losses[0] - losses[-1]) > 1e-3


def test_with_a_beta_the_reference_is_trl_s(tmp_path: Path) -> None:
    runner = trainer(tmp_path, beta=0.4, peft_config=LoraConfig(r=2, target_modules=["q_proj"]), max_steps=3)
    assert (runner.args.reference, runner.objective) == ("model", objectives.perpo(0.4))
    runner.train()
    base = tiny_models.build("qwen2")[0].double().eval()
    losses = plain_losses(runner, 3, lambda inputs: plain_log_probs(base, inputs))
    assert losses == pytest.approx([float(value) for *_, value in runner.seen], rel=1e-4)
    assert abs(losses[0] - losses[2]) > 1e-4


def test_simpo_has_no_reference_and_divides_by_length(tmp_path: Path) -> None:
    runner = trainer(tmp_path, objective="simpo", max_steps=1)
    runner.train()
    ((inputs, weights, loss),) = runner.seen
    assert runner.args.reference == "none"
    with torch.no_grad():
        log_probs = plain_log_probs(with_weights(runner, weights), inputs)
    assert float(loss) == pytest.approx(float(plain_loss(runner, 3, inputs, log_probs, None)), rel=1e-4)


def test_the_temperature_of_sampling_is_that_of_the_log_probs(tmp_path: Path) -> None:
    runner = trainer(tmp_path, objective="simpo", temperature=0.5, max_steps=1)
    runner.train()
    ((inputs, weights, loss),) = runner.seen
    at_one = Watched._compute_loss
    runner.model.load_state_dict(weights)
    runner.temperature = 1.0
    with torch.no_grad():
        assert float(at_one(runner, runner.model, inputs)) != pytest.approx(float(loss), rel=1e-3)
        runner.model.lm_head.weight.mul_(2.0)
        assert float(at_one(runner, runner.model, inputs)) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_answers_about_pictures(family: str, tmp_path: Path) -> None:
    runner = trainer(tmp_path, family, gradient_accumulation_steps=2, max_steps=1)
    runner.train()
    for inputs, _, _ in runner.seen:
        check_lists(inputs["prompt_ids"], 3)
        assert "pixel_values" in inputs
    assert plain_losses(runner, 3) == pytest.approx([float(value) for *_, value in runner.seen], rel=1e-5)


def test_an_answer_that_cannot_be_judged_is_in_no_pair(tmp_path: Path) -> None:
    def sometimes(completions: list[Any], **columns: Any) -> list[float | None]:
        return [None if i % 3 == 0 else value for i, value in enumerate(score(completions))]

    runner = trainer(tmp_path, rewards=sometimes, max_steps=1)
    runner.train()
    ((inputs, _, _),) = runner.seen
    assert inputs["rewards"].isnan().view(-1, 3).sum(1).tolist() == [1, 1]
    assert plain_losses(runner, 3) == pytest.approx([float(runner.seen[0][2])], rel=1e-5)


def test_answers_that_were_all_cut_have_no_loss(tmp_path: Path) -> None:
    runner = trainer(tmp_path, mask_truncated_completions=True, max_completion_length=2, max_steps=1)
    runner.train()
    ((inputs, _, loss),) = runner.seen
    assert not inputs["completion_mask"].any()
    assert (float(loss), runner.state.log_history[0]["grad_norm"]) == (0.0, 0.0)


def test_evaluation_is_over_whole_lists(tmp_path: Path) -> None:
    runner = trainer(tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=6, max_steps=1)
    runner.train()
    log = next(log for log in runner.state.log_history if "eval_loss" in log)
    assert log["eval_loss"] > 0
    assert log["eval_lists/active"] == 1


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}, "must be a multiple of num_generations"),
        ({"eval_strategy": "epoch", "per_device_eval_batch_size": 9, "num_generations_eval": 2}, "eval"),
        ({"loss_type": "dr_grpo"}, "loss_type=.dr_grpo. belongs to the GRPO loss, and here the loss is"),
        ({"epsilon": 0.1}, "epsilon=0.1 belongs"),
        ({"scale_rewards": "none"}, "scale_rewards='none' belongs"),
        ({"vllm_importance_sampling_correction": True}, "has none of; leave it out"),
        ({"router_aux_loss_coef": 0.1}, "load-balancing loss"),
        ({"objective": "rosepo"}, "objective='rosepo' needs flip_probs, which sampled answers do not come with"),
        ({"objective": "mdpo"}, "objective='mdpo' needs pairs of its own"),
        ({"objective": "grop"}, "objective must be one of perpo"),
        ({"objective": objectives.perpo(0.1), "beta": 0.2}, "beta=0.2, but objective has beta=0.1"),
        ({"beta": 0.1, "objective_options": {"beta": 0.2}}, "beta is given twice"),
        ({"reference": "model"}, "reference='model' with beta=0.0: .* set beta above 0"),
        ({"reference": "sampler", "beta": 0.1}, "leave beta at 0, and give it in objective_options"),
        ({"reference": "old"}, "reference must be one of sampler, model, none"),
        ({"objective": "simpo", "reference": "sampler"}, "has no reference; leave it out"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_say_what_to_do(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        config(tmp_path, **options)


def test_the_config_is_read_off_a_command_line(tmp_path: Path) -> None:
    words = f"--output_dir {tmp_path} --use_cpu true --bf16 false --objective lipo --beta 0.2".split()
    (read,) = HfArgumentParser(ListGRPOConfig).parse_args_into_dataclasses(words)
    assert (read.list_objective, read.reference) == (objectives.lipo(0.2), "model")


def test_every_setting_of_the_grpo_loss_is_one_of_trl_s() -> None:
    assert set(OF_ITS_LOSS) <= set(GRPOConfig.__dataclass_fields__)


def test_prompts_with_pictures_are_padded_on_the_left(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="processing_class: its tokenizer has padding_side='right'"):
        trainer(tmp_path, "llava", padding_side="right")


def test_too_few_prompts_for_one_round_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_dataset: it has 8 prompts, and a round of sampling takes 10"):
        trainer(tmp_path, steps_per_generation=5)


def test_another_config_is_refused(tmp_path: Path) -> None:
    model, tokenizer = tiny_models.build("qwen2")
    theirs = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    for arguments in ({"args": theirs}, {}):
        with pytest.raises(TypeError, match="args must be a ListGRPOConfig, which has all of GRPOConfig; got"):
            ListGRPOTrainer(model, reward_funcs=score, processing_class=tokenizer, **arguments)


@pytest.mark.parametrize(
    ("found", "words"),
    [("1.3.0", "trl 1.3.0 is installed, and .* pip install 'trl>="), (None, "needs TRL: pip install")],
)
def test_another_version_of_trl_is_one_sentence(found: str | None, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if found is None:
            raise trl_versions.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(trl_versions.metadata, "version", version)
    with pytest.raises(ImportError, match=words):
        trl_versions.require_trl()
