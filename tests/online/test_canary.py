import json

import numpy as np
import pytest

from bem.errors import DataError
from bem.online import Canary, Margins
from bem.stats.verdict import Verdict


def feed(canary, shift, n, seed=0, metrics=("em",)):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        old = {
            m: float(x) for m, x in zip(metrics, rng.uniform(0.3, 0.7, len(metrics)), strict=True)
        }
        new = {m: float(np.clip(x + shift[m] + rng.normal(0, 0.1), 0, 1)) for m, x in old.items()}
        canary.paired(old, new)
    return canary.status()


def test_no_data_is_hold():
    status = Canary({"em": Margins()}).status()
    assert (status.decision, status.reason) == ("HOLD", "no data yet")
    assert status.metrics[0].difference is None


@pytest.mark.parametrize(("shift", "decision"), [(0.05, "PROMOTE"), (-0.1, "ROLLBACK")])
def test_what_is_better_is_promoted_and_what_is_worse_rolled_back(shift, decision):
    canary = Canary({"em": Margins()})
    status = feed(canary, {"em": shift}, 600)
    assert status.decision == decision
    assert status.metrics[0].n < 600  # the first decision stands: what comes later changes nothing
    assert feed(canary, {"em": -shift}, 300, seed=1).decision == decision


def test_every_metric_must_be_shown_not_to_be_worse():
    canary = Canary({"em": Margins(), "format": Margins()})
    status = feed(canary, {"em": 0.1, "format": -0.02}, 400, metrics=("em", "format"))
    assert status.decision == "HOLD" and "format" in status.reason
    assert status.metrics[0].e_not_worse > 20 > status.metrics[1].e_not_worse


def test_one_metric_that_is_worse_rolls_back():
    canary = Canary({"em": Margins(), "format": Margins()})
    status = feed(canary, {"em": 0.01, "format": -0.12}, 600, metrics=("em", "format"))
    assert status.decision == "ROLLBACK" and status.reason.startswith("format")


def test_an_example_of_one_metric_is_evidence_on_that_one_alone():
    canary = Canary({"em": Margins(0.1, 0.1), "format": Margins(0.1, 0.1)})
    for _ in range(60):  # (1 + .9 .1 / .9)^60 = 304; the mean with seven smaller bets is above 20
        canary.paired({"em": 0.5}, {"em": 0.5}, only=("em",))
    assert canary.shown("em") and not canary.shown("format")
    assert (canary.bets_on("em"), canary.bets_on("format")) == (60, 0)
    assert canary.status().decision == "HOLD" and "format" in canary.reason
    for _ in range(60):
        canary.paired({"format": 0.5}, {"format": 0.5}, only=("format",))
    assert canary.decision == "PROMOTE"
    lacking = Canary({"em": Margins(), "format": Margins()})
    assert lacking.paired({"em": 0.5}, {}, only=("em",)).decision == "ROLLBACK"


def failing():
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        ({"em": float("nan")}, "em is nan"),
        ({"em": float("inf")}, "em is inf"),
        ({"em": 1.5}, "em is 1.5"),
        ({}, "em is None"),
        (failing, "RuntimeError: out of memory"),
        (lambda: {"em": float("nan")}, "em is nan"),
    ],
)
@pytest.mark.parametrize("share", [None, 0.5])
def test_a_candidate_that_fails_is_rolled_back_at_once(candidate, words, share):
    canary = Canary({"em": Margins()}, share=share)
    if share is None:
        status = canary.paired({"em": 0.5}, candidate)
    else:
        status = canary.answered(True, candidate)
    assert status.decision == "ROLLBACK" and words in status.reason


def test_a_baseline_that_fails_says_nothing_about_the_candidate():
    canary = Canary({"em": Margins()})
    with pytest.raises(ValueError, match="baseline: em is nan"):
        canary.paired({"em": float("nan")}, {"em": 0.5})
    assert canary.status().decision == "HOLD" and canary.n == 0


def test_a_broken_invariant_is_a_rollback():
    assert (
        Canary({"em": Margins()}).broken("a safety direction was written to").decision == "ROLLBACK"
    )


def test_an_undecided_candidate_is_rolled_back_in_the_end():
    canary = Canary({"em": Margins()}, n_max=30)
    for i in range(30):
        status = canary.paired({"em": 0.5}, {"em": 0.5 + 0.1 * (-1) ** i})
        assert (status.decision == "HOLD") == (i < 29)
    assert status.reason == "undecided after 30 events"


@pytest.mark.parametrize("share", [None, 0.3])
@pytest.mark.parametrize("killed", [0, 1, 57])
def test_the_wealth_survives_a_restart(share, killed):
    rng = np.random.default_rng(0)
    whole = Canary({"em": Margins(0.05, 0.05)}, share=share)
    first = Canary.from_json(whole.to_json())
    for t in range(120):
        if t == killed:
            first = Canary.from_json(first.to_json())
        old, new = float(rng.random()), float(rng.random())
        for canary in (whole, first):
            if share is None:
                canary.paired({"em": old}, {"em": new})
            else:
                canary.answered(old < share, {"em": new})
    assert first.to_json() == whole.to_json()


def test_a_share_of_traffic_is_compared_without_pairs():
    rng = np.random.default_rng(0)
    canary = Canary({"score": Margins(0.05, 0.05)}, share=0.3)
    for _ in range(3000):
        mine = bool(rng.random() < 0.3)
        canary.answered(mine, {"score": float(rng.beta(4, 4) * (0.6 if mine else 1.0))})
    status = canary.status()
    assert status.decision == "ROLLBACK"
    assert status.metrics[0].difference == pytest.approx(-0.2, abs=0.1)


@pytest.mark.parametrize(
    ("n", "shift", "decision"),
    [(0, 0, "INCONCLUSIVE"), (600, 0.05, "PROMOTE"), (600, -0.1, "REJECT")],
)
def test_the_decision_is_also_the_verdict_that_promotes(n, shift, decision):
    canary = Canary({"em": Margins()})
    feed(canary, {"em": shift}, n)
    verdict = canary.verdict("v2", "v1")
    assert verdict.decision == decision and verdict.accepted == (decision == "PROMOTE")
    assert Verdict.from_json(verdict.to_json()) == verdict
    if n:
        assert verdict.check("regression.em").limit == -0.02


def test_margins_that_would_let_one_candidate_be_promoted_and_rolled_back_are_refused():
    with pytest.raises(ValueError, match="margin <= tolerance"):
        Margins(margin=0.05, tolerance=0.02)


@pytest.mark.parametrize(
    "settings", [{"alpha": 0.0}, {"share": 1.0}, {"n_max": 0}, {"metrics": {}}]
)
def test_settings_that_cannot_be_honoured_are_errors(settings):
    with pytest.raises(ValueError):
        Canary(**{"metrics": {"em": Margins()}, **settings})


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"metrics": {}})])
def test_a_damaged_state_is_refused(text):
    with pytest.raises(DataError, match="no state of a canary"):
        Canary.from_json(text)


def test_pairs_and_traffic_are_not_mixed():
    with pytest.raises(ValueError, match="use `answered`"):
        Canary({"em": Margins()}, share=0.5).paired({"em": 0.5}, {"em": 0.5})
    with pytest.raises(ValueError, match="this canary is paired"):
        Canary({"em": Margins()}).answered(True, {"em": 0.5})
