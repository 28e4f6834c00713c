"""Whatever the OpenAPI document allows, and what it does not: no request makes the server fail."""

import contextlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

from tests.serving.running import add_router, served

schemathesis = pytest.importorskip("schemathesis")

EXAMPLES = 25
"""Of each operation."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("openapi")
    add_router(home / "store", home / "work")
    limits = {"max_choices": 2, "max_new_tokens": 4, "timeout_s": 0.5, "slots": 8}
    with served(home / "store", feedback=str(home / "feedback.db"), **limits) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_request_makes_the_server_fail(server, mode):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    generation = getattr(schemathesis.GenerationMode, mode.upper())
    answered = set()
    for found in schema.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy(generation_mode=generation))
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        def ask(case):
            status = case.call().status_code
            answered.add(status)
            assert status < 500, (case.method, case.path, case.body, status)

        with contextlib.suppress(Unsatisfiable):  # what takes nothing has no wrong form
            ask()
    assert answered & {400, 404} if mode == "negative" else 200 in answered
    assert server.serving.driver.alive
