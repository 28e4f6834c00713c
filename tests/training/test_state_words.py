"""What is said when a state belongs to other settings."""

from pathlib import Path

import pytest

from bem.errors import TrainingError
from bem.training.state import check_same_run


def test_a_setting_that_an_older_version_did_not_have_is_said_to_be_unknown_to_it():
    now = {"training": {"steps": 2, "padding": 0.1}, "objective": None}
    with pytest.raises(TrainingError, match=r"training.padding was not known, is 0.1\. "):
        check_same_run(Path("a/state.pt"), {"training": {"steps": 2}}, now, "s0")
    check_same_run(Path("a/state.pt"), {"training": now["training"]}, now, "s0")
