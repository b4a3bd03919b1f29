"""Objective: a value with checked numbers."""

import dataclasses
import inspect
import math

import pytest

from perpo_kernels import objectives
from perpo_kernels.objectives import Objective


def test_the_defaults_are_the_published_ones():
    assert Objective() == Objective(beta=0.1, gamma=0.5) == objectives.perpo()


def test_uniform_pairs_are_the_pairs_of_perpo_without_weights():
    assert objectives.uniform_pairs(0.3) == Objective(0.3, weight="uniform")


PRESETS = [
    name
    for name, fn in inspect.getmembers(objectives, inspect.isfunction)
    if fn.__module__ == objectives.__name__ and not name.startswith("_")
]


@pytest.mark.parametrize("name", PRESETS)
def test_an_objective_is_its_numbers_and_back(name):
    for objective in (getattr(objectives, name)(), getattr(objectives, name)(2)):
        numbers = objective.numbers()
        assert all(type(x) is float for x in numbers)
        assert Objective.from_numbers(numbers) == objective


def test_an_objective_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Objective().beta = 1.0
    assert len({Objective(), Objective(), Objective(0.2)}) == 2


@pytest.mark.parametrize("beta", [0, -0.1])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match="beta must be a finite number > 0, got"):
        Objective(beta=beta)


@pytest.mark.parametrize("name", ["pair_scale", "list_scale", "pointwise_scale"])
@pytest.mark.parametrize("value", [0, -1.0])
def test_a_term_that_is_there_has_a_weight(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite number > 0, got {value}"):
        Objective(**{name: value})


@pytest.mark.parametrize("name", ["gamma", "target_temperature", "nll", "clip_low", "clip_high"])
def test_what_must_not_be_negative(name):
    with pytest.raises(ValueError, match=f"{name} must be a finite number >= 0, got -0.5"):
        Objective(**{name: -0.5})


NUMBERS = (
    "beta", "gamma", "target_temperature", "nll", "soft_target", "offset", "log_margin", "pair_scale", "list_scale",
    "pointwise_scale", "clip_low", "clip_high",
)  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_number_must_be_finite(name, value):
    with pytest.raises(ValueError, match=f"{name} must be finite, got"):
        Objective(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [None, "1", True])
def test_a_number_must_be_one(name, value):
    with pytest.raises(TypeError, match=f"{name} must be a number, got {type(value).__name__}"):
        Objective(**{name: value})
