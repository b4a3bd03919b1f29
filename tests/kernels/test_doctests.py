"""The examples in the docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import perpo_kernels

MODULES = ["perpo_kernels"] + [
    info.name
    for info in pkgutil.walk_packages(perpo_kernels.__path__, "perpo_kernels.")
    if not info.name.startswith("perpo_kernels.backends.triton")  # kernels: no examples, and an import of triton
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_there_are_examples():
    modules = [importlib.import_module(name) for name in MODULES]
    assert sum(len(t.examples) for m in modules for t in doctest.DocTestFinder().find(m)) > 0
