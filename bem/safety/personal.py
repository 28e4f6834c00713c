"""Personal data in a text: patterns with check digits, ranges and words around them.

Presidio's kinds and rules (github.com/microsoft/presidio, MIT), with the standard library alone. What a
pattern cannot know (names, places) is not found.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

CONTEXT = 48
"""Characters before a match in which its words are looked for."""


@dataclass(frozen=True)
class PersonalData:
    """One find, in the text as it was given."""

    kind: str
    """email, card, iban, ssn, ip or phone."""
    start: int
    end: int


@dataclass(frozen=True)
class Kind:
    """How one kind of data looks, and what makes a match believable."""

    pattern: re.Pattern[str]
    valid: Callable[[str], bool] = lambda _: True
    context: re.Pattern[str] | None = None
    """Words of which one must stand just before it; None: the form says enough."""


def find_personal(text: str) -> list[PersonalData]:
    """All personal data in a text, from left to right, without overlaps; the surest kinds go first."""
    taken: list[PersonalData] = []
    for name, kind in KINDS.items():
        for start, end in _matches(text, kind):
            kept = name.partition(" ")[0]
            if all(end <= other.start or start >= other.end for other in taken):
                taken.append(PersonalData(kept, start, end))
    return sorted(taken, key=lambda found: found.start)


def redact(text: str, found: list[PersonalData]) -> str:
    """The text with each find replaced by its kind in brackets."""
    for each in sorted(found, key=lambda f: -f.start):
        text = f"{text[: each.start]}[{each.kind}]{text[each.end :]}"
    return text


def _matches(text: str, kind: Kind) -> Iterator[tuple[int, int]]:
    for match in kind.pattern.finditer(text):
        before = text[max(0, match.start() - CONTEXT) : match.start()]
        told = kind.context is None or kind.context.search(before)
        if told and kind.valid(match[0]):
            yield match.span()


def _digits(text: str) -> str:
    return re.sub(r"\D", "", text)


def luhn(number: str) -> bool:
    """Luhn's check (ISO/IEC 7812-1) over the digits of a card number of 12 to 19 digits."""
    digits = [int(d) for d in _digits(number)][::-1]
    if not 12 <= len(digits) <= 19 or len(set(digits)) == 1:
        return False
    doubled = (sum(divmod(2 * d, 10)) for d in digits[1::2])
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0


def iban(number: str) -> bool:
    """The check of ISO 13616: the rearranged number is 1 modulo 97."""
    plain = re.sub(r"[ -]", "", number).upper()
    if not 15 <= len(plain) <= 34:
        return False
    return int("".join(str(int(c, 36)) for c in plain[4:] + plain[:4])) % 97 == 1


def ssn(number: str) -> bool:
    """Ranges that the US Social Security Administration issues."""
    area, group, serial = (digits := _digits(number))[:3], digits[3:5], digits[5:]
    return area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"


def _ip(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address.partition("/")[0])
    except ValueError:
        return False
    return not (parsed.is_unspecified or parsed.is_loopback)


def _phone(number: str) -> bool:
    digits = _digits(number)
    return 7 <= len(digits) <= 15 and len(set(digits)) > 1 and not _looks_like_date(number)


def _looks_like_date(number: str) -> bool:
    return re.fullmatch(r"(\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4})", number) is not None  # fmt: skip


PHONE_WORDS = re.compile(
    r"\b(phone|call(ed)?|cell|mobile|tel(ephone)?|fax|text(ed)?|number|ring|contact|reach|dial|whatsapp|sms)\b",
    re.IGNORECASE,
)
CARD_WORDS = re.compile(r"\b(card|visa|master|amex|credit|debit|payment|pay)\b", re.IGNORECASE)
SSN_WORDS = re.compile(r"\b(ssn|social security|social-security|security n)", re.IGNORECASE)
NUMBER = r"(?<![\w.-]){}(?![\w-])"

KINDS: dict[str, Kind] = {
    "email": Kind(
        re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
    ),
    "iban": Kind(re.compile(NUMBER.format(r"[A-Za-z]{2}\d{2}(?:[ -]?[A-Za-z0-9]{1,4}){3,9}")), iban),
    "card": Kind(re.compile(NUMBER.format(r"\d(?:[ -]?\d){11,18}")), luhn),
    "ssn": Kind(re.compile(NUMBER.format(r"\d{3}[- ]\d{2}[- ]\d{4}")), ssn),
    "ssn without dashes": Kind(re.compile(NUMBER.format(r"\d{9}")), ssn, SSN_WORDS),
    "ip": Kind(
        re.compile(
            r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|(?:[0-9a-fA-F]{0,4}:){2,7}[0-9a-fA-F]{0,4})(?:/\d{1,3})?(?![\w:]|\.\d)"
        ),
        _ip,
    ),
    "phone with country": Kind(
        re.compile(r"(?<![\w+])\+\d{1,3}[ .()/-]{0,2}\d(?:[ .()/-]{0,2}\d){5,12}(?!\w)"), _phone
    ),
    "phone in parts": Kind(
        re.compile(NUMBER.format(r"(?:1[ .-])?\(?\d{3}\)?[ .-]{1,2}\d{3}[ .-]\d{4}(?:x\d{1,5})?")), _phone
    ),
    "phone": Kind(
        re.compile(r"(?<![\w.$€£-])\(?\d(?:[ .()/-]{0,2}\d){6,13}(?:x\d{1,5})?(?!\w)"), _phone, PHONE_WORDS
    ),
}  # fmt: skip
"""Surest first: what one kind has taken, no later one takes."""
