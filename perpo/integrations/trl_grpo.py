"""TRL's GRPOTrainer with the loss of a list in place of the GRPO loss.

    ListGRPOTrainer(model, reward_funcs=[box_reward()], args=ListGRPOConfig("out", objective="perpo"), train_dataset=…)

Sampling (transformers or vLLM), reward functions, reference model, logs and checkpoints are TRL's. Different are

    lists      the k answers to a prompt stay together, whole lists are shuffled, and a forward pass takes whole lists;
               TRL shuffles single answers
    rewards    of a list as the reward functions give them, weighted and summed; an answer that none can judge takes
               part in no pair
    scores     s_i = Σ_t log π(y_it) − log π_ref(y_it), by this package's head, with rows padded on the right
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from perpo.integrations.list_loss import sequence_log_probs
from perpo.integrations.trl_grpo_config import ListGRPOConfig
from perpo.model.language_head import accept_rows
from perpo_kernels import LinearPerPOOutput, perpo_loss
from perpo_kernels.layout import equal_lists

from trl import GRPOTrainer  # isort: skip - after the version was checked
from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid  # isort: skip

ALONG_TOKENS = ("token_type_ids", "mm_token_type_ids")
OF_IMAGES = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "image_position_ids",
)


class ListGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` whose loss is an objective over the answers to each prompt, PerPO by default.

    Args:
        args: `ListGRPOConfig`. Everything else is as for `trl.GRPOTrainer`.

    Raises:
        TypeError, ValueError: another config; a model whose head is not known; one of experts with their own loss.
    """

    args: ListGRPOConfig
    _buffered_inputs: list[dict[str, Any]] | None

    def __init__(self, *args: Any, **options: Any) -> None:
        config = options.get("args", args[2] if len(args) > 2 else None)
        if not isinstance(config, ListGRPOConfig):
            raise TypeError(f"args must be a ListGRPOConfig, which has all of GRPOConfig; got {type(config).__name__}")
        super().__init__(*args, **options)
        if self._is_vlm and self._tokenizer.padding_side != "left":
            raise ValueError(
                f"processing_class: its tokenizer has padding_side={self._tokenizer.padding_side!r}, and TRL pads "
                "prompts on the left: what says where the pictures stand would be shifted. Set "
                "processing_class.tokenizer.padding_side = 'left'"
            )
        if getattr(self, "aux_loss_enabled", False):
            raise ValueError(
                "router_aux_loss_coef: the model has experts, and their load-balancing loss is not computed here; set "
                "it to 0.0 to train without"
            )
        per_round = config.generation_batch_size // self.num_generations
        if hasattr(self.train_dataset, "__len__") and len(self.train_dataset) < per_round:
            raise ValueError(
                f"train_dataset: it has {len(self.train_dataset)} prompts, and a round of sampling takes {per_round} "
                "(generation_batch_size / num_generations), so not one step would be made; give more, or lower "
                "steps_per_generation, gradient_accumulation_steps or per_device_train_batch_size"
            )
        accept_rows(self.model)
        self.objective = config.list_objective
        self._rewards_per_func: Tensor | None = None

    @property
    def _list_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    # ---------------------------------------------------------------------------------------------------------- lists

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """As GRPOTrainer's, which shuffles single answers."""
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        n_steps = self.args.steps_per_generation
        if self._step % (n_steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            answered = split_pixel_values_by_grid(self._generate_and_score_completions(generation_batch))
            parts = split_tensor_dict(shuffle_lists(answered, self.num_generations), n_steps)
            self._buffered_inputs = [unsplit_pixel_values_by_grid(part) for part in parts]
        return self._buffered_inputs[self._step % n_steps]

    def _calculate_rewards(self, *args: Any, **options: Any) -> Tensor:  # [answers of all ranks, functions]
        self._rewards_per_func = super()._calculate_rewards(*args, **options)
        return self._rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        check_lists(output["prompt_ids"], self._list_size)
        assert self._rewards_per_func is not None
        each = self._rewards_per_func
        rewards = (each * self.reward_weights.to(each.device)).nansum(1)
        rewards[each.isnan().all(1)] = torch.nan
        first = self.accelerator.process_index * len(inputs)
        output["rewards"] = rewards[first : first + len(inputs)]
        return output

    # ----------------------------------------------------------------------------------------------------------- loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        answer_mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            answer_mask = answer_mask * inputs["tool_mask"]
        rows, labels = right_padded(inputs, answer_mask)
        log_probs = sequence_log_probs(model, rows, labels, temperature=self.temperature)  # [B]
        reference = self._reference(inputs, log_probs, answer_mask)
        output = self._list_loss(log_probs, reference, inputs["rewards"], answer_mask.sum(1))
        self._log_lists(output)
        n_parts = self.current_gradient_accumulation_steps if self.model.training else 1
        return output.loss / n_parts

    def _reference(self, inputs: Mapping[str, Any], log_probs: Tensor, answer_mask: Tensor) -> Tensor | None:  # [B]
        """Log-probs of whole answers; those of the sampler are the model's own where it has not moved since."""
        if self.args.reference == "none":
            return None
        name = "ref_per_token_logps" if self.args.reference == "model" else "old_per_token_logps"
        of_tokens = inputs.get(name)
        if of_tokens is None:
            return log_probs.detach()
        return of_tokens.float().where(answer_mask.bool(), 0.0).sum(1)

    def _list_loss(
        self,
        log_probs: Tensor,  # [B]
        reference: Tensor | None,  # [B]
        rewards: Tensor,  # [B]
        n_tokens: Tensor,  # [B]
    ) -> LinearPerPOOutput:
        rewards = rewards.to(log_probs.device, torch.float32).masked_fill(n_tokens == 0, torch.nan)
        lists = (-1, self._list_size)
        loss = perpo_loss(
            log_probs.view(lists),
            rewards.view(lists),
            None if reference is None else reference.view(lists),
            lengths=n_tokens.view(lists) if self.objective.length_normalized else None,
            objective=self.objective,
        )
        with torch.no_grad():
            scores = log_probs.detach() - (0 if reference is None else reference)
            known = rewards.view(lists)
            active = known.nan_to_num(-torch.inf).amax(1) > known.nan_to_num(torch.inf).amin(1)
        cu_lists = equal_lists(len(active), self._list_size, scores.device)
        return LinearPerPOOutput(
            loss, log_probs.detach(), scores, rewards, active.float(), cu_lists, self.objective.beta
        )

    def _log_lists(self, output: LinearPerPOOutput) -> None:
        metrics = output.metrics
        gathered = self.accelerator.gather(torch.stack([x.float() for x in metrics.values()])[None]).mean(0).tolist()
        kept = self._metrics["train" if self.model.training else "eval"]
        for name, value in zip(metrics, gathered, strict=True):
            kept[name].append(value)


def shuffle_lists(answered: Mapping[str, Any], k: int) -> dict[str, Any]:
    """What belongs to the answers, in a new order: whole lists of k are moved."""
    lists = torch.randperm(len(answered["prompt_ids"]) // k)
    rows = (lists[:, None] * k + torch.arange(k)).flatten()

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if value.dim() == 0 else value[rows.to(value.device)]
        return None if value is None else [value[i] for i in rows.tolist()]

    return {name: moved(value) for name, value in answered.items()}


def check_lists(prompt_ids: Tensor, k: int) -> None:  # [B, P]
    """
    Raises:
        ValueError: the rows are not k answers to one prompt after another.
    """
    if len(prompt_ids) % k == 0:
        lists = prompt_ids.view(-1, k, prompt_ids.shape[1])
        if bool((lists == lists[:, :1]).all()):
            return
    raise ValueError(
        f"num_generations={k}: the answers of this process are not lists of {k} to one prompt each; a sampler, a "
        "rollout_func or an environment_factory that makes another prompt of each row tears lists apart"
    )


def right_padded(inputs: Mapping[str, Any], answer_mask: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Keywords of the model's forward pass, and labels [B, L], of TRL's batch [padding | prompt | answer | padding].

    Positions then count from the first token of the prompt, as they do in generation. A batch without any token of an
    answer (all were cut, and mask_truncated_completions leaves those out) gets one label, for the backward pass of all
    ranks to have something to pass; its candidates are invalid, so the loss is 0.
    """
    prompt_mask, mask = inputs["prompt_mask"], inputs["completion_mask"]
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)  # [B, L]
    attention = torch.cat([prompt_mask, mask], 1)
    answer = torch.cat([torch.zeros_like(prompt_mask), answer_mask], 1)
    along = {"input_ids": ids, "attention_mask": attention, "answer": answer}
    along |= {name: inputs[name] for name in ALONG_TOKENS if inputs.get(name) is not None}
    places = torch.arange(ids.shape[1], device=ids.device) + attention.argmax(1, keepdim=True)  # [B, L]
    width = int(attention.sum(1).max())
    along = {name: x.gather(1, places % ids.shape[1])[:, :width] for name, x in along.items()}
    answer = along.pop("answer").bool()
    labels = along["input_ids"].masked_fill(~answer, -100)
    if not bool(answer.any()):
        last = int(along["attention_mask"][0].sum()) - 1
        labels[0, last] = along["input_ids"][0, last]
    pictures = {name: inputs[name] for name in OF_IMAGES if inputs.get(name) is not None}
    return along | pictures, labels
