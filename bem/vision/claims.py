"""What a text says of a picture: claims that can be checked against its patches.

    there is a yellow circle            there are exactly two blue squares       there is no red triangle
    a black square is present           a yellow circle is above a blue square   there are at least 3 circles

A question, a condition or a doubt claims nothing. What has another form is not read: it is no claim, and neither
supports nor contradicts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

NUMBERS = {
    word: n
    for n, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}
RELATIONS = {
    "left of": "left of", "to the left of": "left of", "right of": "right of", "to the right of": "right of",
    "above": "above", "over": "above", "below": "below", "under": "below", "beneath": "below",
}  # fmt: skip
MANY = 1 << 20
_DOUBT = re.compile(
    r"\b(if|whether|unless|suppose|imagine|doubt|maybe|perhaps|should|would|could|might|unlikely|false|not)\b"
)
_COUNT = rf"(?P<how>exactly |at least |at most |only )?(?P<n>no|an?|one|some|\d{{1,2}}|{'|'.join(NUMBERS)})"
_NOUN = r"(?P<noun>[a-z]+(?: [a-z]+){0,2}?)"
_THERE = re.compile(rf"^there (?:is|are) {_COUNT} {_NOUN}$")
_PRESENT = re.compile(
    rf"^{_COUNT} {_NOUN} (?:is|are) (?:present|visible|shown|there|in the picture|in the image)$"
)
_AND = re.compile(rf"^{_COUNT} {_NOUN}$")
_RELATION = re.compile(
    rf"^(?:there is )?(?:an?|the) (?P<one>[a-z]+(?: [a-z]+)??) (?:is )?(?P<how>{'|'.join(sorted(RELATIONS, key=len, reverse=True))})"
    r" (?:an?|the) (?P<other>[a-z]+(?: [a-z]+)?)$"
)


@dataclass(frozen=True)
class Claim:
    """So many things that a phrase names; or one thing that stands so to another."""

    text: str
    phrase: str
    """Singular, lower case: `yellow circle`."""
    least: int = 1
    most: int = MANY
    relation: str = ""
    """One of `RELATIONS`' values; "": the claim is a count."""
    other: str = ""
    """What the relation is to."""

    @property
    def phrases(self) -> tuple[str, ...]:
        """All that it names."""
        return (self.phrase, self.other) if self.relation else (self.phrase,)

    @property
    def positive(self) -> bool:
        """Does it say that something is there?"""
        return bool(self.relation) or self.least > 0


def claims_in(text: str, most: int = 16) -> list[Claim]:
    """The claims that a text makes, in their order, the first `most` of them."""
    found: list[Claim] = []
    for sentence in re.findall(r"[^.;!?\n]+[.;!?\n]?", text.lower()[:20_000]):
        said = " ".join(sentence.rstrip(".;!\n ").replace(",", " ").split())
        if said.endswith("?") or _DOUBT.search(said):
            continue
        found += _of_sentence(said)
        if len(found) >= most:
            break
    return found[:most]


def _of_sentence(said: str) -> list[Claim]:
    if match := _RELATION.match(said):
        one, other = (singular(match[name]) for name in ("one", "other"))
        return [Claim(said, one, relation=RELATIONS[match["how"]], other=other)]
    if match := _PRESENT.match(said):
        return [_counted(said, match)]
    first, *rest = said.split(" and ")
    match = _THERE.match(first)
    if not match:
        return []
    matches = [match, *(_AND.match(part) for part in rest)]
    return [_counted(said, m) for m in matches if m]


def _counted(said: str, match: re.Match[str]) -> Claim:
    word, how = match["n"], (match["how"] or "").strip()
    phrase = singular(match["noun"])
    if word == "no":
        return Claim(said, phrase, 0, 0)
    n = 1 if word in ("a", "an", "some") else NUMBERS.get(word, -1)
    n = int(word) if n < 0 else n
    if how == "at most":
        return Claim(said, phrase, 0, n)
    if how == "at least" or (not how and word in ("a", "an", "some")):
        return Claim(said, phrase, n)
    return Claim(said, phrase, n, n)


def singular(noun: str) -> str:
    """`yellow circles` -> `yellow circle`."""
    return noun[:-1] if noun.endswith("s") and not noun.endswith("ss") else noun
