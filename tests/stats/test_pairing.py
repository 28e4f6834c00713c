import numpy as np
import pytest

from bem.errors import DataError
from bem.stats.measurement import Measurement
from bem.stats.pairing import with_shared_groups
from bem.stats.scores import Metric

IDS = ["a", "b", "c", "d"]


def arm(name, em=(1, 0, 1, 0), ids=IDS, **more):
    return Measurement(name, {"em": em}, ids, **more)


@pytest.mark.parametrize("holder", ["baseline", "candidate"])
def test_clusters_and_slices_of_one_file_hold_for_both_whatever_the_order_of_the_rows(holder):
    groups = {"clusters": ["x", "x", "y", "y"], "slices": {"hard": [1, 0, 0, 1]}}
    back = {"clusters": ["y", "y", "x", "x"], "slices": {"hard": [1, 0, 0, 1]}}
    baseline = arm("base", **(groups if holder == "baseline" else {}))
    turned = back if holder == "candidate" else {}
    candidate = arm("new", ids=IDS[::-1], **turned)
    shared = with_shared_groups(baseline, {"new": candidate})
    assert shared.clusters == ("x", "x", "y", "y")
    assert shared.slices["hard"].tolist() == [True, False, False, True]
    assert shared.metrics["em"] is not None and shared.name == "base"


def test_labels_may_differ_where_the_documents_are_the_same():
    baseline, candidate = arm("base", clusters=[1, 1, 2, 2]), arm("new", clusters=list("ppqq"))
    assert with_shared_groups(baseline, {"new": candidate}) is baseline


@pytest.mark.parametrize("theirs", ["xxxy", "xyyy", "xyzz", "xyzu"])
def test_other_clusters_are_refused_with_two_examples(theirs):
    baseline, candidate = arm("base", clusters=list("xxyy")), arm("new", clusters=list(theirs))
    with pytest.raises(
        DataError,
        match=r"new has other clusters than the baseline base .*: '.' and '.' share one only (there|here)",
    ):
        with_shared_groups(baseline, {"new": candidate})


def test_two_candidates_must_agree_even_if_the_baseline_is_silent():
    sides = {"one": arm("one", clusters=list("xxyy")), "two": arm("two", clusters=list("xyxy"))}
    with pytest.raises(DataError, match="other clusters"):
        with_shared_groups(arm("base"), sides)


def test_a_slice_with_other_members_is_refused_with_the_example():
    baseline = arm("base", slices={"hard": [1, 0, 0, 0]})
    candidate = arm("new", slices={"hard": [1, 0, 1, 0]})
    with pytest.raises(DataError, match="disagree whether 'c' is in slice 'hard'"):
        with_shared_groups(baseline, {"new": candidate})


def test_an_arm_on_other_examples_is_left_to_the_judge():
    other = arm("new", ids=list("abcz"), clusters=list("xxyy"))
    assert with_shared_groups(arm("base"), {"new": other}).clusters is None


def test_a_metric_that_is_better_the_other_way_round_is_refused():
    make = lambda name, way: Measurement(  # noqa: E731
        name, {"acc2": [1, 0]}, ["a", "b"], declared={"acc2": Metric(way, None)}
    )
    with pytest.raises(DataError, match=r"acc2 means something else in new .lower is better"):
        with_shared_groups(make("base", True), {"new": make("new", False)})


@pytest.mark.parametrize("metric", ["reward", "chrf"])
def test_shares_beside_percent_are_refused_where_the_range_cannot_tell(metric):
    rng = np.random.default_rng(0)
    shares, ids = rng.random(50), [str(i) for i in range(50)]
    declared = {"reward": Metric(True, None)} if metric == "reward" else {}
    make = lambda name, values: Measurement(name, {metric: values}, ids, declared=declared)  # noqa: E731
    for one, other in ((shares, 100 * shares), (100 * shares, shares)):
        with pytest.raises(
            DataError, match=f"{metric} is at most .* in the baseline base and .* in new: is one"
        ):
            with_shared_groups(make("base", one), {"new": make("new", other)})
    better = np.minimum(shares * 1.5, 1)
    with_shared_groups(make("base", shares), {"new": make("new", better)})
    with_shared_groups(make("base", np.zeros(50)), {"new": make("new", 100 * shares)})


def test_two_files_of_one_name_can_be_compared():
    assert with_shared_groups(arm("scores"), {"scores": arm("scores")}).n == 4


def test_a_loss_that_explodes_is_no_percent():
    loss = np.full(4, 0.9)
    make = lambda name, values: Measurement(name, {"loss": values}, IDS)  # noqa: E731
    with_shared_groups(make("base", loss), {"new": make("new", 90 * loss)})
