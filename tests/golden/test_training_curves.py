"""Ten steps of training give the losses that are kept in the tree, on packed rows and on separate ones."""

import pytest

from tests.golden import training_curves
from tests.golden.training_curves import HEADS, OBJECTIVES, TOLERANCE, curve, deviation, kept, names


@pytest.mark.parametrize("name", list(names()), ids="-".join)
def test_training_reproduces_the_kept_losses(name: tuple[str, str, str]) -> None:
    if reason := training_curves.other_versions():
        pytest.skip(f"{reason}; what is compared on every version is packed with separate rows")
    losses, expected = curve(*name), kept()["curves"]["/".join(name)]
    assert deviation(losses, expected) <= TOLERANCE, (
        f"losses {list(losses)}, kept {expected}, written with {kept()['versions']}. If the change is meant to change "
        "them, renew the file with `python -m tests.golden.training_curves --write` and say why in the commit"
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("head", HEADS)
def test_packed_rows_train_as_separate_rows(head: str, objective: str) -> None:
    assert deviation(curve(head, objective, "shared"), curve(head, objective, "separate")) <= TOLERANCE


def test_the_file_holds_the_curves_of_all_runs_and_no_others() -> None:
    curves = kept()["curves"]
    assert list(curves) == ["/".join(name) for name in names()]
    assert all(len(losses) == 10 for losses in curves.values())
    assert len({tuple(losses) for losses in curves.values()}) >= len(HEADS) * len(OBJECTIVES)  # no run stands for two
