"""Each form of answer has its own idea of equal; numbers here are computed by hand."""

import json

import pytest

from bem.tasks.scoring import FORMS, normal_sql, overlap, score, slots


def test_json_is_compared_parsed_and_scored_by_slots():
    gold = '{"intent": "Play", "slots": {"artist": "abba", "year": "1976"}}'
    same = '{"slots":{"year":"1976","artist":"abba"},"intent":"Play"}'
    near = '{"intent": "Play", "slots": {"artist": "abba", "album": "Arrival"}}'
    assert score("em", "json", same, [gold]) == 1.0
    assert score("em", "json", near, [gold]) == 0.0
    assert score("f1", "json", near, [gold]) == pytest.approx(2 * 2 / (3 + 3))
    broken = gold[:-1]
    assert [score(m, "json", broken, [gold]) for m in ("em", "f1", "validity")] == [0, 0, 0]
    assert score("em", "json", broken, [broken]) == 0.0
    assert score("f1", "json", "{}", ["{}"]) == 1.0
    assert slots('{"a": [1, {"b": "x"}]}') == [(".a[]", "1"), (".a[].b", '"x"')]


def test_sql_ignores_case_and_spacing_but_not_content():
    gold = 'SELECT school/club_team WHERE no. = 21 AND x = "a b"'
    assert score("em", "sql", 'select  school/club_team where no.=21 and x="a b";', [gold]) == 1.0
    assert score("em", "sql", "select school/club_team where no.=22", [gold]) == 0.0
    assert normal_sql("SELECT count( a , b ) ;") == "select count(a,b)"
    assert score("validity", "sql", gold, [gold]) == 1.0
    assert score("validity", "sql", 'SELECT a WHERE b = "c', [gold]) == 0.0
    assert score("f1", "sql", "select a where b=1", ["select a where b=2"]) == 0.75


@pytest.mark.parametrize(
    ("form", "answer", "gold", "em", "f1", "valid"),
    [
        ("name", "name_file_get", "get_file_name", 0, 1.0, 1),
        ("name", " get_name ", "get_name", 1, 1.0, 1),
        ("name", "get name", "get_name", 0, 1.0, 0),
        ("name", "Get_name", "get_name", 0, 0.5, 1),
        ("label", "Card_Arrival", "card_arrival", 1, 1.0, 1),
        ("label", "card_linking", "card_arrival", 0, 0.5, 1),
        ("label", "yes\nno", "yes", 0, 2 / 3, 0),
        ("number", "1,200", "1200", 1, 1.0, 1),
        ("number", "$12.0", "12", 1, 1.0, 1),
        ("number", "twelve", "12", 0, 0.0, 0),
        ("call", "f( a,b )", "f(a, b)", 1, 1.0, 1),
        ("call", "f(a, c)", "f(a, b)", 0, 2 / 3, 1),
        ("call", "f(a, b", "f(a, b)", 0, 1.0, 0),
        ("names", "a,b", "a, b", 1, 1.0, 1),
        ("shell", "ls  -l", "ls -l", 1, 1.0, 1),
        ("shell", "ls -L", "ls -l", 0, 0.5, 1),
        ("shell", "echo 'a", "echo 'a'", 0, 0.5, 0),
        ("text", "The Beatles.", "beatles", 1, 1.0, 1),
        ("text", "", "x", 0, 0.0, 0),
        ("code", "x = 1\n    y", "x = 1 y", 1, 1.0, 1),
    ],
)
def test_forms(form, answer, gold, em, f1, valid):
    assert score("em", form, answer, [gold]) == em
    assert score("f1", form, answer, [gold]) == pytest.approx(f1)
    assert score("validity", form, answer, [gold]) == valid


def test_a_call_may_use_any_acceptable_value_and_leave_out_what_is_optional():
    allowed = {"area": {"base": [10, 10.0], "height": [5], "unit": ["cm", ""]}}
    refs = [json.dumps({"area": {"base": 10, "height": 5, "unit": "cm"}}), json.dumps(allowed)]

    def em(call):
        return score("em", "tool", json.dumps(call), refs)

    assert em({"area": {"base": 10, "height": 5, "unit": "cm"}}) == 1
    assert em({"area": {"height": 5, "base": 10}}) == 1
    assert em({"area": {"base": 10}}) == 0  # height is not optional
    assert em({"area": {"base": 10, "height": 5, "colour": 1}}) == 0
    assert em({"volume": {"base": 10, "height": 5}}) == 0
    assert score("em", "tool", "none", ["none"]) == score("validity", "tool", "none", ["none"]) == 1
    assert score("em", "tool", "none", refs) == 0


def test_the_best_reference_counts():
    for form in FORMS:
        assert score("em", form, "{}", ["[1]", "{}"]) == 1.0
        assert score("f1", form, "{}", ["[1]", "{}"]) >= score("f1", form, "{}", ["[1]"])


def test_overlap_counts_with_multiplicity():
    assert overlap("aab", "ab") == pytest.approx(2 * 2 / 5)
    assert overlap([], []) == 1.0 and overlap([], ["a"]) == 0.0


def test_every_form_survives_any_text():
    for form in FORMS:
        for text in ("", " ", "\n", "[" * 5000, "\ud800", "NaN", "1e999", "'", '"', "none"):
            for metric in ("em", "f1", "validity"):
                assert 0.0 <= score(metric, form, text, ["x"]) <= 1.0
