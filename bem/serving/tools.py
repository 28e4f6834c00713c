"""Tools that a model may call: how the base's chat template shows and writes them, and calls read back out of answers.

A template is a program; what form its calls have is found by having it write one. Forms that are read:

    <tool_call>{"name": "get", "arguments": {...}}</tool_call>      any marks around one JSON object per call
    {"name": "get", "parameters": {...}}                            no marks: the whole answer is the call
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from bem.engine.grammar import Grammar
from bem.errors import DataError, Refused
from bem.serving.detokenizer import overlap
from bem.serving.schemas import Asked, ChatRequest, Function, Message, NamedTool
from bem.training.chat import chat_form, render

PROBE = "probe_of_tools"
ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True)
class CallForm:
    """How a chat template writes one call."""

    opening: str
    """Before its JSON, white space included."""
    closing: str
    arguments: str
    """Key under which they stand, beside `name`."""


@dataclass(frozen=True)
class Tools:
    """What a request lets the model call."""

    form: CallForm
    shown: tuple[dict[str, Any], ...]
    """As the template takes them."""
    grammar: Grammar | None = None
    """Of an answer that must be a call."""
    stop: tuple[str, ...] = ()
    """Ends the answer behind its only call."""

    @property
    def names(self) -> set[str]:
        """Of the functions."""
        return {tool["function"]["name"] for tool in self.shown}


@dataclass(frozen=True)
class Call:
    """A call that a model wrote."""

    name: str
    arguments: str
    """JSON."""


def tools_of(asked: Asked, tokenizer: Any) -> Tools | None:
    """What a request lets the model call; None: nothing.

    Raises:
        Refused: the base's template has no tools, or what is asked contradicts itself.
    """
    if not isinstance(asked, ChatRequest):
        return None
    choice = asked.tool_choice
    if not asked.tools:
        if choice in (None, "none"):
            return None
        raise Refused(400, "tool_choice needs tools.", "tool_choice")
    if choice == "none":
        return None
    form = call_form(tokenizer, repr(tokenizer.chat_template))
    hidden = {"function": {"strict"}}
    shown = tuple(tool.model_dump(exclude_none=True, exclude=hidden) for tool in asked.tools)
    functions, one = [tool.function for tool in asked.tools], asked.parallel_tool_calls is False
    if choice in (None, "auto"):
        if form.opening and any(function.strict for function in functions):
            return Tools(form, shown, free_grammar(form, functions, one))
        return Tools(form, shown, stop=(form.closing.strip(),) if one and form.closing else ())
    if isinstance(choice, NamedTool):
        functions, one = [f for f in functions if f.name == choice.function.name], True
        if not functions:
            raise Refused(400, f"tools has no {choice.function.name!r:.80}.", "tool_choice")
    return Tools(form, shown, forced_grammar(form, functions, one or not form.closing))


def forced_grammar(form: CallForm, functions: Sequence[Function], one: bool) -> Grammar:
    """Of an answer that is a call of one of these functions, or (not one) several, line by line."""
    start = "start: call" if one else 'start: call ("\\n" call)*'
    return Grammar.lark("\n".join([start, *_calls(form, form.opening, functions, strict=True)]))


def free_grammar(form: CallForm, functions: Sequence[Function], one: bool) -> Grammar:
    """Of an answer that may call; calls of strict functions follow their schemas."""
    mark = form.opening.rstrip()
    found = re.escape(mark).replace("/", "\\/")
    lines = [
        "start: TAIL | before call" if one else "start: (before call)* TAIL",
        f"TAIL: /(?s:.*)/ & ~/(?s:.*){found}(?s:.*)/",
        f"before[suffix={json.dumps(mark)}]: /(?s:.*)/",
    ]
    behind = form.opening[len(mark) :]
    return Grammar.lark("\n".join([*lines, *_calls(form, behind, functions, strict=False)]))


def _calls(form: CallForm, opening: str, functions: Sequence[Function], strict: bool) -> list[str]:
    """Rules of a call; opening: what it begins with; strict: each by its schema, whatever it says of itself."""
    free = {"type": "object"}
    nothing = {**free, "properties": {}, "additionalProperties": False}
    lines = [f"call: {' | '.join(f'call{i}' for i in range(len(functions)))}"]
    for i, function in enumerate(functions):
        name = json.dumps(function.name)
        before = json.dumps(f'{opening}{{"name": {name}, "{form.arguments}": ')
        schema = (function.parameters or nothing) if strict or function.strict else free
        lines.append(f"call{i}: {before} args{i} {json.dumps('}' + form.closing)}")
        lines.append(f"args{i}: %json {json.dumps(schema)}")
    return lines


@lru_cache(maxsize=8)
def call_form(tokenizer: Any, template: str) -> CallForm:
    """How the tokenizer's chat template writes a call.

    Args:
        template: part of the key: a tokenizer may get another one.
    Raises:
        Refused: it shows no tools, or writes calls in a form that is not read here.
    """
    tool = {"type": "function", "function": {"name": PROBE, "description": "", "parameters": {}}}
    call = {"type": "function", "id": "call00000", "function": {"name": PROBE, "arguments": {}}}
    asked: list[dict[str, Any]] = [{"role": "user", "content": "x"}]
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    if not tokenizer.chat_template:
        raise _no_tools("This base has no chat template")
    try:
        opened = render(tokenizer, asked, True, [tool])
        closed = render(tokenizer, [*asked, said], False, [tool])
    except DataError as error:
        raise _no_tools(f"The base's chat template fails on a call ({error})") from error
    if PROBE not in opened:
        raise _no_tools("The base's chat template shows no tools")
    end = tokenizer.convert_ids_to_tokens(chat_form(tokenizer).end)
    written = closed[len(opened) :].partition(end)[0] if closed.startswith(opened) else ""
    form = _form_in(written)
    if form is None:
        raise _no_tools(f"Calls as the base's chat template writes them ({written!r:.200})")
    marks = form.opening + form.closing
    if tokenizer.decode(tokenizer(marks)["input_ids"], skip_special_tokens=True).strip() != (
        marks.strip()
    ):
        raise _no_tools(f"Calls between special tokens ({marks!r})")
    return form


def _no_tools(why: str) -> Refused:
    return Refused(
        400,
        f"{why}: tools cannot be used with this server's base. Leave them out, describe them in the system message, or "
        "serve a base that knows them.",
        "tools",
        "unsupported_value",
    )


def _form_in(written: str) -> CallForm | None:
    """The form of the one call in a text; None: it is none that is read here."""
    start = written.rfind("{", 0, max(written.find(PROBE), 0))
    try:
        call, stop = json.JSONDecoder().raw_decode(written, max(start, 0))
    except ValueError:
        return None
    if not isinstance(call, dict) or call.get("name") != PROBE:
        return None
    key = next((k for k in ARGUMENTS if call.get(k) == {}), None)
    opening, closing = written[:start].lstrip(), written[stop:].rstrip()
    if key is None or bool(opening) != bool(closing):  # a list of calls is none of ours
        return None
    return CallForm(opening, closing, key)


class CallReader:
    """Tells the calls of an answer from its text, piece by piece: what was handed out is never taken back.

    What is no call of a known function stays text, to the letter.
    """

    def __init__(self, tools: Tools):
        self.tools, self.calls = tools, 0
        self._held, self._inside, self._begun = "", False, False

    def push(self, text: str, last: bool = False) -> tuple[str, list[Call]]:
        """(text to show now, calls that are complete).

        Args:
            text: what the answer goes on with.
            last: it ends with it.
        """
        self._held += text
        shown, calls = "", []
        while (step := self._step(last)) is not None:
            said, call = step
            shown += said
            if call is not None:
                self.calls += 1
                calls.append(call)
        return shown, calls

    def _step(self, last: bool) -> tuple[str, Call | None] | None:
        """The next piece of what is held; None: more of it must come first."""
        if not self._held:
            return None
        return self._call(last) if self._inside else self._text(last)

    def _text(self, last: bool) -> tuple[str, Call | None] | None:
        held, opening = self._held, self.tools.form.opening.strip()
        at = held.find(opening) if opening else self._bare(held)
        if at >= 0:
            self._inside = True
            return self._take(at, strip=True)
        if last:
            return self._take(len(held), strip=self.calls > 0)
        stop = len(held) - overlap(held, opening) if opening else len(held)
        stop = len(held[:stop].rstrip())  # space before a call is no text
        return self._take(stop) if stop else None

    def _bare(self, held: str) -> int:
        """Where a call without marks begins: at the start of an answer, or nowhere."""
        start = len(held) - len(held.lstrip())
        return start if not self._begun and held[start : start + 1] == "{" else -1

    def _call(self, last: bool) -> tuple[str, Call | None] | None:
        """What stands between the marks, if it is all there."""
        opening, closing = self.tools.form.opening.strip(), self.tools.form.closing.strip()
        stop = self._held.find(closing, len(opening)) if closing else -1
        if stop < 0 and not last:
            return None
        self._inside, whole = False, len(self._held) if stop < 0 else stop + len(closing)
        call = self._parsed(self._held[len(opening) : None if stop < 0 else stop])
        if call is None:
            return self._take(whole)
        self._held = self._held[whole:]
        return "", call

    def _take(self, stop: int, strip: bool = False) -> tuple[str, None]:
        said, self._held = self._held[:stop], self._held[stop:]
        self._begun = self._begun or bool(said.strip())
        return said.rstrip() if strip else said, None

    def _parsed(self, text: str) -> Call | None:
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(call, dict) or call.get("name") not in self.tools.names:
            return None
        arguments = call.get(self.tools.form.arguments, {})
        if not isinstance(arguments, dict):
            return None
        return Call(call["name"], json.dumps(arguments, ensure_ascii=False))


def said_calls(calls: Sequence[Call], first: int | None = None) -> list[dict[str, Any]]:
    """Calls as OpenAI's protocol says them; first: number of the first one, in a stream."""
    said: list[dict[str, Any]] = []
    for i, call in enumerate(calls):
        place = {} if first is None else {"index": first + i}
        function = {"name": call.name, "arguments": call.arguments}
        name = f"call_{secrets.token_hex(12)}"
        said.append({**place, "id": name, "type": "function", "function": function})
    return said


