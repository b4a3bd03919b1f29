"""SIGINT and SIGTERM during training: the running step is finished, a checkpoint is written, and training ends.

Several processes stop after the same step, whichever of them the signal reached first: each adds its vote to the
numbers that all exchange at the beginning of a step, so stopping costs no communication of its own. A second signal
has its usual effect at once. A process that could not make its batch votes too; then nothing of the step is kept.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
FAILED = 1 << 10  # the vote of a process that has no batch; above all signals


class StoppedBySignal(SystemExit):
    """Training was stopped by a signal. The exit code is that of a process which the signal has ended.

    Attributes:
        message: how far it came, and how it resumes.
    """

    def __init__(self, number: int, step: int, args: TrainingArguments) -> None:
        super().__init__(128 + number)
        way_on = (
            "no checkpoint was written, since save_strategy is 'no'"
            if args.save_strategy == "no"
            else f"{args.output_dir}/checkpoint-{step} is whole: set resume_from_checkpoint=true to resume from it"
        )
        self.message = f"{signal.Signals(number).name}: training was stopped after step {step}; {way_on}"


class StopOnSignal(TrainerCallback):
    """A callback, and the block in which it listens.

    Attributes:
        received: the first signal that reached this process.
        stopped: the signal that ended training, in all processes after the same step; FAILED if it was none.
        failure: what kept this process from making its batch.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.stopped: int | None = None
        self.failure: Exception | None = None
        self._several = False
        self._votes: Tensor | None = None  # on the CPU once `_copied` is over
        self._copied: Any = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.received, self.stopped, self.failure = None, None, None
        self._several, self._votes, self._copied = False, None, None
        if threading.current_thread() is threading.main_thread():  # elsewhere no handler can be set
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    @property
    def vote(self) -> int:
        """What this process adds to the numbers that all exchange: the signal that it has received, or 0."""
        return (self.received or 0) if self.failure is None else FAILED

    def count(self, votes: Tensor) -> None:
        """Take the votes of all processes; they are looked at when the step ends, so that nothing waits for them."""
        self._several = True
        self._votes = votes.max().to("cpu", non_blocking=True)
        self._copied = torch.cuda.current_stream(votes.device).record_event() if votes.is_cuda else None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        agreed = self._agreed()
        if agreed == FAILED or (agreed and state.global_step < state.max_steps):
            self.stopped = agreed
            control.should_training_stop = True
            control.should_save = agreed != FAILED and args.save_strategy != "no"
            if agreed == FAILED:
                control.should_evaluate = control.should_log = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """`Trainer` calls this also where an epoch was broken off: what belongs to its end comes after the resume."""
        if self.stopped and (self.stopped == FAILED or abs(state.epoch - round(state.epoch)) > 1e-6):
            control.should_save = control.should_evaluate = False

    def _agreed(self) -> int | None:
        if not self._several:
            return self.received
        if self._copied is not None:
            self._copied.synchronize()
        return None if self._votes is None else int(self._votes) or None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        logger.warning(
            f"{signal.Signals(number).name}: training stops after this step; a second signal stops it at once"
        )

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
