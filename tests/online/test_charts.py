import math

import numpy as np
import pytest
from scipy import stats

from bem.online.charts import RECENT, EDetector, Vote
from bem.online.reference import learn

ARL = 2e6


@pytest.fixture(scope="module")
def reference():
    scores = np.random.default_rng(0).normal(0.7, 0.1, 1000).clip(0, 1)
    return learn(scores, ARL, (0.0, 1.0)), scores


def test_the_e_detector_is_the_recursion_of_the_paper(reference):
    """R <- (1 + l (m0 - x)) (R + 1), score by score, for every bet."""
    detector = EDetector(reference[0], (0.0, 1.0), ARL)
    blocks = np.random.default_rng(1).random((3, 20))
    by_hand = np.zeros(len(detector.bets))
    for x in blocks.reshape(-1):
        by_hand = (1 + detector.bets * (detector.m0 - x)) * (by_hand + 1)
    for factor, begun in zip(*detector.read(blocks), strict=True):
        detector.step(factor, begun)
    np.testing.assert_allclose(detector.evidence, by_hand, rtol=1e-12)


def test_no_bet_can_lose_more_than_everything(reference):
    detector = EDetector(reference[0], (0.0, 1.0), ARL)
    assert (1 + detector.bets * (detector.m0 - 1.0) > 0).all()


def test_under_the_null_evidence_grows_by_one_a_score_on_average(reference):
    """R_t - t is a martingale where E x = m0: that is why the scores between false alarms are ARL at least."""
    detector = EDetector(reference[0], (0.0, 1.0), ARL)
    rng = np.random.default_rng(2)
    x = (rng.random((20_000, 20)) < detector.m0).astype(float)
    _, begun = detector.read(x)  # from R = 0
    smallest = begun[:, -1]  # the smallest bet has the smallest variance
    assert smallest.mean() == pytest.approx(20, abs=4 * smallest.std() / math.sqrt(len(x)))


def test_welch_is_scipys_where_scores_are_independent(reference):
    ref, scores = reference
    plain = type(ref)(**{**ref.__dict__, "inflation": 1.0, "rhythm": 0.0})
    vote = Vote(plain, scores, ARL)
    recent = np.random.default_rng(3).normal(0.68, 0.1, (RECENT, 20))
    theirs = stats.ttest_ind(scores, recent.reshape(-1), equal_var=False, alternative="greater")
    assert vote.read(recent).welch[-1] == pytest.approx(theirs.pvalue, rel=1e-9)


def test_smirnov_uses_scipys_statistic_one_sided(reference):
    ref, scores = reference
    plain = type(ref)(**{**ref.__dict__, "inflation": 1.0, "rhythm": 0.0})
    recent = np.random.default_rng(4).normal(0.65, 0.1, RECENT * 20).round(2)  # with ties
    d = stats.ks_2samp(recent, scores, alternative="greater").statistic
    looks = Vote(plain, scores, ARL).read(recent.reshape(RECENT, 20))
    n, m = len(scores), len(recent)
    assert looks.smirnov[-1] == pytest.approx(math.exp(-2 * d**2 * n * m / (n + m)), rel=1e-9)


def test_page_hinkley_is_its_recursion(reference):
    ref, scores = reference
    vote = Vote(ref, scores, ARL)
    blocks = np.random.default_rng(5).normal(0.66, 0.1, (6, 20))
    looks, by_hand = vote.read(blocks), 0.0
    for i, block in enumerate(blocks):
        for x in block:
            by_hand = max(0.0, by_hand + (ref.mean - x) / ref.sd - vote.slack)
        vote.step(looks, i)
        assert vote.page == pytest.approx(by_hand)


def test_one_vote_is_no_vote_and_a_rise_is_none(reference):
    """Before the recent window is full only Page-Hinkley could vote: below the quorum of two."""
    ref, scores = reference
    vote = Vote(ref, scores, ARL)
    fallen = np.full((RECENT, 20), 0.3)
    looks = vote.read(fallen)
    assert [vote.step(looks, i) for i in range(RECENT)] == [None] * (RECENT - 1) + [True]
    vote.restart()
    looks = vote.read(np.full((RECENT, 20), 0.95))
    assert vote.step(looks, RECENT - 1) is False


def test_tests_without_spread_do_not_vote():
    scores = np.ones(1000)
    vote = Vote(learn(scores, ARL, None), scores, ARL)
    assert math.isnan(vote.read(np.ones((RECENT, 20))).welch[-1])
