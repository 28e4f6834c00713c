"""A policy's ladders: the strictest step counts, keys have their own, what cannot be checked is refused."""

import pytest

from bem.config.safety import SafetyPolicy, load_policy
from bem.errors import ConfigError
from bem.safety.detector import Checked, Finding
from bem.safety.guard import PolicyGuard, strictest
from bem.safety.personal import find_personal
from bem.safety.worker import DetectorDown

LIMITS = {"harm": 0.6, "abuse": 0.5}


def guard(rules, scores=(0.0, 0.0), keys=None, error="", **more):
    """A guard whose detector says the same of every text."""
    asked = []

    def check(text):
        asked.append(text)
        findings = (Finding("unchecked", 1.0, 0.0, "too long"),) if error else ()
        return Checked(max(scores), findings, tuple(find_personal(text)), dict(zip(LIMITS, scores, strict=True)), error)  # fmt: skip

    policy = SafetyPolicy.model_validate({"rules": rules, "keys": keys or {}, **more})
    made = PolicyGuard(policy, check, LIMITS)
    return made, asked


LADDER = [{"do": "refuse"}, {"do": "flag", "above": 0.2}, {"do": "raise_kappa", "above": 0.4, "kappa": 0.7}]  # fmt: skip
KNOB = {"knob": {"basis": "somewhere"}}


@pytest.mark.parametrize(
    ("score", "action", "kappa"),
    [(0.2, "allow", None), (0.3, "flag", None), (0.5, "raise_kappa", 0.7), (0.61, "refuse", None)],
)
def test_the_highest_rung_that_a_score_passes_counts(score, action, kappa):
    made, _ = guard({"prompts": {"harm": LADDER}}, (score, 0.0), **KNOB)
    ruling = made.rule("a text", "prompts", "-")
    assert (ruling.action, ruling.kappa) == (action, kappa)
    assert ruling.category == ("none" if action == "allow" else "harm")


def test_the_strictest_category_decides_and_all_are_noted():
    rules = {"prompts": {"harm": [{"do": "flag"}], "abuse": [{"do": "refuse", "say": "No."}]}}
    ruling = guard(rules, (0.9, 0.9))[0].rule("a text", "prompts", "-")
    assert (ruling.action, ruling.category, ruling.say) == ("refuse", "abuse", "No.")
    assert {m.category for m in ruling.met} == {"harm", "abuse"}


def test_kappa_is_raised_beside_a_stricter_step():
    rules = {
        "prompts": {"harm": [{"do": "raise_kappa", "kappa": 0.5}], "personal": [{"do": "redact"}]}
    }
    ruling = guard(rules, (0.9, 0.0), **KNOB)[0].rule("mail a@b.org", "prompts", "-")
    assert (ruling.action, ruling.kappa, ruling.text) == ("redact", 0.5, "mail [email]")


def test_personal_data_is_redacted_by_kind():
    rules = {"answers": {"personal": [{"do": "redact", "kinds": ["card"]}, {"do": "flag"}]}}
    made, _ = guard(rules)
    ruling = made.rule("a@b.org and 4111 1111 1111 1111", "answers", "-")
    assert ruling.text == "a@b.org and [card]" and ruling.action == "redact"
    assert made.rule("a@b.org", "answers", "-").action == "flag"
    assert made.rule("nobody", "answers", "-").action == "allow"


def test_a_find_that_two_steps_name_is_redacted_once():
    rules = {"answers": {"personal": [{"do": "redact"}, {"do": "redact", "kinds": ["email"]}]}}
    assert guard(rules)[0].rule("a@b.org!", "answers", "-").text == "[email]!"


def test_a_key_has_its_own_rules_whole():
    rules = {"prompts": {"harm": [{"do": "refuse"}], "abuse": [{"do": "refuse"}]}}
    keys = {"lab": {"prompts": {"harm": [{"do": "flag"}]}}}
    made, _ = guard(rules, (0.9, 0.9), keys)
    assert made.rule("a", "prompts", "lab").action == "flag"
    assert made.rule("a", "prompts", "other").action == "refuse"


def test_where_no_rule_holds_nothing_is_read():
    made, asked = guard({"prompts": {"harm": [{"do": "refuse"}]}}, (0.9, 0.0))
    assert made.rule("a", "answers", "-").action == "allow" and not asked


def test_what_could_not_be_checked_is_refused_whatever_the_rules():
    made, asked = guard({"prompts": {"abuse": [{"do": "flag"}]}}, error="TooLong")
    assert made.rule("a", "prompts", "-").action == "refuse"
    assert made.rule("a", "prompts", "-").category == "unchecked"
    assert len(asked) == 2  # and it is not remembered


def test_a_text_is_read_once():
    made, asked = guard({"prompts": {"harm": [{"do": "refuse"}]}}, (0.9, 0.0))
    assert [made.rule(t, "prompts", "-").action for t in ("a", "b", "a")] == ["refuse"] * 3
    assert asked == ["a", "b"]
    made.rule("\ud800", "prompts", "-")  # half a character has a name too


def test_a_detector_that_is_down_is_an_error():
    def check(text):
        raise DetectorDown("gone")

    policy = SafetyPolicy.model_validate({"rules": {"prompts": {"harm": [{"do": "flag"}]}}})
    with pytest.raises(DetectorDown):
        PolicyGuard(policy, check, LIMITS).rule("a", "prompts", "-")


def test_of_several_texts_the_strictest_counts():
    rules = {"prompts": {"harm": LADDER, "personal": [{"do": "redact"}]}}
    made, _ = guard(rules, (0.5, 0.0), **KNOB)
    rulings = [made.rule(t, "prompts", "-") for t in ("plain", "a@b.org")]
    assert strictest(rulings).action == "redact" and strictest(rulings).kappa == 0.7
    assert strictest([]).action == "allow"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"prompts": {"harms": [{"do": "refuse"}]}}, "the detector knows harm, abuse, personal"),
        ({"answers": {"harm": [{"do": "raise_kappa", "kappa": 1}]}}, "before an answer begins"),
        ({"prompts": {"harm": [{"do": "redact"}]}}, "redact is for personal alone"),
        ({"prompts": {"harm": [{"do": "raise_kappa", "kappa": 1}]}}, "needs knob.basis"),
        ({"prompts": {"harm": [{"do": "raise_kappa"}]}}, "needs kappa"),
        ({"prompts": {"harm": [{"do": "flag", "say": "x"}]}}, "say belongs to refuse"),
        ({"prompts": {"harm": [{"do": "refuse", "kinds": ["card"]}]}}, "kinds are of personal"),
        ({"prompts": {"personal": [{"do": "refuse", "above": 0.5}]}}, "leave `above` out"),
        ({"prompts": {"harm": [{"do": "refuse", "abov": 0.5}]}}, "Did you mean 'above'"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused(tmp_path, rules, message):
    import yaml

    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump({"rules": rules}))
    with pytest.raises(ConfigError, match=message):
        PolicyGuard(load_policy(path), lambda text: None, LIMITS)


def test_the_policy_that_ships_holds_for_the_detector_that_ships():
    PolicyGuard(load_policy("deploy/policy.yaml"), lambda text: None, LIMITS)
    with pytest.raises(ConfigError, match="no policy that can be read"):
        load_policy("configs/nowhere.yaml")
