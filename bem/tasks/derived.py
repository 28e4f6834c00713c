"""Rows of the public tasks, made from the rows of a public set's file.

A maker takes all rows of one side and gives those of the task; what it needs of them (a meta field, an
answer that is JSON) the sets' files have.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from bem.errors import DataError
from bem.training.data import Example

FILLER_CHARACTERS = 320
"""Other rows between cue and question: more than 64 tokens even at 4.8 characters per token."""


def first_acceptable(rows: list[Example]) -> Iterator[Example]:
    """BFCL gives the acceptable values of each argument: the first of each makes the answer, the
    whole map stays as a second reference for the form "tool".

    An argument whose first acceptable value is "" may be left out, and is.
    """
    for row in rows:
        (reference,) = row.references
        if reference != "none":
            call = {
                name: {k: v[0] for k, v in arguments.items() if v and v[0] != ""}
                for name, arguments in json.loads(reference).items()
            }
            row = replace(row, references=(json.dumps(call, ensure_ascii=False), reference))
        yield row


def with_gold(rows: list[Example]) -> Iterator[Example]:
    """Every passage of these rows is a gold one."""
    for row in rows:
        yield replace(row, gold_evidence=tuple(range(len(row.evidence))))


def scene_in_words(rows: list[Example]) -> Iterator[Example]:
    """NLVR's scene as text: each box lists its shapes with colour, place and size."""
    for row in rows:
        boxes = tuple(
            f"box {number}: "
            + (", ".join(f"{c} {s} at {x},{y} size {d}" for s, c, x, y, d in box) or "empty")
            for number, box in enumerate(row.meta["boxes"], 1)
        )
        yield replace(row, evidence=boxes, gold_evidence=(), meta={})


# --- a cue, other rows, then the question ---------------------------------------------------------


def _conflicting(
    rows: list[Example], cues: dict[str, tuple[str, ...]], asked: Callable[[Example], list[str]]
) -> Iterator[tuple[Example, str, str]]:
    """(row, what is asked, prompt): a cue, then other inputs of the set, then the row's input."""
    if len({row.input for row in rows}) < 2:
        raise DataError("Two different inputs are needed: one stands between cue and question.")
    for row in rows:
        for ask in asked(row):
            rng = random.Random(f"{row.id} {ask}")
            filler: list[str] = []
            while sum(map(len, filler)) < FILLER_CHARACTERS:
                other = rows[rng.randrange(len(rows))]
                if other.input != row.input:
                    filler.append(_bare(other.input))
            prompt = "\n".join([rng.choice(cues[ask]), *filler, "", _bare(row.input)])
            yield row, ask, prompt


def _bare(text: str) -> str:
    """A dialogue act without its domain; any other text as it is."""
    return re.sub(r"^(restaurant|hotel|tv|laptop) (?=\??\w+\()", "", text)


SNIPS_CUES = {
    "json": ("Answer in JSON.", "Intent and slots as an object.", "Structured output, please."),
    "intent": ("Name the intent only.", "What kind of request is it?", "One word: the intent."),
    "slots": ("List the slots.", "Slot lines only.", "Which details are given, and what for?"),
}


def snips_forms(rows: list[Example]) -> Iterator[Example]:
    for row, ask, prompt in _conflicting(rows, SNIPS_CUES, lambda _: list(SNIPS_CUES)):
        parsed = json.loads(row.references[0])
        lines = [f"{name}: {value}" for name, value in parsed["slots"].items()]
        answer, form = {
            "json": (row.references[0], "json"),
            "intent": (parsed["intent"], "label"),
            "slots": ("\n".join(lines) or "none", "text"),
        }[ask]
        meta = {"ask": ask, "form": form, "bare": _bare(row.input)}
        yield Example(f"{row.id}:{ask}", prompt, (answer,), group=row.id, meta=meta)


RNNLG_CUES = {
    "restaurant": ("Speak about restaurants.", "It is about places to eat.", "Topic: restaurant."),
    "hotel": ("Speak about hotels.", "It is about places to stay.", "Topic: hotel."),
    "tv": ("Speak about televisions.", "It is about TV sets.", "Topic: television."),
    "laptop": ("Speak about laptops.", "It is about notebook computers.", "Topic: laptop."),
}


def rnnlg_styles(rows: list[Example]) -> Iterator[Example]:
    for row, domain, prompt in _conflicting(rows, RNNLG_CUES, lambda r: [r.meta["domain"]]):
        meta = {"ask": domain, "form": "text", "bare": _bare(row.input)}
        yield replace(row, input=prompt, group=row.input, meta=meta, evidence=())
