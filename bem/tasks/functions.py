"""Every function of this Python's standard library, by the side (train, dev, test) of its module."""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import os
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from bem.errors import DataError
from bem.files import write_bytes

Part = Literal["train", "dev", "test"]

SKIPPED = {"test", "tests", "idle_test", "lib2to3", "idlelib", "this", "antigravity"} | {
    "pydoc_data",  # a table of help texts
    "encodings",  # hundreds of generated tables
}


def split_of(module: str) -> Part:
    """Side of a top-level module. A hash, not a list: a new module has a side at once.

    `scripts/pretraining_mixture.py` follows the same rule, so the shipped base never read a
    held-out module.
    """
    bucket = int(hashlib.md5(module.encode()).hexdigest(), 16) % 10
    return {0: "test", 1: "dev"}.get(bucket, "train")  # type: ignore[return-value]


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
    cache = _cache_file()
    everything = _read_cache(cache) or sorted(_functions(), key=lambda f: (f.module, f.name))
    if not everything:
        raise DataError(
            f"No standard library sources in {sysconfig.get_paths()['stdlib']}. "
            "Use data.root with the public sets, or JSONL files of your own."
        )
    _write_cache(cache, everything)
    sides: dict[Part, list[Function]] = {"train": [], "dev": [], "test": []}
    asked: set[tuple[str, str]] = set()
    for part in ("train", "dev", "test"):
        for function in everything:
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
            yield from _functions_in(tree, source.split("\n"), dotted)


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
        body = lines[start : node.end_lineno]
        body = textwrap.dedent("\n".join(body)).split("\n") if body else []
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


def _write_cache(path: Path, everything: list[Function]) -> None:
    if path.exists():
        return
    try:
        write_bytes(path, gzip.compress(json.dumps([asdict(f) for f in everything]).encode(), 1))
    except OSError:
        return  # only a convenience
