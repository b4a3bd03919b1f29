"""PerPO in a LightningModule, on the lists and the model of `accelerate_loop.py`.

    pip install lightning && python examples/lightning_module.py

The loss is computed in `training_step`, which every strategy of Lightning (DDP, FSDP, DeepSpeed) calls through what it
has put around the module.
"""

import lightning
import torch
from accelerate_loop import SIZES, K, collate, make_lists
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import perpo


class PerPOModule(lightning.LightningModule):
    def __init__(self, model: torch.nn.Module, lr: float = 3e-3) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        inputs = {"input_ids": batch["input_ids"]}
        out = perpo.list_loss(self.model, inputs, batch["labels"], batch["rewards"], num_candidates=K)
        self.log_dict({"loss": out.loss, **out.metrics}, prog_bar=True, batch_size=len(out.active))
        return out.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def main(n_lists: int = 64, **options: object) -> dict[str, float]:
    """Train for two passes; returns what was logged last."""
    lightning.seed_everything(0)
    module = PerPOModule(LlamaForCausalLM(LlamaConfig(vocab_size=20, **SIZES)))
    loader = DataLoader(make_lists(n_lists), batch_size=4, shuffle=True, collate_fn=collate)
    trainer = lightning.Trainer(max_epochs=2, logger=False, enable_checkpointing=False, **options)
    trainer.fit(module, loader)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    print(main())
