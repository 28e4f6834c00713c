"""Streams whose world changes: what `online.py` is measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from bem.tasks.embedded import EMBEDDED, embedded
from bem.tasks.public import public
from bem.training.example import Example


@dataclass(frozen=True)
class Stream:
    """Where rows come from, and how answers are scored."""

    about: str
    metric: str
    parts: Callable[[str | None], list[list[Example]]]
    """Pools of rows: first what is known, then what comes."""
    longest: int = 64
    """Tokens of a row, its answer included; longer ones are left out."""


def by(key: str, names: list[str], task: str) -> Callable[[str | None], list[list[Example]]]:
    """Parts of a public set by a field."""

    def parts(data: str | None) -> list[list[Example]]:
        rows = public(task, _needed(data), "train")
        return [[r for r in rows if r.meta[key] == name] for name in names]

    return parts


def by_date(data: str | None) -> list[list[Example]]:
    """Commands, the older half and the newer one, without the text about the tool."""
    dated = [r for r in public("cmd_tldr", _needed(data), "train") if r.meta["since"]]
    rows = [replace(r, evidence=(), gold_evidence=()) for r in dated]
    rows.sort(key=lambda r: r.meta["since"])
    half = len(rows) // 2
    return [rows[:half], rows[half:]]


def of_functions(_: str | None) -> list[list[Example]]:
    """Tasks made from the standard library."""
    names = ("sig2doc", "sig2json")
    return [
        [replace(r, instruction=EMBEDDED[n].instruction, task=n) for r in embedded(n, "train")]
        for n in names
    ]


STREAMS = {
    "clinc": Stream(
        "intents: travel, then banking",
        "exact",
        by("domain", ["travel", "banking"], "intent_clinc150"),
    ),
    "rnnlg": Stream(
        "dialogue acts in words: restaurant, then laptop",
        "tokens",
        by("domain", ["restaurant", "laptop"], "gen_rnnlg"),
    ),
    "tldr": Stream("shell commands, the older half, then the newer", "tokens", by_date),
    "embedded": Stream(
        "docstring of a `def` line, then its arguments as JSON", "tokens", of_functions
    ),
}


def _needed(data: str | None) -> str:
    if data is None:
        raise SystemExit("this stream needs --data DIR; `--streams embedded` does not.")
    return data
