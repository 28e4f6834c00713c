import json

import numpy as np
import pytest

from bem.config import GatesConfig
from bem.stats.corpus import bleu_statistics, chrf_statistics
from bem.stats.gates import judge
from bem.stats.measurement import Measurement
from bem.stats.scores import Metric
from tests.stats.arms import arm, pair, scores

FAST = GatesConfig(n_bootstrap=2000)


def one(baseline, candidate, gates=FAST, **more):
    return judge(baseline, {"v1": candidate}, gates, **more)["v1"]


def test_a_clear_gain_at_equal_cost_is_promoted_with_all_its_numbers():
    verdict = one(*pair())
    assert verdict.decision == "PROMOTE"
    assert verdict.accepted
    assert all(check.passed for check in verdict.checks)
    effect = verdict.effect("em")
    assert effect.gain == pytest.approx(50 / 400)
    assert effect.ci_low > 0
    assert (effect.n, effect.discordant, effect.engine) == (400, 70, "exact")
    assert effect.adjusted_p == pytest.approx(effect.p_value)  # a family of one
    assert effect.fcr_low == pytest.approx(effect.ci_low)
    assert {c.name for c in verdict.checks} == {
        "quality", "regression.em", "budget.parameters", "budget.flops", "latency.prefill",
        "latency.decode", "memory", "kv_hit",
    }  # fmt: skip
    json.dumps(verdict.to_dict(), allow_nan=False)
    assert "PROMOTE" in verdict.summary() and "+12.50 [" in verdict.summary()


def test_the_same_seed_gives_the_same_verdict():
    assert one(*pair()) == one(*pair())


def test_the_order_of_the_candidates_examples_does_not_matter():
    baseline, candidate = pair()
    order = np.random.default_rng(0).permutation(candidate.n)
    shuffled = arm("v1", candidate.metrics["em"][:, order],
                   example_ids=[candidate.example_ids[i] for i in order])  # fmt: skip
    assert one(baseline, shuffled) == one(baseline, candidate)


def test_judging_the_other_way_round_turns_every_gain():
    baseline, candidate = pair()
    there, back = one(baseline, candidate), judge(candidate, {"s0": baseline}, FAST)["s0"]
    assert back.effect("em").gain == pytest.approx(-there.effect("em").gain)
    assert back.effect("em").ci_low == pytest.approx(-there.effect("em").ci_high)
    assert back.decision == "REJECT"
    assert back.check("regression.em").passed is False
    assert back.check("quality").passed is False


def test_no_baseline_is_inconclusive():
    verdict = judge(None, {"v1": pair()[1]})["v1"]
    assert verdict.decision == "INCONCLUSIVE"
    assert "no baseline" in verdict.reasons[0]


@pytest.mark.parametrize(
    "missing",
    [
        "latency_ms",
        "adapter_memory_bytes",
        "adapter_parameters",
        "adapter_flops_per_token",
        "kv_hits",
    ],
)
def test_a_cost_that_was_not_measured_is_never_passed(missing):
    value = {} if missing == "latency_ms" else None
    verdict = one(*pair(**{missing: value}))
    assert verdict.decision == "INCONCLUSIVE"
    assert any("cannot be computed" in c.reason for c in verdict.checks if c.passed is None)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_scores_are_inconclusive_and_named_and_spare_the_other_candidates(bad):
    baseline, candidate = pair()
    em = candidate.metrics["em"].copy()
    em[0, 7] = bad
    verdicts = judge(baseline, {"broken": arm("broken", em), "v1": candidate}, FAST)
    assert verdicts["broken"].decision == "INCONCLUSIVE"
    assert "metrics.em[0, 7]" in verdicts["broken"].check("quality").reason
    assert verdicts["v1"].decision == "PROMOTE"
    # the hypothesis that could not be tested still counts in the family
    assert verdicts["v1"].effect("em").adjusted_p == pytest.approx(
        2 * verdicts["v1"].effect("em").p_value
    )


def test_a_nan_baseline_promotes_nothing():
    baseline, candidate = pair()
    broken = arm("s0", np.full(baseline.n, np.nan))
    assert one(broken, candidate).decision == "INCONCLUSIVE"


def test_other_examples_cannot_be_compared():
    baseline, candidate = pair()
    other = arm("v1", candidate.metrics["em"], example_ids=[f"z{i}" for i in range(candidate.n)])
    verdict = one(baseline, other)
    assert verdict.decision == "INCONCLUSIVE"
    assert "same examples" in verdict.check("quality").reason


def test_too_few_examples_or_differences_are_inconclusive_with_how_many_more():
    few = one(*pair(n=16, gains=8, losses=0))
    assert few.decision == "INCONCLUSIVE"
    assert few.n_more == 4
    alike = one(*pair(n=400, gains=8, losses=0))
    assert alike.effect("em").ci_low > 0  # BCa alone would promote on eight gains
    assert alike.check("quality").passed is None
    assert "only 8 examples differ" in alike.check("quality").reason
    assert alike.n_more == 100


