"""A head whose vocabulary is split over ranks computes what the whole head does: cases in `vocab_parallel_ranks`.

All cases of a number of ranks run in one launch; each is a test here.
"""

import pytest

from tests.conftest import needs_triton

from .vocab_parallel_ranks import CASES, launch

pytestmark = needs_triton


@pytest.fixture(scope="module", params=[2, 4])
def outcome(request, tmp_path_factory):
    n_ranks = request.param
    return n_ranks, launch(n_ranks, str(tmp_path_factory.mktemp("ranks") / "store"))


@pytest.mark.parametrize("name", CASES)
def test_on_every_rank(outcome, name):
    n_ranks, errors = outcome
    assert errors.get(name, []) == [""] * n_ranks, "\n".join(errors.get(name, ["did not run"]))
