"""A stage is made once for one key, after the stage that it comes from."""

import pytest

from bem.config import RoutingConfig
from bem.experiments.inputs import RunInputs
from bem.experiments.routing.stages import RoutingArtifacts
from bem.runs.folder import RunFolder
from tests.experiments.test_run import make_config


@pytest.fixture
def artifacts(tmp_path) -> RoutingArtifacts:
    config = make_config(tmp_path, tmp_path, routing=RoutingConfig())
    folder = RunFolder(tmp_path / "run")
    inputs = RunInputs(config, folder, [], [], None, None, "cpu", {"train": "d"}, "b")
    return RoutingArtifacts(inputs, 0, lambda *told: None)


def maker(made):
    def make(folder, *sources):
        made.append((folder.name, *(source.name for source in sources)))
        folder.mkdir(parents=True)

    return make


def test_a_stage_is_made_once_and_again_for_another_key(artifacts):
    made = []
    for key in ("a", "a", "b", "b"):
        folder = artifacts._stage("ar0", key, maker(made))
    assert made == [("ar0",), ("ar0",)] and folder == artifacts.folder / "ar0"


def test_a_stage_s_source_is_made_first_and_left_alone_once_the_stage_is_there(artifacts):
    made = []
    experts = lambda: artifacts._stage("experts", "k", maker(made))  # noqa: E731
    artifacts._stage("ar0", "k", maker(made), experts)
    assert made == [("experts",), ("ar0", "experts")]
    (artifacts.folder / "experts").rmdir()
    artifacts._stage("ar0", "k", maker(made), experts)
    assert len(made) == 2


def test_a_stage_that_was_interrupted_is_made_again(artifacts):
    def killed(folder):
        folder.mkdir(parents=True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        artifacts._stage("experts", "k", killed)
    made = []
    artifacts._stage("experts", "k", maker(made))
    assert made == [("experts",)]


def test_the_key_of_a_stage_holds_what_it_and_its_sources_depend_on(artifacts):
    keys = [artifacts._key(stage) for stage in ("experts", "ar0", "ar1")]
    assert len(set(keys)) == 3
    changed = {"policy_gradient": {"iterations": 3}}
    inputs = artifacts.inputs
    config = inputs.config.model_copy(update={"routing": RoutingConfig(**changed)})
    other = RoutingArtifacts(RunInputs(**{**vars(inputs), "config": config}), 0, artifacts.say)
    assert [other._key(stage) for stage in ("experts", "ar0")] == keys[:2]
    assert other._key("ar1") != keys[2]
