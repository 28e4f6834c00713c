"""The embedded suite is parsed once into a folder of the test run, not into the user's cache."""

import pytest

from bem.tasks.functions import functions


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        functions.cache_clear()
        yield
        functions.cache_clear()
