"""On-policy alignment: sample k answers to each scene, score them against the exact box, train on the list; then again.

Every preference method here is the one loss call, `perpo_kernels.linear_perpo_loss`, on the same scenes and the same
samples of its own policy; they differ in what of a list they look at:

    DPO             the best and the worst answer (a list of two, for which the loss is DPO's)
    uniform pairs   all pairs, each of the same weight (γ = 0)
    PerPO           all pairs, each weighted by its margin of reward to the power γ

The lm_head and the vision tower are frozen, as published. The reference is the policy that a round begins with, so
its log-probs come from the states that the sampling went through, and cost one small product.

The regime is chosen on validation scenes, seed 0: β = 1 and a learning rate of 2e-4 (5e-4 gave PerPO 4 points of AP@50
less), two rounds of 512 scenes, of which the second still added a point. Other β were not tried to the end.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import perpo_kernels as pk
from perpo.demo.model import continuation_states, sample_answers
from perpo.demo.scenes import Scenes, make_scenes
from perpo.demo.train_sft import sft_loss
from perpo.demo.vocabulary import box_texts, question_ids, question_text
from perpo.rewards import iou_reward

CONTINUED_SFT, DPO, UNIFORM, PERPO = "continued SFT", "DPO (best vs worst)", "uniform pairs", "PerPO"
METHODS = (CONTINUED_SFT, DPO, UNIFORM, PERPO)
Advance = Callable[[int], None]  # told how many scenes have been dealt with since the last call

SAMPLING_BATCH = 32  # scenes; more are slower, as their answers' caches outgrow the processor's


@dataclass(frozen=True)
class Recipe:
    """What all methods share: the budget of scenes and steps, and the optimiser's settings.

    β and γ are the published ones, and so is the single pass over lists sampled once. So few lists and so low a rate
    go part of the way, which is where the methods differ: trained for longer (two rounds of 512 lists at 2e-4 and
    β = 1), every preference method gets to AP@50 0.85 and they tie. Chosen on validation scenes, with other seeds
    than the comparison's.
    """

    rounds: int = 1
    lists: int = 256  # fresh scenes a round
    k: int = 16  # answers sampled a scene
    batch: int = 16  # lists an optimiser step
    learning_rate: float = 5e-5
    beta: float = 0.1
    gamma: float = 0.5


@dataclass(frozen=True)
class Lists:
    """One round's data: k scored answers to each scene, with the reference's log-probs."""

    scenes: Scenes
    answers: Tensor  # [N, k, 4]
    rewards: Tensor  # [N, k] IoU with the exact box
    ref_log_probs: Tensor  # [N, k]

    def best_and_worst(self) -> "Lists":
        pair = torch.stack((self.rewards.argmax(1), self.rewards.argmin(1)), dim=1)  # [N, 2]
        rows = torch.arange(len(pair)).unsqueeze(1)
        return Lists(self.scenes, self.answers[rows, pair], self.rewards[rows, pair], self.ref_log_probs[rows, pair])

    def __getitem__(self, index: Tensor) -> "Lists":
        return Lists(self.scenes[index], self.answers[index], self.rewards[index], self.ref_log_probs[index])


def score(scenes: Scenes, answers: Tensor) -> Tensor:
    """IoU [N, k] of every answer [N, k, 4] with its scene's exact box, through the text that a user would read."""
    k = answers.shape[1]
    prompts = [question_text(digit) for digit in scenes.asked.tolist() for _ in range(k)]
    truths = scenes.boxes.repeat_interleave(k, dim=0).tolist()
    rewards = iou_reward(prompts=prompts, completions=box_texts(answers.flatten(0, 1)), answer=truths)
    return torch.tensor(rewards).view(-1, k)


@torch.no_grad()
def sample_lists(
    model: LlavaForConditionalGeneration, scenes: Scenes, k: int, generator: torch.Generator, advance: Advance
) -> Lists:
    """k sampled and scored answers to each scene, and their log-probs under the model that gave them."""
    answers, log_probs = [], []
    for start in range(0, len(scenes), SAMPLING_BATCH):
        part = scenes[start : start + SAMPLING_BATCH]
        tokens, states = sample_answers(model, part, k, generator)
        token_log_probs = pk.linear_token_log_probs(states.flatten(0, 2), model.lm_head.weight, tokens.flatten())
        answers.append(tokens)
        log_probs.append(token_log_probs.view(tokens.shape).sum(2))
        advance(len(part))
    return Lists(scenes, torch.cat(answers), score(scenes, torch.cat(answers)), torch.cat(log_probs))


def list_loss(model: LlavaForConditionalGeneration, lists: Lists, beta: float, gamma: float) -> Tensor:
    """The PerPO loss of a batch of lists, from hidden states: no logits are kept."""
    count, k, length = lists.answers.shape
    questions = question_ids(lists.scenes.asked)
    states = continuation_states(model, lists.scenes.images, questions, lists.answers)
    return pk.linear_perpo_loss(
        states.flatten(0, 2),
        model.lm_head.weight,
        lists.answers.flatten(),
        lists.rewards.flatten(),
        cu_seqlens=torch.arange(count * k + 1, dtype=torch.int32) * length,
        cu_lists=torch.arange(count + 1, dtype=torch.int32) * k,
        ref_log_probs=lists.ref_log_probs.flatten(),
        beta=beta,
        gamma=gamma,
    ).loss


def round_losses(
    model: LlavaForConditionalGeneration, method: str, scenes: Scenes, recipe: Recipe, seed: int, advance: Advance
) -> Iterator[Tensor]:
    """The losses of one round's optimiser steps, each computed when the step before it has been taken."""
    if method == CONTINUED_SFT:
        advance(len(scenes))  # in place of the sampling
        for start in range(0, len(scenes), recipe.batch):
            yield sft_loss(model, scenes[start : start + recipe.batch], seed + start)
        return
    generator = torch.Generator().manual_seed(seed)
    lists = sample_lists(model, scenes, recipe.k, generator, advance)
    if method == DPO:
        lists = lists.best_and_worst()
    gamma = 0.0 if method == UNIFORM else recipe.gamma
    for index in torch.randperm(len(scenes), generator=generator).split(recipe.batch):
        yield list_loss(model, lists[index], recipe.beta, gamma)


def align(
    sft: LlavaForConditionalGeneration,
    method: str,
    recipe: Recipe,
    seed: int,
    advance: Advance,
    after_round: Callable[[LlavaForConditionalGeneration], None] = lambda model: None,
) -> LlavaForConditionalGeneration:
    """A copy of the SFT model, aligned by a method. With the same recipe and seed, all methods see the same scenes."""
    model = copy.deepcopy(sft)
    model.lm_head.requires_grad_(False)
    model.model.vision_tower.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, recipe.learning_rate, weight_decay=0.0)
    steps = recipe.rounds * math.ceil(recipe.lists / recipe.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for round_ in range(recipe.rounds):
        round_seed = 1_000_000 * (seed + 1) + 10_000 * round_
        scenes = make_scenes(recipe.lists, "train", round_seed)
        for loss in round_losses(model, method, scenes, recipe, round_seed, advance):
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            advance(min(recipe.batch, recipe.lists))
        after_round(model)
    return model
