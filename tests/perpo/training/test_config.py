"""The objective of a run: what the settings say together, what does not fit together, and what is written down."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from perpo_kernels import objectives
from perpo_kernels.objectives import Objective

from ..tiny_runs import config


@pytest.mark.parametrize("name", objectives.PRESETS)
def test_a_preset_keeps_its_published_numbers(name: str, tmp_path: Path) -> None:
    assert config(tmp_path, objective=name).list_objective == getattr(objectives, name)()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, objectives.perpo()),
        ({"objective": None}, objectives.perpo()),
        ({"beta": 0.3, "gamma": 0.0}, objectives.perpo(0.3, 0.0)),
        ({"objective": "lipo", "beta": 0.3}, objectives.lipo(0.3)),
        ({"objective": "cdpo", "objective_options": {"epsilon": 0.2}}, objectives.cdpo(epsilon=0.2)),
        ({"objective": "cdpo", "objective_options": '{"epsilon": 0.2}'}, objectives.cdpo(epsilon=0.2)),
        ({"objective": "rpo", "objective_options": "eta: 5e-3", "beta": 1}, objectives.rpo(1, 0.005)),
        ({"objective": Objective(0.2, link="hinge")}, Objective(0.2, link="hinge")),
        ({"objective": {"beta": 0.2, "link": "hinge"}}, Objective(0.2, link="hinge")),
    ],
)
def test_settings_say_which_objective(settings: dict[str, Any], expected: Objective, tmp_path: Path) -> None:
    assert config(tmp_path, **settings).list_objective == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "tis_dpo"}, "objective must be one of perpo, .*; got 'tis_dpo'"),
        ({"objective": "dpo", "gamma": 0.5}, "gamma: objective='dpo' does not take it; it takes beta"),
        (
            {"objective": "dpo", "objective_options": {"epsilon": 1}},
            "epsilon: objective='dpo' does not take it; it takes beta",
        ),
        ({"beta": 0.1, "objective_options": {"beta": 0.2}}, "beta is given twice"),
        ({"objective_options": "[1]"}, "objective_options must be a mapping"),
        ({"objective_options": "{"}, "objective_options must be a JSON or YAML mapping"),
        ({"objective": Objective(), "beta": 0.2}, "beta: objective is not the name of a preset but an Objective"),
        ({"objective": {"bta": 0.2}}, "objective: bta is no field of Objective"),
        ({"objective": "cdpo", "objective_options": {"epsilon": 0.7}}, r"epsilon must lie in \[0, 0.5\)"),
        ({"objective": "simpo", "reference": "adapter_off"}, "objective='simpo' is defined without a reference model"),
        ({"objective": "mdpo", "reference": "data"}, "reference='data': objective='mdpo' also needs"),
        ({"objective": "mdpo", "image_corruption": "blur"}, "image_corruption must be one of crop, blank, noise"),
        ({"objective": "dpo", "image_corruption": "crop"}, "objective='dpo' does not use it; set objective='mdpo'"),
        ({"reference": "nothing"}, "reference must be one of precomputed"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_an_objective_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="objective must be the name of a preset or an Objective, got int"):
        config(tmp_path, objective=3)
    with pytest.raises(TypeError, match="epsilon must be a number"):
        config(tmp_path, objective="cdpo", objective_options={"epsilon": "a lot"})


def test_the_reference_is_chosen_by_the_objective_unless_it_is_set(tmp_path: Path) -> None:
    assert config(tmp_path).reference == "precomputed"
    assert config(tmp_path, reference="none").reference == "none"
    assert config(tmp_path, objective="simpo").reference == "none"
    assert config(tmp_path, objective="simpo", reference="none").reference == "none"


def test_an_objective_made_in_python_survives_being_written(tmp_path: Path) -> None:
    made = config(tmp_path, objective=Objective(0.2, list_term="softmax", nll=0.5))
    written = json.loads(made.to_json_string())
    assert config(tmp_path, objective=written["objective"]).list_objective == made.list_objective
    assert pickle.loads(pickle.dumps(made)).list_objective == made.list_objective
    assert "softmax" in made.to_sanitized_dict()["objective"]
