"""Personal data is found by form, check digits and the words around it; made-up numbers throughout."""

import time

import pytest

from bem.safety.personal import find_personal, iban, luhn, redact, ssn


def kinds(text):
    return [(found.kind, text[found.start : found.end]) for found in find_personal(text)]


@pytest.mark.parametrize(
    ("text", "kind", "data"),
    [
        ("write to ada.l@example.org.", "email", "ada.l@example.org"),
        ("card 4111 1111 1111 1111 please", "card", "4111 1111 1111 1111"),
        ("pay to DE89 3704 0044 0532 0130 00", "iban", "DE89 3704 0044 0532 0130 00"),
        ("his number is 536-22-1234", "ssn", "536-22-1234"),
        ("SSN: 536221234", "ssn", "536221234"),
        ("from 192.0.2.17 today", "ip", "192.0.2.17"),
        ("host 2001:db8::7 answers", "ip", "2001:db8::7"),
        ("call me on 555 123 4567", "phone", "555 123 4567"),
        ("reach us: +41 44 668 18 00", "phone", "+41 44 668 18 00"),
    ],
)
def test_each_kind_is_found_with_its_place(text, kind, data):
    assert kinds(text) == [(kind, data)]


@pytest.mark.parametrize(
    "text",
    [
        "card 4111 1111 1111 1112",  # a wrong check digit
        "pay to DE88 3704 0044 0532 0130 00",
        "values 666-22-1234, 000-12-3456, 123-00-4567",  # never issued
        "536221234 apples",  # nine digits without a word for them
        "version 1.2.3.4.5 of 300.1.2.3",
        "at 12:30:45 on 2024-05-01 or 01/05/2024",
        "555 1234 apples and 7 pears",  # no word for a phone
        "localhost is 127.0.0.1",
        "a@b",
    ],
)
def test_what_only_looks_like_it_is_left_alone(text):
    assert kinds(text) == []


def test_check_digits_are_those_of_the_standards():
    assert luhn("79927398713" + "0" * 0) is False  # 11 digits: no card
    assert luhn("4012888888881881") and not luhn("4012888888881882")
    assert not luhn("0000000000000000")
    assert iban("GB82 WEST 1234 5698 7654 32") and not iban("GB82 WEST 1234 5698 7654 33")
    assert ssn("123-45-6789") and not ssn("900-45-6789")


def test_redaction_names_the_kind_and_keeps_the_rest():
    text = "ada@example.org, card 4111111111111111"
    assert redact(text, find_personal(text)) == "[email], card [card]"


@pytest.mark.parametrize("unit", ["1 ", "a.b@", "1:", "12-", "DE89", "+1", "a" * 50 + "@"])
def test_no_text_takes_long(unit):
    started = time.process_time()
    find_personal(unit * (60_000 // len(unit)))
    assert time.process_time() - started < 5
