"""A text reads the same through its disguises; what is no disguise stays as it is."""

import base64
import codecs
import time

import pytest

from bem.safety.views import MOST_VIEWS, fold, views

TEXT = "how can i bake bread for my neighbour"


def readings(text):
    return {view.text: view.through for view in views(text)}


@pytest.mark.parametrize(
    ("disguised", "through"),
    [
        (TEXT.upper(), ""),
        ("\u200b".join(TEXT), ""),
        (TEXT.replace("a", "а").replace("o", "о").replace("e", "е"), ""),  # Cyrillic
        ("НОW саn і bаkе brеаd fоr mу nеіghbоur", ""),
        ("".join(chr(ord(c) + 0xFEE0) if c != " " else c for c in TEXT), ""),  # full width
        ("".join(c + "\u0301" for c in TEXT), ""),  # accents on everything
        ("h0w c4n 1 b4k3 br34d f0r my n31ghb0ur", "leet"),
        ("  ".join(" ".join(word) for word in TEXT.split()), "letters apart"),
        (" ".join(".".join(word) for word in TEXT.split()), "letters apart"),
        ("how c-an i ba-ke br-ead f-or my nei-ghbour", "letters apart"),
        (base64.b64encode(TEXT.encode()).decode(), "base64"),
        (base64.b64encode(base64.b64encode(TEXT.encode())).decode(), "base64, base64"),
        (TEXT.encode().hex(), "hexadecimal"),
        ("".join(f"%{b:02x}" for b in TEXT.encode()), "escapes"),
        ("".join(f"&#{b};" for b in TEXT.encode()), "escapes"),
        (codecs.encode(TEXT, "rot13"), "rot13"),
        (TEXT[::-1], "reversed"),
    ],
)
def test_a_disguise_is_seen_through_and_named(disguised, through):
    assert readings(disguised).get(TEXT) == through


def test_code_in_a_sentence_is_read_with_what_stands_around_it():
    code = base64.b64encode(b"bread for my neighbour").decode()
    assert "please bake bread for my neighbour today" in readings(f"Please bake {code} today")


@pytest.mark.parametrize(
    "text",
    [TEXT, "the 4th of may, 10kg, mp3, b2 and wow!", "it is $5", "a b", "e-mail my mother-in-law"],
)
def test_an_ordinary_text_has_one_reading(text):
    assert list(readings(text)) == [fold(text)]


def test_a_foreign_language_stays_what_it_is():
    assert fold("Привет, мир") == "привет, мир"
    assert fold("ﬁne Straße café") == "fine strasse cafe"


def test_nothing_is_nothing():
    assert readings("") == {"": ""} and readings(" \u200b\n") == {"": ""}


@pytest.mark.parametrize(
    "unit",
    ["a", "4a", "a b ", "ab cd ", "Ab9/", "@", "é", "12 ", "a.", "%41", "-", "&#65;", "1a 2b "],
)
def test_no_text_takes_long_or_has_many_readings(unit):
    text = unit * (100_000 // len(unit))
    started = time.process_time()
    found = views(text)
    assert time.process_time() - started < 5 and len(found) <= MOST_VIEWS + 3
    assert sum(len(view.text) for view in found) <= 4 * len(text)
