"""Where in a long text a query is talked about: the part worth reading."""

from __future__ import annotations

import re
from collections.abc import Mapping

from bem.evidence import bm25

SLICE = 1 << 16
"""Characters searched at once; a regular expression holds Python's lock while it runs."""


def around_matches(query: str, text: str, size: int) -> str:
    """At most `size` characters of a text: those around the densest run of the query's words."""
    if len(text) <= size:
        return text
    found = bm25.words(query[:1000])
    content = [word for word in found if word not in bm25.FUNCTION_WORDS] or found
    start = densest(dict.fromkeys(content, 1.0), text, size)
    return text[start : start + size]


def densest(weights: Mapping[str, float], text: str, size: int) -> int:
    """Character at which the `size` characters with the most weight of distinct terms begin.

    Args:
        weights: weight of each term, by the words that look for it: {"nobel": 7.1}.
        text: of any length; read in slices, so that other threads get their turn.
    """
    stems = bm25.stem(list(weights))
    by_stem = dict(zip(stems, weights.values(), strict=True))
    prefixes = {_shared(word, stem) for word, stem in zip(weights, stems, strict=True)}
    wanted = "|".join(re.escape(p) for p in sorted(prefixes, key=len, reverse=True) if p)
    if not wanted:
        return 0
    term = re.compile(rf"(?<![^\W_])(?:{wanted})[^\W_]{{0,20}}", re.IGNORECASE)
    step = max(1, size // 4)
    cells: dict[int, dict[str, float]] = {}
    for start in range(0, len(text), SLICE):
        found = list(term.finditer(text, start, min(len(text), start + SLICE)))
        for match, key in zip(found, bm25.stem([m.group().casefold() for m in found]), strict=True):
            if key in by_stem:
                cells.setdefault(match.start() // step, {})[key] = by_stem[key]
    held = {
        cell: sum({**terms, **cells.get(cell + 1, {})}.values()) for cell, terms in cells.items()
    }
    if not held:
        return 0
    best = max(held, key=lambda cell: (held[cell], -cell))
    return max(0, min(best * step - step, len(text) - size))


def _shared(word: str, stem: str) -> str:
    """Longest common beginning: "happily" and its stem "happili" share "happil"."""
    n = next((i for i, (a, b) in enumerate(zip(word, stem, strict=False)) if a != b), len(stem))
    return word[:n]
