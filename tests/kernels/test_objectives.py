"""Objective: a value with checked numbers."""

import dataclasses
import math

import pytest

from perpo_kernels import objectives
from perpo_kernels.objectives import Objective


def test_the_defaults_are_the_published_ones():
    assert Objective() == Objective(beta=0.1, gamma=0.5) == objectives.perpo()


def test_uniform_pairs_is_gamma_zero():
    assert objectives.uniform_pairs(0.3) == Objective(0.3, 0.0)


def test_an_objective_is_its_numbers_and_back():
    for objective in (Objective(0.3, 2), Objective(1, 0)):
        numbers = objective.numbers()
        assert all(type(x) is float for x in numbers)
        assert Objective(*numbers) == objective


def test_an_objective_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Objective().beta = 1.0
    assert len({Objective(), Objective(), Objective(0.2)}) == 2


@pytest.mark.parametrize("beta", [0, -0.1, math.inf, math.nan])
def test_beta_must_be_positive_and_finite(beta):
    with pytest.raises(ValueError, match="beta must be a finite number > 0, got"):
        Objective(beta=beta)


@pytest.mark.parametrize("gamma", [-0.5, math.inf, math.nan])
def test_gamma_must_not_be_negative(gamma):
    with pytest.raises(ValueError, match="gamma must be a finite number >= 0, got"):
        Objective(gamma=gamma)
