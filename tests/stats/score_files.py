"""Score files for the tests that read them."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from bem.errors import DataError
from bem.stats.files import load
from bem.stats.measurement import Measurement

IN_PLACE = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
"""For tests that write many files into one folder."""
TABLE = "id,group,em,f1\nq1,d1,1,0.5\nq2,d1,0,0.25\nq3,d2,1,1\n"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


def written(folder, content, name="scores.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def outcome(folder, content, name="scores.csv"):
    """The measurement, or the refusal; any other error is raised."""
    try:
        return load(written(folder, content, name))
    except DataError as refused:
        return refused


def names_the_file(result, name):
    return isinstance(result, Measurement) or name in str(result)


def refusal(folder, content, name="a.csv", **options):
    with pytest.raises(DataError) as refused:
        load(written(folder, content, name), **options)
    assert str(folder / name) in str(refused.value)
    return str(refused.value).replace(f"{folder}/", "")
