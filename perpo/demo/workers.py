"""What the processes that the demo's work is spread over begin with."""

import multiprocessing
import os
import threading

import torch


def start_worker(threads: int = 1) -> None:
    """The processor is enough, and gives the same figures everywhere; a worker does not outlive the program."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: "multiprocessing.process.BaseProcess | None") -> None:
    if parent is not None:
        parent.join()
        os._exit(1)
