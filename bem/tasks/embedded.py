"""Tasks from the text that every Python installation carries: the standard library's own sources.

Nothing is shipped and nothing is made up: a function's `def` line, its docstring and its body are
read with `ast` when first needed, and asked about. Split by top-level module (`split_of`), so that
a held-out module gives no training row; a held-out `def` line that also occurs on the train side is
not asked. The cluster of the statistics is the source file.

    doc2name   a docstring line and four `def` lines -> the name of the one described
    sig2json   a `def` line -> {"name": ..., "args": [...]}
    sig2doc    a `def` line -> the first line of its docstring
    continue   the beginning of a function -> its next lines
    lookup     a function's name and module, or a docstring line -> its arguments, which only a
               retrieved passage can tell
    forms      a cue, then other code, then a `def` line -> the form that the cue asked for
    switch     a conversation of three such turns, each with another cue

In `forms` and `switch` the end of the prompt is the same whatever is asked: the form can only be
known from what stood at least one chunk (64 tokens) earlier.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

from bem.config import RetrievalConfig
from bem.tasks.asks import ASKS, as_json
from bem.tasks.functions import Function, Part, functions
from bem.tasks.record import ANSWER_METRICS, STRUCTURE_METRICS, TEXT_METRICS, Family
from bem.training.data import Example

FILLER_CHARACTERS = 264
"""Other code between cue and question: more than 64 tokens even at 4 characters per token."""
PASSAGE_CHARACTERS = 200
"""Of a function in the index of `lookup`."""


def _rng(*key: str) -> random.Random:
    return random.Random(" ".join(key))


def _filler(rng: random.Random, function: Function, others: Sequence[Function]) -> str:
    """Real code of the same file, or of the same side, that is not the function itself."""
    lines: list[str] = []
    while sum(map(len, lines)) < FILLER_CHARACTERS:
        other = others[rng.randrange(len(others))]
        if other.name == function.name:
            continue
        lines.append(other.header)
        for line in other.body[:8]:
            if sum(map(len, lines)) >= FILLER_CHARACTERS:
                break
            lines.append(line[:100])
    return "\n".join(line for line in lines if line.strip())


def _question(cue: str, filler: str, function: Function) -> str:
    return f"{cue}\n{filler}\n\n{function.header}"


# ---------------------------------------------------------------------------------------- families


def _doc2name(pool: list[Function]) -> Iterator[Example]:
    by_file = _by_file(pool)
    for function in pool:
        if not function.doc:
            continue
        rng = _rng("doc2name", function.id)
        others = [f for f in by_file[function.module] if f.name != function.name]
        if len(others) < 3:
            continue
        candidates = [function, *rng.sample(others, 3)]
        rng.shuffle(candidates)
        yield Example(
            id=function.id,
            input=function.doc,
            references=(function.name,),
            evidence=tuple(f.header for f in candidates),
            gold_evidence=(candidates.index(function),),
            group=function.module,
        )


def _sig2json(pool: list[Function]) -> Iterator[Example]:
    for f in pool:
        yield Example(f.id, f.header, (as_json(f),), group=f.module)


def _sig2doc(pool: list[Function]) -> Iterator[Example]:
    for f in pool:
        if f.doc:
            yield Example(f.id, f.header, (f.doc,), group=f.module)


def _continue(pool: list[Function]) -> Iterator[Example]:
    for f in pool:
        lines = [line for line in f.body if line.strip()]
        cut = max(2, min(10, len(lines) // 2))
        rest = "\n".join(lines[cut : cut + 3]).strip()
        if len(lines) < 5 or not 20 <= len(rest) <= 160:
            continue
        shown = [f.header, *([f'    """{f.doc}"""'] if f.doc else []), *lines[:cut]]
        yield Example(f.id, "\n".join(shown)[-700:], (rest,), group=f.module)


def _lookup(pool: list[Function]) -> Iterator[Example]:
    for function in pool:
        if len(function.args) < 2:  # `self` alone can be guessed
            continue
        by = "name" if not function.doc or _rng("lookup", function.id).random() < 0.5 else "doc"
        module = function.module.rsplit(".", 1)[-1]
        yield Example(
            id=function.id,
            input=function.doc if by == "doc" else f"{function.name} of {module}",
            references=(", ".join(function.args),),
            evidence=(_passage(function),),
            gold_evidence=(0,),
            group=function.module,
            meta={"by": by},
        )


def _passage(function: Function) -> str:
    """What an index of the code holds: module, `def` line and the first lines of the body."""
    body = " ".join(line.strip() for line in function.body[:3] if line.strip())
    return f"{function.module}: {function.header} {body}"[:PASSAGE_CHARACTERS].rstrip()


def _askable(pool: list[Function]) -> list[Function]:
    """Functions of several words and arguments on which all forms differ."""

    def tells_forms_apart(f: Function) -> bool:
        several = "_" in f.name.strip("_") and len(f.args) >= 2 and len(f.header) < 90
        return several and len({ask.answer(f) for ask in ASKS.values()}) == len(ASKS)

    return [f for f in pool if tells_forms_apart(f)]


def _forms(pool: list[Function]) -> Iterator[Example]:
    by_file = _by_file(pool)
    for function in _askable(pool):
        for ask_name, ask in ASKS.items():
            rng = _rng("forms", function.id, ask_name)
            filler = _filler(rng, function, _neighbours(function, by_file, pool))
            yield Example(
                id=f"{function.id}:{ask_name}",
                input=_question(rng.choice(ask.cues), filler, function),
                references=(ask.answer(function),),
                group=function.module,
                meta={"ask": ask_name, "form": ask.form, "bare": function.header},
            )


def _switch(pool: list[Function]) -> Iterator[Example]:
    by_file = _by_file(pool)
    askable = _askable(pool)
    for function in askable:
        rng = _rng("switch", function.id)
        same_file = [f for f in askable if f.module == function.module and f is not function]
        others = same_file if len(same_file) >= 2 else [f for f in askable if f is not function]
        turns = [*rng.sample(others, 2), function]
        names = rng.sample(sorted(ASKS), 3)
        asked = []
        for turn, ask_name in zip(turns, names, strict=True):
            filler = _filler(rng, turn, _neighbours(turn, by_file, pool))
            ask = ASKS[ask_name]
            asked.append((_question(rng.choice(ask.cues), filler, turn), ask.answer(turn)))
        yield Example(
            id=function.id,
            input=asked[-1][0],
            references=(asked[-1][1],),
            group=function.module,
            history=tuple(asked[:-1]),
            meta={"ask": names[-1], "form": ASKS[names[-1]].form},
        )


def _by_file(pool: list[Function]) -> dict[str, list[Function]]:
    files: dict[str, list[Function]] = defaultdict(list)
    for function in pool:
        files[function.module].append(function)
    return files


def _neighbours(
    function: Function, by_file: dict[str, list[Function]], pool: list[Function]
) -> list[Function]:
    others = [f for f in by_file[function.module] if f.name != function.name and f.body]
    return others if len(others) >= 3 else pool


EMBEDDED: dict[str, Family] = {
    "doc2name": Family(
        "which of four functions does a docstring describe",
        form="name",
        metrics=ANSWER_METRICS,
        primary="em",
        max_new_tokens=20,
        instruction="Which function is described?",
    ),
    "sig2json": Family(
        "def line to JSON",
        form="json",
        metrics=STRUCTURE_METRICS,
        primary="em",
        max_new_tokens=64,
        instruction="Signature as JSON:",
    ),
    "sig2doc": Family(
        "def line to the first line of its docstring",
        form="text",
        metrics=TEXT_METRICS,
        primary="chrf",
        max_new_tokens=32,
        instruction="Write the docstring:",
    ),
    "lookup": Family(
        "arguments of a function, from retrieved code",
        form="names",
        metrics=ANSWER_METRICS,
        primary="em",
        max_new_tokens=40,
        instruction="Which arguments, in order?",
        slice_by=("by",),
        retrieval=RetrievalConfig(candidates=10, shown=2, withheld=0.2),
    ),
    "continue": Family(
        "next lines of a function",
        form="code",
        metrics=("loss", "chrf"),
        primary="loss",
        max_new_tokens=48,
        instruction="Continue the code:",
    ),
    "forms": Family(
        "one of six forms of a def line, asked for one chunk earlier",
        form="text",
        metrics=STRUCTURE_METRICS,
        primary="em",
        max_new_tokens=48,
        slice_by=("ask",),
    ),
    "switch": Family(
        "three turns, each asking for another form",
        form="text",
        metrics=STRUCTURE_METRICS,
        primary="em",
        max_new_tokens=48,
        slice_by=("ask",),
    ),
}

_MAKERS: dict[str, Callable[[list[Function]], Iterator[Example]]] = {
    "doc2name": _doc2name,
    "sig2json": _sig2json,
    "sig2doc": _sig2doc,
    "lookup": _lookup,
    "continue": _continue,
    "forms": _forms,
    "switch": _switch,
}


@lru_cache(maxsize=32)
def embedded(name: str, part: Part) -> tuple[Example, ...]:
    """All examples of a family on one side, in a fixed order."""
    return tuple(_MAKERS[name](functions()[part]))
