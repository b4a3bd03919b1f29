"""Python processes that start at once: forked from a server that has imported what they would import in ten seconds.

`start("-m", "perpo", "train", …)` is `python -m perpo train …`, and `ranks(2, …)` what torchrun makes of it. What is
tested is the process: its signals, its exit code, what it prints, what it leaves behind.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from subprocess import TimeoutExpired
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
ONE_THREAD = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.perpo.run_training", "tests.perpo.integrations.run_wrapped", "perpo.cli.train"])


class Python:
    """A process with the methods of `subprocess.Popen` that the tests need; its output goes to files.

    Attributes:
        returncode: None while it runs; −n if signal n ended it.
    """

    def __init__(self, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="process-")
        everything = {name: value for name, value in os.environ.items() if "XDIST" not in name}
        everything |= ONE_THREAD | environment
        self._process = _FORKS.Process(target=_become, args=(arguments, everything, os.getcwd(), self._folder.name))
        with patch.dict(os.environ, ONE_THREAD):  # of the server, if there is none yet
            self._process.start()
        atexit.register(self._process.kill)  # before multiprocessing waits for it
        self.arguments = arguments
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    @property
    def output(self) -> tuple[str, str]:
        """On stdout and stderr so far."""
        out, err = (Path(self._folder.name, name) for name in ("out", "err"))
        return out.read_text() if out.exists() else "", err.read_text() if err.exists() else ""

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutExpired(self.arguments, timeout, *self.output)
        return self.returncode

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        self.wait(timeout)
        return self.output

    def wait_for(self, text: str, timeout: float = 240) -> None:
        """Until it was printed."""
        end = time.monotonic() + timeout
        while text not in self.output[0]:
            assert self.returncode is None, f"{text!r} did not come; {self.output[1][-2000:]}"
            assert time.monotonic() < end, f"{text!r} did not come within {timeout} s; {self.output[1][-2000:]}"
            time.sleep(0.01)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(*arguments: str, **environment: str) -> Python:
    return Python(arguments, environment)


def ranks(n: int, *arguments: str, **environment: str) -> list[Python]:
    """Processes that find each other as those of torchrun do."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [start(*arguments, RANK=str(i), LOCAL_RANK=str(i), **shared, **environment) for i in range(n)]


def _become(arguments: tuple[str, ...], environment: dict[str, str], where: str, output: str) -> None:
    """In the fork: the interpreter with these arguments."""
    multiprocessing.set_start_method(None, force=True)  # the fork's own processes are started as ever
    gc.freeze()  # as in conftest.py
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(output, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(where)
    option, *rest = arguments
    sys.argv = [option, *rest[option in ("-c", "-m") :]]
    if option == "-c":
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif option == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(option, run_name="__main__")