def test_an_identical_candidate_is_not_promoted():
    baseline, _ = pair()
    verdict = one(baseline, arm("v1", baseline.metrics["em"]))
    assert verdict.decision == "INCONCLUSIVE"
    assert verdict.effect("em").flags == ("degenerate",)
    assert verdict.check("regression.em").passed


def test_the_exact_test_can_veto_the_interval():
    # 30 examples, 4 gains: BCa p is about .002, exact McNemar p is .125
    gates = FAST.model_copy(update={"min_discordant": 0})
    verdict = one(*pair(n=30, gains=4, losses=0), gates)
    assert verdict.effect("em").rejected
    assert "exact test shows no gain" in verdict.check("quality").reason
    assert verdict.decision == "INCONCLUSIVE"


def test_a_gain_within_the_margin_is_not_enough():
    gates = FAST.model_copy(update={"quality_margin": 10.0})
    verdict = one(*pair(), gates)  # 12.5 points, lower limit about 8
    assert verdict.decision == "INCONCLUSIVE"
    assert "lower limit is not above 0.1" in verdict.check("quality").reason
    assert verdict.n_more > 0


def test_rejected_once_a_useful_gain_is_excluded():
    rng = np.random.default_rng(0)
    em = rng.integers(0, 2, 20_000).astype(float)
    new = em.copy()
    flipped = rng.choice(20_000, 200, replace=False)
    new[flipped] = 1 - new[flipped]
    verdict = one(arm("s0", em), arm("v1", new))
    assert verdict.check("regression.em").passed
    assert verdict.check("quality").passed is False
    assert "smallest useful gain" in verdict.check("quality").reason
    assert verdict.decision == "REJECT"
    assert verdict.n_more is None


def test_a_core_metric_that_fell_blocks_a_gain_in_another():
    baseline, candidate = pair()
    f1 = np.full(400, 0.5)
    worse = f1 - 0.02 - 0.01 * np.sin(np.arange(400))
    verdict = one(
        arm("s0", baseline.metrics["em"], metrics={**baseline.metrics, "f1": f1}),
        arm("v1", candidate.metrics["em"], metrics={**candidate.metrics, "f1": worse}),
    )
    assert verdict.check("quality").passed
    assert verdict.check("regression.f1").passed is False
    assert verdict.decision == "REJECT"


def test_a_core_metric_that_was_not_measured_is_open():
    baseline, candidate = pair()
    both = arm("s0", baseline.metrics["em"], metrics={**baseline.metrics, "f1": np.ones(400)})
    verdict = one(both, candidate)
    assert verdict.check("regression.f1").passed is None
    assert verdict.decision == "INCONCLUSIVE"


def test_loss_is_better_when_lower_and_guards_nothing():
    baseline, candidate = pair()
    verdict = one(
        arm("s0", baseline.metrics["em"], metrics={**baseline.metrics, "loss": np.full(400, 2.0)}),
        arm("v1", candidate.metrics["em"],
            metrics={**candidate.metrics, "loss": 1.5 + 0.1 * np.sin(np.arange(400))}),
    )  # fmt: skip
    assert verdict.effect("loss").gain == pytest.approx(0.5, abs=0.01)
    assert not verdict.effect("loss").primary
    assert verdict.family_size == 1


def test_a_declared_metric_alone_can_be_judged():
    rng = np.random.default_rng(0)
    accuracy = rng.random(300)
    make = lambda name, values: arm(  # noqa: E731
        name, values, metrics={"acc": values}, declared={"acc": Metric(True, 100.0)}
    )
    verdict = one(make("s0", accuracy), make("v1", accuracy + 0.05 + 0.1 * rng.random(300)))
    assert verdict.decision == "PROMOTE"
    assert verdict.effect("acc").engine == "saddlepoint"


def slices(n, share):
    return {"hard": np.arange(n) < n * share, "A": np.arange(n) % 2 == 0}


def test_a_named_slice_guards_and_slice_a_is_only_reported():
    baseline, candidate = scores(400, gains=90, losses=10)
    verdict = one(arm("s0", baseline, slices=slices(400, 0.2)), arm("v1", candidate))
    assert verdict.check("slice.hard.em").passed is False  # all losses lie in it
    assert verdict.decision == "REJECT"
    assert verdict.effect("em", "A").gain == pytest.approx(0.2, abs=0.03)
    assert not [c for c in verdict.checks if c.name.startswith("slice.A")]
    waived = one(
        arm("s0", baseline, slices=slices(400, 0.2)), arm("v1", candidate),
        FAST.model_copy(update={"waived": ("slices",)}),
    )  # fmt: skip
    assert waived.decision == "PROMOTE"
    assert waived.waived == ("slices",)


