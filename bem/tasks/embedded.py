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

import ast
import gzip
import hashlib
import json
import os
import random
import re
import sys
import sysconfig
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from bem.config import RetrievalConfig
from bem.errors import DataError
from bem.tasks.record import ANSWER_METRICS, STRUCTURE_METRICS, TEXT_METRICS, Family
from bem.training.data import Example

Part = Literal["train", "dev", "test"]

SKIPPED = {"test", "tests", "idle_test", "lib2to3", "idlelib", "this", "antigravity"} | {
    "pydoc_data",  # a table of help texts
    "encodings",  # hundreds of generated tables
}
FILLER_CHARACTERS = 264
"""Other code between cue and question: more than 64 tokens even at 4 characters per token."""


PASSAGE_CHARACTERS = 200
"""Of a function in the index of `lookup`."""


def split_of(module: str) -> Part:
    """Side of a top-level module. A hash, not a list: a new module has a side at once.

    `scripts/pretraining_mixture.py` follows the same rule, so the shipped base never read a
    held-out module.
    """
    bucket = int(hashlib.md5(module.encode()).hexdigest(), 16) % 10
    return {0: "test", 1: "dev"}.get(bucket, "train")  # type: ignore[return-value]


# ---------------------------------------------------------------------------------------- functions


@dataclass(frozen=True)
class Function:
    """A function as it stands in a source file."""

    module: str
    """Dotted name of the file: `concurrent.futures.thread`."""
    name: str
    header: str
    """The `def` line on one line."""
    args: tuple[str, ...]
    doc: str
    """First line of the docstring; "" if it has none."""
    body: tuple[str, ...]
    """Lines after the docstring, as indented below an unindented `def`."""

    @property
    def id(self) -> str:
        return f"{self.module}:{self.name}"


@lru_cache(maxsize=1)
def functions() -> dict[Part, list[Function]]:
    """Every usable function of the standard library by side, in a fixed order.

    Raises:
        DataError: this Python has no sources (a zipped or stripped installation).
    """
    cached = _cache_file()
    found = _read_cache(cached) or sorted(_functions(), key=lambda f: (f.module, f.name))
    if not found:
        raise DataError(
            f"No standard library sources in {sysconfig.get_paths()['stdlib']}. "
            "Use data.root with the public sets, or JSONL files of your own."
        )
    _write_cache(cached, found)
    sides: dict[Part, list[Function]] = {"train": [], "dev": [], "test": []}
    asked: set[tuple[str, str]] = set()
    for part in ("train", "dev", "test"):
        for function in found:
            if split_of(function.module.split(".")[0]) != part:
                continue
            key = (function.name, re.sub(r"\W", "", function.header))
            if key not in asked:
                asked.add(key)
                sides[part].append(function)
    return sides


def _functions() -> Iterator[Function]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for module in sorted(sys.stdlib_module_names - SKIPPED):
        single = root / f"{module}.py"
        files = [single] if single.exists() else sorted((root / module).rglob("*.py"))
        for file in files:
            parts = file.relative_to(root).with_suffix("").parts
            if SKIPPED & set(parts) or any("site-packages" in part for part in parts):
                continue
            dotted = ".".join(part for part in parts if part != "__init__")
            try:
                source = file.read_text(encoding="utf-8")
                tree = ast.parse(source)
            except (OSError, UnicodeDecodeError, SyntaxError):
                continue
            yield from _functions_in(tree, source.splitlines(), dotted)


def _functions_in(tree: ast.Module, lines: list[str], module: str) -> Iterator[Function]:
    seen: set[str] = set()
    for node in _definitions(tree.body):
        if node.name.startswith("__") or node.name in seen:
            continue
        first = node.body[0]
        header = " ".join(line.strip() for line in lines[node.lineno - 1 : first.lineno - 1])
        args = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
        args += [node.args.vararg.arg] if node.args.vararg else []
        args += [a.arg for a in node.args.kwonlyargs]
        args += [node.args.kwarg.arg] if node.args.kwarg else []
        plain = header.isascii() and header.endswith(":") and "#" not in header
        if not plain or not args or len(header) > 120 or len(node.name) < 4:
            continue
        doc = (ast.get_docstring(node) or "").strip().split("\n")[0].strip()
        has_doc = ast.get_docstring(node) is not None
        start = (first.end_lineno or 0) if has_doc else first.lineno - 1
        body = textwrap.dedent("\n".join(lines[start : node.end_lineno])).splitlines()
        seen.add(node.name)
        yield Function(
            module,
            node.name,
            header,
            tuple(args),
            doc if doc.isascii() and 15 <= len(doc) <= 120 else "",
            tuple(f"    {line}" if line else "" for line in body),
        )


