"""A verdict in words claims no more than its numbers, and shows what a model wrote as it is."""

import pytest

from bem.config import GatesConfig
from bem.report import words
from bem.stats.verdict import Check, Effect, Verdict


def effect(**changes) -> Effect:
    values = dict(
        metric="em", slice=None, primary=True, baseline=0.5, candidate=0.512, gain=0.012,
        ci_low=-0.004, ci_high=0.03, points_per_unit=100.0, p_value=0.1, n=100, examples=100,
        se=0.01, mde=0.02, acceleration=0.0, engine="exact", flags=(), discordant=20,
    )  # fmt: skip
    return Effect(**{**values, **changes})


def verdict(*checks: Check, effects=None, decision="REJECT") -> Verdict:
    effects = (effect(),) if effects is None else effects
    return Verdict("v1", "s0", decision, checks, effects, None, 0.05, 1)


def test_effects_are_worded_in_their_own_units():
    assert words.effect(effect()) == "em +1.2 points [−0.4, +3.0]"
    assert words.effect(effect(points_per_unit=None)) == "em +0.012 [−0.004, +0.030]"


def test_every_kind_of_check_is_told_in_the_unit_that_people_expect():
    on_slice = effect(slice="qa/1.5", primary=False, gain=-0.02)
    checks = [
        Check("quality", False, "", value=0.012),
        Check("slice.qa/1.5.em", False, "", value=-0.02),
        Check("latency.decode", False, "", value=1.308),
        Check("budget.flops", False, "", value=0.21),
    ]
    judged = verdict(*checks, effects=(effect(), on_slice))
    assert words.sentence(judged) == (
        "Rejected: no useful gain, em on qa/1.5 fell (−2.0), decode latency is ×1.308, "
        "+21.0% FLOPs per token. Best metric: em +1.2 points [−0.4, +3.0]."
    )
    assert [gate.value for gate in words.gates(judged)] == ["+1.2", "−2.0", "×1.308", "+21.0%"]


def test_a_check_without_a_value_could_not_be_computed():
    judged = verdict(Check("kv_hit", None, "no cache"), decision="INCONCLUSIVE", effects=())
    assert words.sentence(judged) == (
        "Not decided: kv hit could not be computed. "
        "Best metric: no primary metric could be computed."
    )
    assert words.gates(judged)[0].value == "–"


def test_gates_that_are_not_the_defaults_are_named_with_the_default():
    assert words.gate_changes(GatesConfig()) == ""
    gates = GatesConfig(slice_margin_points=5, reported_slices=("A", "b"), waived=("latency",))
    assert words.gate_changes(gates) == (
        "slice_margin_points 5 (default 1); reported_slices A, b (default A); "
        "waived latency (default none)"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\n\tcode äß 漢字 🙂", "plain\n\tcode äß 漢字 🙂"),
        ("a\u2028b\u2029c\x85d", "a⟨U+2028⟩b⟨U+2029⟩c⟨U+0085⟩d"),
        ("\x00\x1b[31m", "⟨U+0000⟩⟨U+001B⟩[31m"),
        ("half \ud83d", "half ⟨U+D83D⟩"),
        ("\u202eturned\u2066", "⟨U+202E⟩turned⟨U+2066⟩"),
    ],
)
def test_what_has_no_glyph_is_named(text, shown):
    assert words.visible(text) == shown
    shown.encode("utf-8")


def test_a_long_text_is_cut_and_says_how_long_it_is():
    assert words.shortened("x" * 5, 5) == "xxxxx"
    assert words.shortened("x" * 1234, 5) == "xxxxx… (1,234 characters)"
