"""One section per kind of adapter; a knob of another kind is an error that says whose it is."""

import copy
import pickle

import pytest
from pydantic import ValidationError

from bem.config import KINDS, VARIANTS, AdapterConfig, ExperimentConfig, parse_adapter
from bem.config.adapters import RankMaskConfig, StaticConfig
from bem.errors import ConfigError

ARMS = [{"name": "s0", "role": "baseline"}, {"name": "v1", "adapters": {"variant": "v1"}}]


def experiment(adapters, arms=ARMS):
    values = {"name": "x", "data": {"tasks": ["forms"]}, "adapters": adapters, "arms": arms}
    return ExperimentConfig.model_validate(values)


def test_a_config_is_of_the_section_of_its_kind():
    config = AdapterConfig(variant="v1", rank=3, mask="random")
    assert type(config) is RankMaskConfig and config.mask == "random"
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(other) is RankMaskConfig and other == config
    assert parse_adapter({}, "here") == StaticConfig()


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_section_names_its_kind_and_documents_every_knob(kind):
    section = KINDS[kind]
    assert section().variant == kind
    undocumented = [n for n, f in section.model_fields.items() if not f.description]
    assert undocumented in ([], ["variant"])
    assert set(section.acting) <= section.model_fields.keys()


@pytest.mark.parametrize(
    ("kind", "knob", "owners"),
    [
        ("s0", "mask", "v1"),
        ("pt1", "spectral_cap", "v3"),
        ("v4", "d_control", "pt1, v1, v2"),
        ("v3", "trust_radius", "s0, pt1, v1, v2"),
    ],
)
def test_a_knob_of_another_kind_says_whose_it_is(kind, knob, owners):
    with pytest.raises(ConfigError, match=f"here: '{knob}' is a knob of {owners}, not of {kind}"):
        parse_adapter({"variant": kind, knob: 1}, "here")


def test_an_unknown_kind_and_an_unknown_knob_name_what_there_is():
    with pytest.raises(ConfigError, match=r"here\.variant: unknown variant 'v9': use one of s0"):
        parse_adapter({"variant": "v9"}, "here")
    with pytest.raises(ConfigError, match=r"unknown key 'rnak'\. Did you mean 'rank'"):
        parse_adapter({"rnak": 3}, "here")


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError):
        StaticConfig().rank = 3  # type: ignore[misc]


def test_shared_knobs_go_to_the_arms_that_have_them():
    config = experiment({"rank": 3, "k_active": 2, "alpha": 5.0})
    s0, v1 = (config.adapter_of(arm) for arm in config.arms)
    assert s0 == StaticConfig(rank=3, alpha=5.0)
    assert v1 == RankMaskConfig(rank=3, alpha=5.0, k_active=2)


@pytest.mark.parametrize(
    ("adapters", "arms", "reason"),
    [
        ({"film_range": "wide"}, ARMS, "'film_range' is a knob of no arm's variant"),
        ({"variant": "v9"}, [{**ARMS[1], "role": "baseline"}], r"adapters\.variant: unknown"),
        ({"rnak": 3}, ARMS, "Did you mean 'rank'"),
        ({}, [ARMS[0], {"name": "b", "adapters": {"mask": "fixed"}}], "arms.b.adapters: 'mask'"),
        ({}, [ARMS[0], {"name": "b", "adapters": {"variant": 3}}], "unknown variant 3"),
    ],
)
def test_a_knob_that_no_arm_uses_is_an_error(adapters, arms, reason):
    with pytest.raises(ConfigError, match=reason):
        experiment(adapters, arms)
