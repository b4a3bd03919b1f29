"""Tests that say something only on a GPU: real shapes, no host synchronisation, CUDA graphs, memory. Skipped
elsewhere."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _give_memory_back():
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def need_memory():
    """need_memory(gigabytes): skip where the device has less free."""

    def need(gigabytes: float) -> None:
        if torch.cuda.is_available():
            free, _ = torch.cuda.mem_get_info()
            if free < gigabytes * 2**30:
                pytest.skip(f"needs {gigabytes} GiB of device memory, {free / 2**30:.1f} are free")

    return need
