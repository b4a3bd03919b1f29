"""Settings of the reward, shared by the commands that score answers for training."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from perpo.data.record import ListRecord


@dataclass(kw_only=True)
class RewardSettings:
    """What answers are scored by."""

    task: str | None = field(
        default=None, metadata={"help": "Task of records that name none: grounding, ocr, counting, numeric, exact, …"}
    )
    answer_format: str | None = field(
        default=None, metadata={"help": "How the model writes boxes, for grounding tasks: llava, qwen2.5-vl, …"}
    )
    reward: str | None = field(
        default=None,
        metadata={"help": "Reward of all records, whatever their task: a name as in task, or package.module:function."},
    )

    def named(self, task: str | None) -> str | None:
        """A task with the box format that the command names."""
        boxes = task in ("grounding", "grounding-giou")
        return f"{task}/{self.answer_format}" if boxes and self.answer_format else task

    def with_task(self, record: ListRecord) -> ListRecord:
        """The record with the task that its answers are scored by.

        Raises:
            ValueError: it names none, and neither does the command.
        """
        task = self.named(record.task or self.task)
        if not (task or self.reward):
            raise ValueError(f"record {record.id!r} names no task: set task or reward")
        return replace(record, task=task or "")
