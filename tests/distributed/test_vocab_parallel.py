"""A head whose vocabulary is split over ranks computes what the whole head does: cases in `vocab_parallel_ranks`.

All cases of a number of ranks run in one launch; each is a test here.
"""

import functools

import pytest

from tests.conftest import needs_triton

from .vocab_parallel_ranks import launch, names

pytestmark = needs_triton


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Of all cases on so many ranks."""
    return functools.cache(lambda n_ranks: launch(n_ranks, str(tmp_path_factory.mktemp("ranks") / "store")))


@pytest.mark.parametrize(("n_ranks", "name"), [(n, name) for n in (2, 4) for name in names(n)])
def test_on_every_rank(outcome, n_ranks, name):
    errors = outcome(n_ranks).get(name, ["it did not run"])
    assert errors == [""] * n_ranks, "\n".join(errors)
