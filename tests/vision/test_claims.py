"""What a text claims of a picture, and what is no claim."""

import pytest

from bem.vision.claims import MANY, Claim, claims_in


def one(text):
    (claim,) = claims_in(text)
    return claim


@pytest.mark.parametrize(
    ("text", "phrase", "least", "most"),
    [
        ("There is a yellow circle.", "yellow circle", 1, MANY),
        ("there are exactly two blue squares", "blue square", 2, 2),
        ("There are 3 circles!", "circle", 3, 3),
        ("there are at least four red things", "red thing", 4, MANY),
        ("There are at most two circles.", "circle", 0, 2),
        ("there is no black square", "black square", 0, 0),
        ("there are no triangles", "triangle", 0, 0),
        ("A black square is present", "black square", 1, MANY),
        ("no dog is visible.", "dog", 0, 0),
    ],
)
def test_a_count_is_read_with_its_bounds(text, phrase, least, most):
    claim = one(text)
    assert (claim.phrase, claim.least, claim.most, claim.relation) == (phrase, least, most, "")


@pytest.mark.parametrize("how", ["left of", "above", "to the right of", "under"])
def test_a_relation_names_both_sides(how):
    claim = one(f"The yellow circle is {how} a blue square.")
    assert claim.phrases == ("yellow circle", "blue square") and claim.positive
    assert claim.relation == {"to the right of": "right of", "under": "below"}.get(how, how)


@pytest.mark.parametrize(
    "text",
    [
        "Is there a yellow circle?",
        "If there is a circle, say yes.",
        "It is false that there is a circle.",
        "There might be a circle.",
        "I doubt there is a circle.",
        "there is not a circle",
        "Draw a yellow circle.",
        "",
        "....",
    ],
)
def test_questions_conditions_doubts_and_requests_claim_nothing(text):
    assert claims_in(text) == []


def test_and_joins_claims_and_sentences_are_read_in_order():
    found = claims_in("There is a red circle and no blue square. Hello. There are two dots.")
    assert [(c.phrase, c.least, c.most) for c in found] == [
        ("red circle", 1, MANY), ("blue square", 0, 0), ("dot", 2, 2),
    ]  # fmt: skip


def test_a_long_text_ends_at_sixteen_claims_and_at_once():
    assert len(claims_in("There is a dog. " * 100_000)) == 16
    assert claims_in("there is a " * 50_000) == []


def test_an_absence_is_not_positive():
    assert not Claim("", "dog", 0, 0).positive and Claim("", "dog").positive
