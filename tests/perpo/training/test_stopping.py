"""A signal ends training after the step at hand, and the run that resumes ends as if there had been none; while a run
is at work nobody else writes into its folder."""

import json
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from perpo.training.checkpoints import last_whole_checkpoint
from perpo.training.stopping import SIGNALS, StoppedBySignal

from ...processes import ranks, start
from .. import tiny_runs

OPTIONS: dict[str, Any] = {"max_steps": 5, "save_strategy": "steps", "save_steps": 4, "reference": "none"}


class SignalIn(TrainerCallback):
    """Raises a signal in the middle of a step: after its first of two backward passes."""

    def __init__(self, step: int, number: int, times: int = 1) -> None:
        self.step, self.number, self.times = step, number, times

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            for _ in range(self.times):
                signal.raise_signal(self.number)
                time.sleep(0.05)  # until it was noted: two that wait are one


class CountSaves(TrainerCallback):
    def __init__(self) -> None:
        self.n = 0

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.n += 1


def train(folder: Path, *callbacks: TrainerCallback, resume: bool = False, **options: Any) -> tuple[Any, Any]:
    torch.set_num_threads(1)
    settings = OPTIONS | {"gradient_accumulation_steps": 2} | options
    runner = tiny_runs.trainer("llava", folder, dropout=0.2, **settings)
    for callback in callbacks:
        runner.add_callback(callback)
    runner.train(resume_from_checkpoint=resume)
    return tiny_runs.trained(runner.model), runner.state.log_history


@pytest.mark.parametrize("number", SIGNALS)
def test_the_step_is_finished_and_the_resume_is_exact(number: signal.Signals, tmp_path: Path) -> None:
    whole, log = train(tmp_path / "whole")
    before = [signal.getsignal(one) for one in SIGNALS]
    with pytest.raises(StoppedBySignal) as stopped:
        train(tmp_path / "stopped", SignalIn(3, number))
    assert stopped.value.code == 128 + number
    checkpoint = tmp_path / "stopped" / "checkpoint-3"
    assert f"{number.name}: training was stopped after step 3; {checkpoint} is whole" in stopped.value.message
    assert last_whole_checkpoint(tmp_path / "stopped") == checkpoint
    assert [signal.getsignal(one) for one in SIGNALS] == before
    resumed, resumed_log = train(tmp_path / "stopped", resume=True)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)
    losses = [[(line["step"], line["loss"]) for line in lines if "loss" in line] for lines in (log, resumed_log)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5


@pytest.mark.parametrize("strategy", ["epoch", "no"])
def test_where_nothing_is_saved_between_epochs(strategy: str, tmp_path: Path) -> None:
    """4 lists are two steps. A run that saves nothing says that nothing was saved."""
    options = {"save_strategy": strategy, "num_train_epochs": 2, "max_steps": -1}
    saves = CountSaves()
    with pytest.raises(StoppedBySignal) as stopped:
        train(tmp_path, SignalIn(3, signal.SIGTERM), saves, **options)
    if strategy == "no":
        assert "stopped after step 3; no checkpoint was written, since save_strategy is 'no'" in stopped.value.message
        assert list(tmp_path.glob("checkpoint-*")) == []
    else:
        assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
        assert saves.n == 2  # after the first epoch, and after step 3; not again as if the epoch had ended there


def test_in_the_last_step_a_signal_changes_nothing(tmp_path: Path) -> None:
    whole, _ = train(tmp_path / "whole")
    signalled, _ = train(tmp_path / "signalled", SignalIn(5, signal.SIGTERM))
    for name, value in whole.items():
        torch.testing.assert_close(signalled[name], value, rtol=0, atol=0, msg=name)


def test_a_second_signal_stops_at_once(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, SignalIn(2, signal.SIGINT, times=2))
    assert list(tmp_path.glob("checkpoint-*")) == []
    train(tmp_path)  # and the folder is free


def test_training_outside_the_main_thread_needs_no_handlers(tmp_path: Path) -> None:
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(train(tmp_path, max_steps=1)))
    thread.start()
    thread.join()
    assert len(done) == 1


# --------------------------------------------------------------------------------------------------------- as processes

SLOWLY = """
import sys, time
from transformers import TrainerCallback
from perpo.cli.main import main
from perpo.training import trainer

class Slow(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        print("step", state.global_step + 1, flush=True)
        time.sleep(0.5)

begin = trainer.PerPOTrainer.__init__
def slow(self, *args, **options):
    begin(self, *args, **options)
    self.add_callback(Slow())
trainer.PerPOTrainer.__init__ = slow
sys.exit(main(sys.argv[1:]))
"""


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_stops_on_sigterm(tmp_path: Path) -> None:
    config = str(tiny_runs.save_run(tmp_path, max_steps=1000, save_steps=1000) / "run.yaml")
    first = start("-c", SLOWLY, "train", "--config", config)
    first.wait_for("step 2")
    second = start("-m", "perpo", "train", "--config", config)
    shown = second.communicate(timeout=120)[1]
    assert second.returncode == 1
    owner = f"output_dir: {tmp_path / 'out'} is in use by process {first.pid} on {socket.gethostname()}"
    assert owner in shown
    assert "Traceback" not in shown
    first.send_signal(signal.SIGTERM)
    shown = first.communicate(timeout=120)[1]
    assert first.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in shown
    checkpoint = last_whole_checkpoint(tmp_path / "out")
    assert checkpoint is not None
    assert f"{checkpoint} is whole: set resume_from_checkpoint=true" in shown
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()  # that would look like a finished run


def test_a_killed_run_leaves_no_lock_behind(tmp_path: Path) -> None:
    config = str(tiny_runs.save_run(tmp_path, max_steps=2, dataloader_num_workers=1) / "run.yaml")
    first = start("-c", SLOWLY, "train", "--config", config)
    first.wait_for("step 1")
    first.kill()
    first.communicate()
    assert (tmp_path / "out" / ".lock").exists()  # but nobody holds it
    second = start("-m", "perpo", "train", "--config", config)
    shown = second.communicate(timeout=120)[1]
    assert second.returncode == 0, shown
    assert not (tmp_path / "out" / ".lock").exists()


def test_ranks_of_one_run_share_a_folder_and_stop_after_the_same_step(tmp_path: Path) -> None:
    """The signal reaches the second rank alone."""
    options = json.dumps(OPTIONS | {"max_steps": 60, "save_steps": 1000, "ddp_backend": "gloo", "n_lists": 6})
    both = ranks(2, "-m", "tests.perpo.run_training", str(tmp_path), options, "0", "3")
    shown = "".join(one.communicate()[1] for one in both)
    assert [one.returncode for one in both] == [128 + signal.SIGTERM] * 2
    assert "SIGTERM: training was stopped after step " in shown, shown[-3000:]
    checkpoint = last_whole_checkpoint(tmp_path)
    assert checkpoint is not None
    assert 3 <= int(checkpoint.name.removeprefix("checkpoint-")) <= 4
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert f"checkpoint-{state['global_step']}" == checkpoint.name
    assert sorted(path.name for path in checkpoint.glob("rng_state_*")) == ["rng_state_0.pth", "rng_state_1.pth"]
    assert not (tmp_path / "trained.pt").exists()
