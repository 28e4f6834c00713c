"""Forms in which one `def` line can be asked for, and the cues that ask for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from bem.tasks.functions import Function


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
