"""What a report says first: what was compared, on what, and what was trained otherwise."""

import numpy as np

from bem.config import ExperimentConfig
from bem.report.sections.setting import lead
from bem.stats.measurement import Measurement


def said(arm=None, routing=None, **more):
    config = ExperimentConfig.model_validate(
        {
            "name": "mine",
            "data": {"tasks": ["forms"]},
            "arms": [
                {"name": "s0", "role": "baseline"},
                {"name": "v1", "adapters": {"variant": "v1"}, "training": arm or {}},
                *more.get("arms", []),
            ],
            "training": {"steps": 7},
            "routing": routing,
        }
    )
    return lead(config, Measurement("s0", {"em": np.zeros(4)}, list("abcd")))


def test_arms_trained_otherwise_are_named_with_both_values():
    assert said().endswith("7 training steps each.")
    assert said({"steps": 7}).endswith("7 training steps each.")  # the same in other words
    assert said({"steps": 9, "learning_rate": "1e-4"}).endswith(
        "7 training steps each. Trained otherwise: v1 (steps 9 instead of 7, learning_rate 0.0001 instead of 0.003)."
    )


def test_settings_of_the_experts_are_named():
    routing = {"experts": {"a": ["forms/json"], "b": ["forms/name"]}, "training": {"batch_size": 3}}
    routed = [{"name": "ar0", "route": "ar0"}]
    assert said(routing=routing, arms=routed).endswith(
        "Trained otherwise: the experts (batch_size 3 instead of 16)."
    )