def _definitions(statements: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    """Functions and methods; `ast.walk` would look into every expression, at six times the cost."""
    for statement in statements:
        if isinstance(statement, ast.FunctionDef):
            yield statement
        for block in ("body", "orelse", "finalbody"):
            if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _definitions(getattr(statement, block, []))


def _cache_file() -> Path:
    """Where the parsed functions are kept, by Python version and by what this file does."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    here = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    version = "{}.{}.{}".format(*sys.version_info[:3])
    return home / "bem" / f"embedded-{version}-{here}.json.gz"


def _read_cache(path: Path) -> list[Function]:
    try:
        rows = json.loads(gzip.decompress(path.read_bytes()))
        return [
            Function(**{**row, "args": tuple(row["args"]), "body": tuple(row["body"])})
            for row in rows
        ]
    except (OSError, EOFError, ValueError, TypeError, KeyError):
        return []  # no cache, or not ours: parse again


def _write_cache(path: Path, found: list[Function]) -> None:
    if path.exists():
        return
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(gzip.compress(json.dumps([asdict(f) for f in found]).encode(), 1))
        draft.replace(path)
    except OSError:
        return  # only a convenience


# ------------------------------------------------------------------------------------------- forms


def as_json(function: Function) -> str:
    return json.dumps({"name": function.name, "args": list(function.args)})


def as_call(function: Function) -> str:
    return f"{function.name}({', '.join(function.args)})"


@dataclass(frozen=True)
class Ask:
    """A form in which the same `def` line can be asked for."""

    form: str
    """Key of scoring.FORMS."""
    answer: Callable[[Function], str]
    cues: tuple[str, ...]


ASKS: dict[str, Ask] = {
    "json": Ask(
        "json",
        as_json,
        ("Reply as JSON.", "Give name and args as a JSON object.", "Structured output, please."),
    ),
    "last": Ask(
        "name",
        lambda f: f.args[-1],
        ("Reply with the last argument.", "Only the final parameter.", "Which argument ends it?"),
    ),
    "name": Ask(
        "name",
        lambda f: f.name,
        ("Reply with the name.", "Only what the function is called.", "Name it."),
    ),
    "kind": Ask(
        "label",
        lambda f: "method" if f.args[0] in ("self", "cls") else "function",
        ("Method or function?", "Does it belong to a class?", "Reply with its kind."),
    ),
    "count": Ask(
        "number",
        lambda f: str(len(f.args)),
        ("Count the arguments.", "How many parameters?", "Reply with the number of arguments."),
    ),
    "call": Ask(
        "call",
        as_call,
        ("Write the call.", "How is it called with its own names?", "Reply as a call."),
    ),
}


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


def _doc2name(found: list[Function]) -> Iterator[Example]:
    by_file = _by_file(found)
    for function in found:
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


def _sig2json(found: list[Function]) -> Iterator[Example]:
    for f in found:
        yield Example(f.id, f.header, (as_json(f),), group=f.module)


def _sig2doc(found: list[Function]) -> Iterator[Example]:
    for f in found:
        if f.doc:
            yield Example(f.id, f.header, (f.doc,), group=f.module)


def _continue(found: list[Function]) -> Iterator[Example]:
    for f in found:
        lines = [line for line in f.body if line.strip()]
        cut = max(2, min(10, len(lines) // 2))
        rest = "\n".join(lines[cut : cut + 3]).strip()
        if len(lines) < 5 or not 20 <= len(rest) <= 160:
            continue
        shown = [f.header, *([f'    """{f.doc}"""'] if f.doc else []), *lines[:cut]]
        yield Example(f.id, "\n".join(shown)[-700:], (rest,), group=f.module)


def _lookup(found: list[Function]) -> Iterator[Example]:
    for function in found:
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


def _askable(found: list[Function]) -> list[Function]:
    """Functions of several words and arguments on which all forms differ."""

    def tells_forms_apart(f: Function) -> bool:
        several = "_" in f.name.strip("_") and len(f.args) >= 2 and len(f.header) < 90
        return several and len({ask.answer(f) for ask in ASKS.values()}) == len(ASKS)

    return [f for f in found if tells_forms_apart(f)]


def _forms(found: list[Function]) -> Iterator[Example]:
    by_file = _by_file(found)
    for function in _askable(found):
        for ask_name, ask in ASKS.items():
            rng = _rng("forms", function.id, ask_name)
            filler = _filler(rng, function, _neighbours(function, by_file, found))
            yield Example(
                id=f"{function.id}:{ask_name}",
                input=_question(rng.choice(ask.cues), filler, function),
                references=(ask.answer(function),),
                group=function.module,
                meta={"ask": ask_name, "form": ask.form, "bare": function.header},
            )


def _switch(found: list[Function]) -> Iterator[Example]:
    by_file = _by_file(found)
    askable = _askable(found)
    for function in askable:
        rng = _rng("switch", function.id)
        same_file = [f for f in askable if f.module == function.module and f is not function]
        pool = same_file if len(same_file) >= 2 else [f for f in askable if f is not function]
        turns = [*rng.sample(pool, 2), function]
        names = rng.sample(sorted(ASKS), 3)
        asked = []
        for turn, ask_name in zip(turns, names, strict=True):
            filler = _filler(rng, turn, _neighbours(turn, by_file, found))
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


def _by_file(found: list[Function]) -> dict[str, list[Function]]:
    files: dict[str, list[Function]] = defaultdict(list)
    for function in found:
        files[function.module].append(function)
    return files


def _neighbours(
    function: Function, by_file: dict[str, list[Function]], found: list[Function]
) -> list[Function]:
    others = [f for f in by_file[function.module] if f.name != function.name and f.body]
    return others if len(others) >= 3 else found


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
