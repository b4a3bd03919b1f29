"""One process at a time has a folder; no process that is gone does."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from perpo.storage.lock import Lock, held

pytest.importorskip("fcntl")

HOLDER = """
import os, sys, time
from pathlib import Path
from perpo.storage.lock import Lock
lock = Lock(Path(sys.argv[1]), "it")
if sys.argv[2:] and os.fork() == 0:  # a worker, which outlives its parent
    print("forked", flush=True)
    time.sleep(60)
print(os.getpid(), flush=True)
time.sleep(60)
"""


def holder(path: Path, *extra: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path), *extra], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(1 + len(extra)):
        process.stdout.readline()
    return process


def test_the_holder_is_named_by_host_and_process(tmp_path: Path) -> None:
    process = holder(tmp_path / "lock")
    named = f"^output_dir: x is in use by process {process.pid} on {socket.gethostname()} .since 20.*Wait until"
    with pytest.raises(BlockingIOError, match=named):
        Lock(tmp_path / "lock", "output_dir: x")
    process.kill()
    process.wait()


@pytest.mark.parametrize("forks", [False, True])
def test_a_killed_holder_leaves_no_lock_behind(forks: bool, tmp_path: Path) -> None:
    process = holder(tmp_path / "lock", *(["fork"] if forks else []))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with Lock(tmp_path / "lock", "it"):
        pass


def test_a_lock_leaves_no_file_behind_and_can_be_had_again(tmp_path: Path) -> None:
    for _ in range(2):
        with Lock(tmp_path / "new" / "lock", "it"):
            assert (tmp_path / "new" / "lock").exists()
        assert list((tmp_path / "new").iterdir()) == []


def test_blocks_of_one_process_may_lie_in_each_other(tmp_path: Path) -> None:
    with held(tmp_path / "lock", "it"):
        with held(tmp_path / "lock", "it"):
            pass
        with pytest.raises(BlockingIOError):  # the inner block has not released it
            Lock(tmp_path / "lock", "it")
    with Lock(tmp_path / "lock", "it"), pytest.raises(BlockingIOError), held(tmp_path / "lock", "it"):
        pass


COUNTER = """
import sys
from pathlib import Path
from perpo.storage.lock import Lock
path = Path(sys.argv[1])
for _ in range(150):
    with Lock(path / "lock", "it", wait=True):
        number = int((path / "n").read_text())
        (path / "n").write_text(str(number + 1))
"""


def test_those_who_wait_come_one_after_another(tmp_path: Path) -> None:
    """The file of the lock is deleted and made anew all the time."""
    (tmp_path / "n").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", COUNTER, str(tmp_path)]) for _ in range(4)]
    started = time.monotonic()
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    assert time.monotonic() - started < 60
    assert (tmp_path / "n").read_text() == "600"
