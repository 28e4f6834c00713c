"""Every shipped config can be loaded and names tasks that exist."""

from pathlib import Path

import pytest

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


def test_there_are_shipped_configs():
    assert {"quickstart", "public"} <= {path.stem for path in SHIPPED}
