"""PerPO in a plain accelerate loop: a tiny language model learns to answer with even digits.

    python examples/accelerate_loop.py
    accelerate launch --num_processes 2 --cpu examples/accelerate_loop.py

Every sample of the data set is one list: its answers stay together, however samples are shuffled and spread over
processes. The model, the answers and the rewards are made up; yours come from a processor and a reward.
"""

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import perpo

K, PROMPT, ANSWER = 4, 6, 5  # answers a list, tokens of a prompt and of an answer
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def make_lists(n: int) -> list[dict[str, torch.Tensor]]:
    """Prompts of tokens 10 to 19, answers of the digits 0 to 9; the reward is the share of even digits."""
    lists = []
    for _ in range(n):
        prompt, answers = torch.randint(10, 20, (1, PROMPT)), torch.randint(10, (K, ANSWER))
        lists.append({"prompt": prompt, "answers": answers, "rewards": (answers % 2 == 0).float().mean(1)})
    return lists


def collate(lists: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows [prompt | answer], the answers of a list one after another, and labels that are −100 at prompts."""
    ids = torch.cat([torch.cat([one["prompt"].expand(K, -1), one["answers"]], 1) for one in lists])
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return {"input_ids": ids, "labels": labels, "rewards": torch.cat([one["rewards"] for one in lists])}


def main(n_lists: int = 64) -> list[float]:
    """Train for two passes; returns the loss of every step."""
    set_seed(0)
    accelerator = Accelerator(
        gradient_accumulation_steps=2, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True)
    )
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(make_lists(n_lists), batch_size=4, shuffle=True, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    losses = []
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model):
                inputs = {"input_ids": batch["input_ids"]}
                out = perpo.list_loss(model, inputs, batch["labels"], batch["rewards"], num_candidates=K)
                accelerator.backward(out.loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(out.loss.item())
        accelerator.print(f"loss {losses[-1]:.3f}, margin {out.metrics['rewards/margins'].item():+.3f}")
    return losses


if __name__ == "__main__":
    main()
