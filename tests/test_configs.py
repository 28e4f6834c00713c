"""Every shipped config can be loaded, names tasks that exist, and says nothing twice."""

from pathlib import Path

import pytest
import yaml

from bem.config import load
from bem.tasks.load import TASKS

SHIPPED = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_holds(path):
    config = load(path)
    assert config.name == path.stem
    assert {task if isinstance(task, str) else task.name for task in config.data.tasks} <= set(
        TASKS
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_says_nothing_twice(path):
    def keys(node):
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value]
            assert len(set(names)) == len(names), names
            for _, value in node.value:
                keys(value)
        elif isinstance(node, yaml.SequenceNode):
            for value in node.value:
                keys(value)

    keys(yaml.compose(path.read_text(encoding="utf-8")))


def test_there_are_shipped_configs():
    assert {"quickstart", "public"} <= {path.stem for path in SHIPPED}
