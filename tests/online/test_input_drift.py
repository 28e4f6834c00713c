import numpy as np
import pytest

from bem.errors import DataError
from bem.online import InputDrift


def looks(watch, rows):
    return [look for row in rows if (look := watch.update(row)) is not None]


def embeddings(n, seed=0, shift=0.0, scale=1.0, width=16):
    x = np.random.default_rng(seed).normal(0, scale, (n, width))
    x[:, 0] += shift
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_looks_come_when_a_window_is_full():
    watch = InputDrift(300, 100)
    assert [look.event for look in looks(watch, embeddings(620))] == [400, 500, 600]


def test_what_stays_the_same_is_not_reported_and_its_p_values_are_uniform():
    """60 looks from six streams; a mean below .5 by .15 would be 4 standard errors."""
    found = [x for s in range(6) for x in looks(InputDrift(300, 100, seed=s), embeddings(1300, s))]
    assert not any(look.drifted for look in found)
    assert np.mean([look.p_value for look in found]) == pytest.approx(0.5, abs=0.15)


def test_other_requests_are_reported_though_their_mean_is_the_same():
    """Half of them move one way, half the other: only a test of distributions sees it."""
    watch = InputDrift(500, 200)
    assert not looks(watch, embeddings(700))[0].drifted
    other = np.concatenate([embeddings(100, 1, 4.0), embeddings(100, 2, -4.0)])
    look = looks(watch, np.random.default_rng(3).permutation(other))[0]
    assert look.drifted and look.p_value <= watch.level


def test_a_conversation_is_not_drift():
    """Ten neighbours are alike, as turns are: permuting single requests would report nearly always."""
    topics = np.repeat(embeddings(150, 4), 10, axis=0)
    x = topics + np.random.default_rng(5).normal(0, 0.05, topics.shape)
    assert not any(look.drifted for look in looks(InputDrift(500, 200), x))


@pytest.mark.parametrize("killed", [120, 300, 371])
def test_restored_it_goes_on_as_if_nothing_had_been(killed):
    x = embeddings(700)
    whole, first = InputDrift(300, 100, seed=7), InputDrift(300, 100, seed=7)
    before = looks(first, x[:killed])
    second = InputDrift.from_json(first.to_json())
    assert before + looks(second, x[killed:]) == looks(whole, x)
    assert second.to_json() == whole.to_json()


def test_what_is_no_embedding_is_refused():
    watch = InputDrift()
    watch.update(np.zeros(3))
    for wrong in (np.zeros(4), np.array([1.0, np.nan, 0.0]), np.zeros((1, 3))):
        with pytest.raises(ValueError, match="must be finite numbers of shape"):
            watch.update(wrong)
    assert watch.events == 1


@pytest.mark.parametrize(
    "settings", [{"recent": 205}, {"recent": 30}, {"sensitivity": 0.0}, {"window_size": 100}]
)
def test_settings_that_cannot_be_honoured_are_errors(settings):
    with pytest.raises(ValueError):
        InputDrift(**settings)


def test_a_damaged_state_is_refused():
    with pytest.raises(DataError, match="no state of an input drift watch"):
        InputDrift.from_json("{}")