# --- conversations with calls ---------------------------------------------------------------------


def has_calls(messages: Sequence[Message]) -> bool:
    """Was a tool called in it?"""
    return any(message.role == "tool" or message.tool_calls for message in messages)


def messages_of(messages: Sequence[Message], evidence: Sequence[str]) -> list[dict[str, Any]]:
    """A conversation as a chat template takes it; evidence: shown before the user's last words.

    Raises:
        Refused: it does not begin with the user and end with the user or a tool, or a tool answers no call.
    """
    said: list[dict[str, Any]] = []
    called: dict[str, str] = {}
    for message in messages:
        one: dict[str, Any] = {"role": _role(message), "content": message.text}
        if message.role == "tool":
            one |= _returned(message, called)
        if message.tool_calls:
            one["tool_calls"] = [call.model_dump() for call in message.tool_calls]
            for call, known in zip(message.tool_calls, one["tool_calls"], strict=True):
                known["function"]["arguments"] = _object(call.function.arguments)
                called[call.id] = call.function.name
        if said and said[-1]["role"] == one["role"] in ("system", "user"):
            said[-1]["content"] += f"\n{one['content']}"
        else:
            said.append(one)
    _check_order([one["role"] for one in said])
    asked = next(one for one in reversed(said) if one["role"] == "user")
    asked["content"] = "\n".join([*evidence, asked["content"]])
    return said


def _role(message: Message) -> str:
    return "system" if message.role == "developer" else message.role


def _check_order(roles: list[str]) -> None:
    body = roles[1:] if roles[0] == "system" else roles
    if not body or body[0] != "user" or body[-1] == "assistant" or "system" in body:
        raise Refused(
            400,
            "messages must be, after system messages at the beginning, the user's, answers, and what tools returned, and "
            f"end with the user's or a tool's; got {', '.join(roles)[:200]}.",
            "messages",
        )


def _returned(message: Message, called: dict[str, str]) -> dict[str, str]:
    id = message.tool_call_id or ""
    if id not in called:
        raise Refused(
            400, f"A tool's message answers the call {id!r:.80}, which nobody made.", "messages"
        )
    return {"tool_call_id": id, "name": called[id]}


def _object(arguments: str) -> dict[str, Any]:
    """Arguments of a call, which OpenAI's protocol has as text and templates as an object."""
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Refused(
            400, f"Arguments of a call must be a JSON object, got {arguments!r:.80}.", "messages"
        )
    return found
