import numpy as np
import pytest

from bem.errors import DataError
from bem.stats.measurement import Measurement
from bem.stats.scores import Metric


def test_one_seed_becomes_a_row():
    m = Measurement("a", {"em": [1, 0]}, ["x", "y"])
    assert m.metrics["em"].shape == (1, 2)
    assert m.n == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": {"em": [1, 0, 1]}}, r"metrics.em has shape \(1, 3\), expected \[seeds, 2\]"),
        ({"metrics": {"em": ["right", "wrong"]}}, "metrics.em must be numbers"),
        ({"metrics": {"quality": [1, 0]}}, "metrics.quality is unknown"),
        ({"metrics": {"corpus_bleu": [1, 0]}}, "corpus_bleu has no per-example scores"),
        ({"example_ids": []}, "example_ids is empty"),
        ({"example_ids": ["x", "x"]}, "'x' twice"),
        ({"clusters": ["d"]}, "clusters has 1 entries for 2"),
        ({"slices": {"A": [True]}}, "slices.A must be 2 booleans"),
        ({"slices": {"A": [0.5, 1]}}, "slices.A must be 2 booleans"),
        ({"corpus": {"corpus_bleu": np.zeros((2, 9))}}, r"expected \[seeds, 2, 10\]"),
        ({"corpus": {"rouge": np.zeros((2, 9))}}, "corpus.rouge is unknown"),
        ({"latency_ms": {"decode": [[1.0]]}}, "latency_ms.decode has shape"),
    ],
)
def test_a_wrong_shape_is_refused_with_its_field(changes, message):
    values = {"name": "a", "metrics": {"em": [1, 0]}, "example_ids": ["x", "y"]}
    with pytest.raises(DataError, match=message):
        Measurement(**{**values, **changes})


def test_an_unknown_metric_can_be_declared():
    m = Measurement("a", {"cost": [1.0]}, ["x"], declared={"cost": Metric(False, None)})
    assert m.metric("cost").sign == -1.0
    assert not m.metric("cost").core


def test_examples_are_found_by_id_whatever_their_order():
    m = Measurement("a", {"em": [1, 0, 0]}, ["x", "y", "z"])
    assert m.aligned_to(["z", "x", "y"]).tolist() == [2, 0, 1]
    with pytest.raises(DataError, match="same examples"):
        m.aligned_to(["x", "y", "w"])
    with pytest.raises(DataError, match="same examples"):
        m.aligned_to(["x", "y"])
