"""What a trainer writes into its folder and reads from it: checkpoints, and what lies beside their weights.

A folder is of one run, see `perpo.training.checkpoints`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn

from perpo.encoding.collator import Sample
from perpo.training import degree
from perpo.training.checkpoints import (
    check_loaded,
    claim_run,
    lists_fingerprint,
    names_of_model,
    only_run,
    run_identity,
    seal,
    seal_weights,
    unseal,
)
from perpo.training.config import PerPOConfig
from perpo.training.failures import check_same
from perpo.training.publish import Publishing
from perpo.training.references import References
from perpo.training.reward_shift import RewardShift
from perpo.training.sharding import check_checkpoint, weights_come_from_first

# Settings in which the processes of a run may differ: where its files are, what is printed, how fast it reads.
OF_A_PROCESS = {
    *("output_dir", "logging_dir", "image_root", "reference_cache_dir", "ref_model_name_or_path", "deepspeed"),
    *("run_name", "project", "report_to", "log_level", "log_level_replica", "log_on_each_node", "disable_tqdm"),
    *("hub_token", "push_to_hub_token", "local_rank", "dataloader_num_workers", "dataloader_prefetch_factor"),
    *("dataloader_pin_memory", "dataloader_persistent_workers"),
}


class Saving(Publishing):
    """`Trainer` with a folder that no other run has."""

    args: PerPOConfig
    train_dataset: Sequence[Sample] | None
    eval_dataset: Sequence[Sample] | None
    references: References
    degree: degree.DegreeHead | None
    _shift: RewardShift | None

    def _identify(self, model: nn.Module) -> None:
        """Note what this run computes, and see that all its processes are about to compute it."""
        args = self.args
        settings = {name: str(value) for name, value in args.to_dict().items() if name not in OF_A_PROCESS}
        lists = {"lists": self.train_dataset, "evaluated lists": self.eval_dataset}
        data = {name: lists_fingerprint(samples or (), args) for name, samples in lists.items()}
        self._identity: dict[str, str] = {}
        if self.is_world_process_zero() or not weights_come_from_first(self.accelerator):
            self._identity = run_identity(model, args, self.encoder, data["lists"], self.references.model)
        check_same(args.world_size, {**self._identity, **settings, **data})

    def _claim_folder(self, block: contextlib.ExitStack, resume: str | bool | None) -> str | None:
        """The checkpoint to resume from. Until the end of the block no other run can have the folder."""
        found: list[Any] = [None, None]
        if self.is_world_process_zero():
            try:
                block.enter_context(only_run(self.args))
                found[0] = claim_run(str(self.args.output_dir), self._identity, resume)
                if found[0] is not None:
                    check_checkpoint(self, Path(found[0]))
            except (ValueError, OSError) as error:
                found[1] = error
        broadcast_object_list(found)  # all ranks stop, or none
        if found[1] is not None:
            raise found[1]
        return found[0]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        of_checkpoint = _internal_call and not self.pushing
        with names_of_model(self.model) if of_checkpoint else contextlib.nullcontext():
            super().save_model(output_dir, _internal_call)
        if self.degree is not None and self.args.should_save:
            degree.save(self.degree, output_dir or str(self.args.output_dir))
        if not _internal_call and self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            seal_weights(folder)
            self.write_card(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            unseal(folder)
        super()._save_checkpoint(model, trial)
        if self._shift is not None:
            self._shift.update(self.accelerator)
            if self.args.should_save:
                self._shift.save(folder)
        self.accelerator.wait_for_everyone()  # each writes a part
        if self.args.should_save:
            seal(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.degree is not None:
            degree.load(self.degree, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.degree is not None:
            degree.load(self.degree, str(self.state.best_model_checkpoint))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A checkpoint that holds other names would leave the model as it was, with a warning."""
        check_loaded(self.model, [name for name in load_result.missing_keys if not name.startswith(degree.NAME)])
