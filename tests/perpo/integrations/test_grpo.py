"""The rewards in TRL's GRPO, in a real trainer: a reward there is called with more than the columns it names."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import datasets
import pytest
import trl

from perpo.rewards.grounding import box_reward
from perpo.rewards.ocr import ocr_reward

from .. import tiny_models


def noted(reward: Callable[..., list[float | None]], calls: list[tuple[dict[str, Any], list[float | None]]]) -> Any:
    """The same reward, its arguments and results kept in `calls`."""

    @wraps(reward)
    def called(**arguments: Any) -> list[float | None]:
        results = reward(**arguments)
        calls.append((arguments, results))
        return results

    return called


@pytest.mark.parametrize("chat", [False, True])
def test_a_step_of_grpo_with_boxes_and_text(chat: bool, tmp_path: Path) -> None:
    model, tokenizer = tiny_models.build("qwen2")
    prompts: list[Any] = ["Where is it?", "And where is this?"]
    if chat:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    rows = {"prompt": prompts, "answer": ["[0.1, 0.2, 0.5, 0.6]", "[0.3, 0.3, 0.9, 0.9]"]}
    calls: dict[str, list[tuple[dict[str, Any], list[float | None]]]] = {"boxes": [], "text": []}
    config = trl.GRPOConfig(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=8,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        report_to="none",
        logging_steps=1,
    )
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=[noted(box_reward(), calls["boxes"]), noted(ocr_reward, calls["text"])],
        args=config,
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    for made in calls.values():
        ((arguments, results),) = made
        assert len(arguments["completions"]) == len(arguments["answer"]) == len(results) == 4
        assert isinstance(arguments["completions"][0], list if chat else str)
        assert all(0 <= value <= 1 for value in results)
    log = trainer.state.log_history[0]
    assert log["rewards/box_iou_reward_llava/mean"] == 0  # random bytes are no box
    assert log["rewards/ocr_reward/mean"] == pytest.approx(sum(calls["text"][0][1]) / 4, abs=1e-6)