def test_a_slice_too_small_to_tell_is_open():
    baseline, candidate = scores(400, gains=90, losses=10)
    verdict = one(arm("s0", baseline, slices={"tiny": np.arange(400) < 10}), arm("v1", candidate))
    assert verdict.check("slice.tiny.em").passed is None
    assert verdict.n_more == 400  # ten more of the slice, which is a fortieth of the set
    empty = one(arm("s0", baseline, slices={"none": np.zeros(400)}), arm("v1", candidate))
    assert "no examples" in empty.check("slice.none.em").reason


def test_gains_that_all_come_from_one_document_are_not_enough():
    baseline, candidate = scores(400, gains=60, losses=0)
    documents = [f"d{i}" for i in range(340)] + ["big"] * 60
    verdict = one(arm("s0", baseline, clusters=documents), arm("v1", candidate))
    assert verdict.effect("em").n == 341
    assert verdict.effect("em").discordant == 1
    assert verdict.decision == "INCONCLUSIVE"


def test_the_family_is_candidates_times_metrics():
    baseline, candidate = pair()
    null = arm("v2", scores(400, 20, 20)[1])
    verdicts = judge(baseline, {"v1": candidate, "v2": null, "v3": null}, FAST, family=["em"])
    assert verdicts["v1"].family_size == 3
    assert verdicts["v1"].effect("em").adjusted_p == pytest.approx(
        3 * verdicts["v1"].effect("em").p_value
    )
    assert verdicts["v1"].effect("em").fcr_low < verdicts["v1"].effect("em").ci_low
    strict = judge(baseline, {"v1": candidate, "v2": null, "v3": null},
                   FAST.model_copy(update={"fdr": "by"}))  # fmt: skip
    assert strict["v1"].effect("em").adjusted_p == pytest.approx(
        (1 + 1 / 2 + 1 / 3) * verdicts["v1"].effect("em").adjusted_p
    )


def test_a_declared_metric_that_nobody_measured_is_open():
    verdict = one(*pair(), family=["f1"])
    assert verdict.check("quality").passed is None
    assert verdict.decision == "INCONCLUSIVE"


def corpora(quality, refs, seeds=2):
    rng = np.random.default_rng(int(quality * 100))
    words = list("abcdefgh")
    tables = []
    for _ in range(seeds):
        answers = [
            " ".join(w if rng.random() < quality else rng.choice(words) for w in r[0].split())
            for r in refs
        ]
        tables.append((bleu_statistics(answers, refs), chrf_statistics(answers, refs)))
    bleu, chrf = zip(*tables, strict=True)
    return {"corpus_bleu": np.stack(bleu), "corpus_chrf": np.stack(chrf)}


def test_corpus_metrics_are_judged_from_sufficient_statistics():
    rng = np.random.default_rng(0)
    refs = [[" ".join(rng.choice(list("abcdefgh"), 9))] for _ in range(120)]
    make = lambda name, q: arm(  # noqa: E731
        name,
        np.zeros(120),
        metrics={},
        corpus=corpora(q, refs),
        clusters=[f"d{i // 2}" for i in range(120)],
    )
    verdict = one(make("s0", 0.6), make("v1", 0.8))
    assert verdict.decision == "PROMOTE"
    effect = verdict.effect("corpus_bleu")
    assert effect.engine == "weights"
    assert effect.n == 60
    assert effect.candidate - effect.baseline == pytest.approx(effect.gain)
    assert effect.exact_p < 0.01
    single = Measurement("v1", {}, make("s0", 0.6).example_ids, corpus=corpora(0.8, refs, 1))
    assert "no exact test" in one(make("s0", 0.6), single).check("quality").reason


def test_many_small_gains_against_few_large_losses_are_not_believed():
    # log-normal losses of mean zero: a sample that happens to lack the large ones looks like a gain
    rng = np.random.default_rng(0)
    d = np.append(np.full(57, 0.9), [-2.0, -5.0, -6.0]) + 0.01 * rng.normal(size=60)
    base = np.full(60, 10.0)
    make = lambda name, loss: arm(name, loss, metrics={"loss": loss})  # noqa: E731
    verdict = one(make("s0", base), make("v1", base - d))
    assert verdict.effect("loss").acceleration < -1 / 30
    assert "few large losses" in verdict.check("quality").reason
    assert verdict.decision == "INCONCLUSIVE"
    assert verdict.n_more > 60


@pytest.mark.parametrize("unit", [1e-30, 1e-9, 1 / 3, 10.0])
def test_another_unit_of_the_scores_changes_no_decision(unit):
    baseline, candidate = scores(400, 60, 10)
    declared = {"x": Metric(higher_is_better=True, points_per_unit=100 / unit)}
    arms = [
        arm(name, em, metrics={"x": em * unit}, declared=declared)
        for name, em in (("s0", baseline), ("v1", candidate))
    ]
    assert one(*arms).decision == "PROMOTE"
