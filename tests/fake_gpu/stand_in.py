"""A pytest plugin that gives a CPU build of torch two CUDA devices that compute nothing, for fake tensors.

    python -m pytest -p tests.fake_gpu.stand_in tests/fake_gpu -k copies

FakeTensorMode holds CUDA tensors without memory on any machine, but autograd asks a device guard before it runs a
backward pass, and a CPU build of torch has none. `guard.cpp` is one. It has to be there before torch is imported, and
torch then takes CUDA for its accelerator, so that it must not be loaded into a process with other tests in it:
`conftest.py` starts processes with this plugin.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SOURCE = Path(__file__).with_name("guard.cpp")
BUILD = Path(__file__).with_name("build")
CAPABILITY = (9, 0)
PROPERTIES = {  # of an H100
    "name": "stand-in",
    "major": 9,
    "minor": 0,
    "total_memory": 80 << 30,
    "multi_processor_count": 132,
    "L2_cache_size": 50 << 20,
}
loaded = False


def problem() -> str | None:
    """Why the devices can't be had here, or None."""
    libraries = _torch() / "lib"
    if not sys.platform.startswith("linux"):
        return f"the stand-in for a CUDA device is built on Linux only, not on {sys.platform}"
    if any((libraries / f"libtorch_{kind}.so").exists() for kind in ("cuda", "hip")):
        return "this torch is a CUDA build, which has a device guard of its own; tests/gpu are for it"
    if shutil.which("g++") is None:
        return "no g++, which builds the stand-in for a CUDA device (apt-get install g++)"
    return None


def load() -> None:
    """Build the guard if it is not there yet (four seconds), load it, and let torch.cuda know of its devices."""
    global loaded
    if "torch" in sys.modules:
        raise pytest.UsageError("tests.fake_gpu.stand_in must be loaded before torch: give it with -p")
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch() / "lib" / name), ctypes.RTLD_GLOBAL)
    guard = ctypes.CDLL(str(_built()), ctypes.RTLD_GLOBAL)
    _patch_torch(guard.stand_in_current_device, guard.stand_in_exchange_device)
    loaded = True


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    if problem() is None:
        load()


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _built() -> Path:
    root = _torch()
    key = hashlib.sha256(SOURCE.read_bytes() + (root / "version.py").read_bytes()).hexdigest()[:16]
    target = BUILD / f"guard-{key}.so"
    if target.exists():
        return target
    try:
        BUILD.mkdir(exist_ok=True)
        folder = tempfile.mkdtemp(dir=BUILD)
    except OSError:  # a checkout that cannot be written to
        folder = tempfile.mkdtemp()
        target = Path(folder) / target.name
    made = Path(folder) / "guard.so"
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root / 'lib'}"]
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", *includes, str(SOURCE), *libraries, "-o", str(made)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise pytest.UsageError(f"tests/fake_gpu/guard.cpp does not compile:\n{' '.join(command)}\n{result.stderr}")
    os.replace(made, target)  # another process may have built it too
    if target.parent == BUILD:
        os.rmdir(folder)
    return target


def _patch_torch(current_device: Any, exchange_device: Any) -> None:
    """What Python asks of torch.cuda. `torch.cuda.is_available()` stays False: nothing can be allocated."""
    import torch
    import torch.cuda.amp.common

    cuda: Any = torch.cuda
    cuda.current_device = lambda: current_device()
    cuda._exchange_device = cuda._maybe_exchange_device = lambda index: exchange_device(index)
    cuda.set_device = lambda device: exchange_device(torch.device(device).index if isinstance(device, str) else device)
    cuda.get_device_capability = lambda device=None: CAPABILITY
    cuda.get_device_properties = lambda device=None: SimpleNamespace(**PROPERTIES)
    cuda.is_bf16_supported = lambda *args, **kwargs: True
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.backends.cuda.is_flash_attention_available = lambda: True
