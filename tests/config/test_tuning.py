"""The same budget for every arm, on rows that nothing else uses."""

import pytest

from bem.config import ExperimentConfig, TuningConfig, parse
from bem.errors import ConfigError


def experiment(**changes):
    values = {
        "name": "t",
        "data": {"tasks": ["sig2json"], "validation_rows": 8},
        "arms": [{"name": "s0", "role": "baseline"}, {"name": "v1", "adapters": {"variant": "v1"}}],
        "training": {"steps": 100},
        "tuning": {"rates": [1e-3, 2e-3, 4e-3], "steps": 32},
        **changes,
    }
    return parse(ExperimentConfig, values, "t.yaml")


@pytest.mark.parametrize(
    ("rates", "rungs"),
    [(2, [32]), (3, [16, 32]), (4, [16, 32]), (5, [8, 16, 32]), (8, [8, 16, 32])],
)
def test_every_rung_halves_the_rates_until_one_is_left(rates, rungs):
    tuning = TuningConfig(rates=tuple(1e-3 * (i + 1) for i in range(rates)), steps=32)
    assert tuning.rungs == rungs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning": {"rates": [2e-3, 1e-3], "steps": 32}}, "increasing"),
        ({"tuning": {"rates": [1e-3, 2e-3, 3e-3, 4e-3, 5e-3], "steps": 3}}, "too few to be halved"),
        ({"tuning": {"rates": [1e-3, 2e-3], "steps": 101}}, "exceed the 100 of"),
        ({"data": {"tasks": ["sig2json"]}}, "set data.validation_rows"),
        ({"data": {"tasks": ["sig2json"]}, "tuning": None, "training": {"steps": 9, "patience": 2}},
         "training.patience needs rows"),
        ({"tuning": None}, "nothing is chosen"),
        ({"arms": [{"name": "s0", "role": "baseline", "training": {"learning_rate": 1e-3}}]},
         "has no effect beside `tuning`"),
        ({"arms": [{"name": "s0", "role": "baseline", "checkpoint": "somewhere"}]},
         "tuning has no effect: no adapter is trained"),
        ({"arms": [{"name": "experts", "role": "baseline"}, {"name": "ar1", "route": "ar1"}], "routing": {}},
         "arms.experts: .* Give the arm another one"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        experiment(**changes)


def test_an_arm_may_have_more_steps_than_the_others():
    arms = [{"name": "s0", "role": "baseline", "training": {"steps": 300}}]
    config = experiment(arms=arms)
    assert config.training_of(config.baseline).steps == 300


def test_xloras_classifier_may_be_stopped_early_too():
    routing = {"experts": {"json": ["sig2json"]}, "checkpoint": "somewhere"}
    arms = [
        {"name": "s0", "role": "baseline", "checkpoint": "somewhere"},
        {"name": "xlora", "route": "xlora", "role": "control"},
    ]
    training = {"steps": 10, "patience": 1}
    config = experiment(tuning=None, routing=routing, arms=arms, training=training)
    assert config.data.validation_rows == 8
    with pytest.raises(ConfigError, match="patience needs rows"):
        experiment(
            tuning=None, routing=routing, arms=arms, training=training, data={"tasks": ["sig2json"]}
        )
