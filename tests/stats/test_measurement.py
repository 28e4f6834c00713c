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
        ({"example_ids": ["x", None]}, r"example_ids\[1\] is None: every example needs one"),
        ({"example_ids": "xy"}, "example_ids must be a list, got 'xy'"),
        ({"clusters": ["d", float("nan")]}, r"clusters\[1\] is nan"),
        ({"metrics": {"em": np.ma.array([1, 0], mask=[0, 1])}}, "metrics.em has 1 masked entries"),
        ({"metrics": {"em": [1, 1j]}}, "metrics.em must be numbers, got complex"),
        ({"metrics": {"em": ["1", "0"]}}, "metrics.em must be numbers, got str"),
        ({"slices": {"A": ["0", "1"]}}, "slices.A must be numbers"),
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


@pytest.mark.parametrize(
    ("metric", "scores", "message"),
    [
        ("em", [1, 100], "em of 'y' is 100; em lies in 0 to 1 .* in percent[?] Divide by 100"),
        ("f1", [0.5, 37.5], "f1 of 'y' is 37.5; f1 lies in 0 to 1 .* in percent"),
        ("validity", [0, -1], "validity of 'y' is -1; validity lies in 0 to 1"),
        ("chrf", [101, 3], "chrf of 'x' is 101; chrf lies in 0 to 100"),
        ("bleu", [[1, 2], [3, -4]], "bleu of 'y' is -4; bleu lies in 0 to 100"),
        ("rouge", [0.5, 50], "rouge of 'y' is 50; rouge lies in -2 to 2 .* 'rouge:higher:1'"),
    ],
)
def test_a_score_outside_its_range_is_refused_with_the_example(metric, scores, message):
    with pytest.raises(DataError, match=f"a: metrics.{message}"):
        Measurement("a", {metric: scores}, ["x", "y"], declared={"rouge": Metric(True, 100.0)})


def test_the_last_digit_of_a_float32_mean_is_no_reason_to_refuse():
    Measurement("a", {"em": [np.nextafter(np.float32(1), 2), -1e-9]}, ["x", "y"])


def test_what_is_not_finite_is_left_to_the_judge():
    m = Measurement("a", {"em": [np.nan, np.inf]}, ["x", "y"])
    assert not np.isfinite(m.metrics["em"]).any()


def test_ids_are_the_same_as_numbers_and_as_text():
    m = Measurement("a", {"em": [1, 0, 0]}, [1, 2.0, "3"], clusters=[1.0, "1", 2])
    assert (m.example_ids, m.clusters) == (("1", "2", "3"), ("1", "1", "2"))


def test_examples_are_found_by_id_whatever_their_order():
    m = Measurement("a", {"em": [1, 0, 0]}, ["x", "y", "z"])
    assert m.aligned_to(["z", "x", "y"]).tolist() == [2, 0, 1]


def test_other_examples_are_named_on_both_sides():
    m = Measurement("a", {"em": [1, 0, 0]}, ["x", "y", "z"])
    message = r"a was not measured on the same examples: it has 3, 1 of 3 are missing \(first: 'w'\), 1 are in it alone \(first: 'z'\). Ids must be written alike"
    with pytest.raises(DataError, match=message):
        m.aligned_to(["x", "y", "w"])
    with pytest.raises(
        DataError, match="same examples: it has 3, 0 of 2 are missing, 1 are in it alone"
    ):
        m.aligned_to(["x", "y"])
