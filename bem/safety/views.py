"""What a text says once its disguises are taken off: the views of it that a detector reads.

    folded     compatibility forms, case, accents, invisible characters and look-alike letters
    leet       digits and signs read as letters (two readings of 1)
    joined     letters that were set apart
    decoded    base64, hexadecimal, percent and HTML escapes, ROT13, reversed text

The first view is always there, another one only where it says something else. Nothing is executed, and
what comes out is never longer than a few times what went in.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import html
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote

MOST_VIEWS = 12
DEPTH = 2
"""How often what was decoded is decoded again."""

LOOKALIKES = str.maketrans(
    "абгеёийкморстухціїјѕһԁԍԛԝӏοαβγεηικνρτυχωϲАВЕЁЗКМНОРСТУХІЇЈЅԚԜӀΑΒΕΖΗΙΚΜΝΟΡΤΥΧϹ",
    "abreeuukmopctyxuiijshdgqwloabyenikvptuxwcABEE3KMHOPCTYXIIJSQWIABEZHIKMNOPTYXC",
)
"""Cyrillic and Greek letters and the Latin ones that they pass for."""
NAMED = re.compile(
    r"(?:CAPITAL LETTER|SMALL LETTER|SMALL CAPITAL|SYMBOL LETTER|MODIFIER LETTER SMALL) ([A-Z])$"
)
LEET = str.maketrans("4@35$07!|8+", "aaessotilbt")
LEET_SIGNS = re.compile(r"[4@35$017!|8+]")
ORDINARY = re.compile(r"^[#(\"']*(\d+([.,:]\d+)*[a-z]{0,3}|[a-z]+\d{0,4}|[a-z']+)[!.,?;:)\"'|]*$")
"""Words in which a digit or a sign is just that: 4th, 10kg, mp3, wow!"""
SPACED = re.compile(r"(?<![^\W_])[^\W_](?: [^\W_]){2,}(?![^\W_])")
SPACED_SHORT = re.compile(r"(?<=\s\s)[^\W_] [^\W_](?=\s\s|$)|^[^\W_] [^\W_](?=\s\s)")
MARKED = re.compile(r"(?<![^\W_])[^\W_](?:([._*~/|-])[^\W_])(?:\1[^\W_])*(?![^\W_])")
CUT = re.compile(r"(?<=[^\W\d_])[-._*~|](?=[^\W\d_])")
"""Letters apart by spaces (two between words), by marks; words that are cut by marks."""
BASE64 = re.compile(r"[A-Za-z0-9+/_-]{16,}={0,2}")
HEXADECIMAL = re.compile(r"(?<![^\W_])(?:(?:0x|\\x)?[0-9a-fA-F]{2}[ :,]?){12,}")
ESCAPES = re.compile(r"%[0-9a-fA-F]{2}|&#?\w+;|\\u[0-9a-fA-F]{4}")
COMMON = frozenset(
    [
        "the",
        "to",
        "of",
        "and",
        "in",
        "is",
        "how",
        "for",
        "what",
        "do",
        "i",
        "you",
        "can",
        "me",
        "my",
        "it",
        "that",
        "on",
        "with",
        "are",
        "write",
        "make",
        "be",
        "this",
        "an",
        "as",
        "from",
        "by",
        "or",
        "at",
        "without",
        "into",
        "about",
        "their",
        "get",
        "use",
        "using",
        "your",
        "people",
        "someone",
        "create",
        "give",
        "explain",
        "develop",
        "teach",
        "steps",
        "guide",
    ]
)
"""Words by which a reading shows to be English."""


@dataclass(frozen=True)
class View:
    """One reading of a text."""

    text: str
    """Folded: lower case, plain letters, single spaces."""
    through: str = ""
    """The disguise that was taken off; "" for the text as it stands."""


def views(text: str) -> tuple[View, ...]:
    """The readings of a text; the first is the text itself, folded."""
    found: dict[str, str] = {}
    _collect(text, "", DEPTH, found)
    return tuple(View(read, through) for read, through in found.items())


def _collect(text: str, through: str, depth: int, found: dict[str, str]) -> None:
    plain = fold(text)
    if len(found) >= MOST_VIEWS or (plain in found) or (through and not plain):
        return
    found[plain] = through
    for name, other in (("leet", _leet(plain, "i")), ("leet", _leet(plain, "l"))):
        found.setdefault(other, _chain(through, name))
    found.setdefault(fold(_joined(text)), _chain(through, "letters apart"))
    if depth:
        for name, decode in DECODERS.items():
            for other in decode(text)[:3]:
                _collect(other, _chain(through, name), depth - 1, found)


def _chain(through: str, name: str) -> str:
    return f"{through}, {name}" if through else name


# --- folding ------------------------------------------------------------------------------------


def fold(text: str) -> str:
    """Lower case and plain letters: NFKC, no accents, nothing invisible, no look-alikes, single spaces."""
    if not text.isascii():
        text = "".join(map(_character, unicodedata.normalize("NFKD", text)))
        latin = any("a" <= c <= "z" for c in text.lower())  # or it is just another language
        text = (re.sub(r"\S+", _latin, text) if latin else text).casefold()
    return " ".join(text.lower().split())


@lru_cache(maxsize=4096)
def _character(character: str) -> str:
    if character.isascii():
        return character
    kind = unicodedata.category(character)
    if kind in ("Cf", "Mn", "Me", "Cc") or character in "\u115f\u1160\u3164\u2800\ufffc":
        return ""  # formats, joiners, accents, fillers: nobody sees them
    named = NAMED.search(name := unicodedata.name(character, ""))
    if named and not name.startswith(("CYRILLIC", "GREEK", "COPTIC")):
        return named[1].lower()
    return character


def _latin(match: re.Match[str]) -> str:
    """A word in which all foreign letters have Latin look-alikes, with these."""
    word = match[0]
    if word.isascii():
        return word
    changed = word.translate(LOOKALIKES)
    mixed = re.search(r"[A-Za-z]", word) is not None
    return changed if mixed or changed.isascii() else word


# --- letters --------------------------------------------------------------------------------------


def _leet(text: str, one: str) -> str:
    """A folded text whose signs are read as letters, where a word has some of both."""
    words = text.split(" ")
    signed = [w for w in words if LEET_SIGNS.search(w)]
    odd = {w for w in signed if any(c.isalpha() for c in w) and not ORDINARY.match(w)}
    if not odd:
        return text
    read = set(signed) if len(odd) > 1 else odd  # who writes so writes "to" as 70
    return " ".join(w.replace("1", one).translate(LEET) if w in read else w for w in words)


def _joined(text: str) -> str:
    """Without what stands between the letters of a word; a text of few such marks stays."""
    for pattern in (MARKED, SPACED_SHORT, SPACED):
        text = pattern.sub(lambda m: re.sub(r"[^\w]|_", "", m[0]), text)
    return CUT.sub("", text) if len(CUT.findall(text)) > 3 else text


# --- codes ----------------------------------------------------------------------------------------


def _base64(text: str) -> list[str]:
    return _readable(BASE64, text, _from_base64)


def _from_base64(code: str) -> bytes:
    code = code.rstrip("=").replace("-", "+").replace("_", "/")
    return base64.b64decode(code[: len(code) - (len(code) % 4 == 1)] + "=" * (-len(code) % 4))


def _hexadecimal(text: str) -> list[str]:
    return _readable(
        HEXADECIMAL, text, lambda code: bytes.fromhex(re.sub(r"0x|\\x|[ :,]", "", code))
    )


def _readable(pattern: re.Pattern[str], text: str, decode: Callable[[str], bytes]) -> list[str]:
    """What the pieces of a text decode to, where that is text."""
    found = []
    for match in pattern.finditer(text):
        try:
            decoded = decode(match[0]).decode("utf-8")
        except (binascii.Error, ValueError):  # a long word, an image
            continue
        letters = sum(c.isalpha() or c == " " for c in decoded)
        if letters >= 0.7 * len(decoded) > 0:
            found.append(text[: match.start()] + " " + decoded + " " + text[match.end() :])
    return found


def _escapes(text: str) -> list[str]:
    if not ESCAPES.search(text):
        return []
    plain = html.unescape(unquote(text))
    return [re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), plain)]


def _rot13(text: str) -> list[str]:
    return _if_english(text, codecs.encode(text, "rot13"))


def _reversed(text: str) -> list[str]:
    return _if_english(text, text[::-1])


def _if_english(text: str, other: str) -> list[str]:
    """Another reading that holds more of the commonest words than the text does."""
    if not text:
        return []
    return [other] if _common(other) > max(1, _common(text)) else []


def _common(text: str) -> int:
    return sum(word in COMMON for word in text.lower().split())


DECODERS: dict[str, Callable[[str], list[str]]] = {
    "base64": _base64,
    "hexadecimal": _hexadecimal,
    "escapes": _escapes,
    "rot13": _rot13,
    "reversed": _reversed,
}
