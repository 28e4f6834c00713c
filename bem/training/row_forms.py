"""The three forms of a row (see `bem.training.rows`) as one: input, references, history, system."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bem.errors import DataError

ROW_FORMS = (("input", "references"), ("messages",), ("prompt", "completion"))
"""Fields that make a question and its answer; a row has one form."""


def in_our_form(values: dict[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """A row's values with input, references, history and system in place of messages or completion.

    Args:
        values: by our names.
        row: as it was read; an error names its columns.
    Raises:
        DataError: none of the forms is whole, or its messages do not take turns.
    """
    given = {name for name, value in values.items() if value is not None}
    shared = {name: v for name, v in values.items() if not any(name in form for form in ROW_FORMS)}
    missing = [name for name in ("input", "references") if name not in given]
    if not missing:
        own = {"input": values["input"], "references": values["references"]}
        return _with_history(shared | own)
    if len(missing) == 2 and "messages" in given:
        return _with_messages(shared, values["messages"], "messages")
    if len(missing) == 2 and {"prompt", "completion"} <= given:
        messages = _prompt_messages(values["prompt"]) + _completion_message(values["completion"])
        return _with_messages(shared, messages, "prompt and completion")
    raise DataError(
        f"missing {' and '.join(missing)} (the row has {', '.join(row) or 'no fields'}). A row needs "
        f"{', or '.join(' and '.join(form) for form in ROW_FORMS)}; `columns` maps other names."
    )


def _with_history(values: dict[str, Any]) -> dict[str, Any]:
    """Messages in `history` as pairs."""
    history = values.get("history")
    if not isinstance(history, list | tuple) or not any(isinstance(t, Mapping) for t in history):
        return values
    system, pairs, question = _conversation(history, "history")
    if question is not None:
        raise DataError("history ends with a user message that nobody answers.")
    return _with_system(values, system) | {"history": pairs}


def _with_messages(shared: dict[str, Any], messages: Any, name: str) -> dict[str, Any]:
    if shared.get("history"):
        raise DataError(f"the row has {name} and history: put the earlier turns into {name}.")
    system, pairs, question = _conversation(messages, name)
    if question is not None or not pairs:
        raise DataError(f"{name} must end with an assistant message: the answer.")
    *history, (question, answer) = pairs
    rest = {"history": history, "input": question, "references": [answer]}
    return _with_system(shared, system) | rest


def _prompt_messages(prompt: Any) -> list[Any]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list | tuple):
        raise DataError(f"prompt must be text or messages, found {type(prompt).__name__}.")
    return list(prompt)


def _completion_message(completion: Any) -> list[Any]:
    if isinstance(completion, str):
        parts_only = completion.startswith(" ") and not completion.startswith("  ")
        return [{"role": "assistant", "content": completion[1:] if parts_only else completion}]
    if not isinstance(completion, list | tuple) or len(completion) != 1:
        raise DataError(
            f"completion must be text or a list of one assistant message, found {completion!r:.60}."
        )
    return list(completion)


def _with_system(shared: dict[str, Any], system: str) -> dict[str, Any]:
    if system and shared.get("system"):
        raise DataError("the row has a system field and a system message: keep one.")
    return shared | ({"system": system} if system else {})


def _conversation(messages: Any, name: str) -> tuple[str, list[tuple[str, str]], str | None]:
    """(system message, answered turns, a last user message without an answer)."""
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"{name} must be a list of messages, found {messages!r:.60}.")
    turns = [_message(message, name) for message in messages]
    system = turns.pop(0)[1] if turns[0][0] in ("system", "developer") else ""
    for number, (role, _) in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise DataError(
                f"{name}: message {number + 1 + len(messages) - len(turns)} has role {role!r} where "
                f"{expected!r} belongs: user and assistant take turns after one system message."
            )
    texts = [text for _, text in turns]
    pairs = list(zip(texts[::2], texts[1::2], strict=False))
    return system, pairs, texts[-1] if len(texts) % 2 else None


def _message(message: Any, name: str) -> tuple[str, str]:
    """(role, text) of one message."""
    if not isinstance(message, Mapping):
        raise DataError(f'{name} must hold {{"role", "content"}} objects, found {message!r:.60}.')
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"{name}: role and content must be text, found {dict(message)!r:.80}.")
    if message.get("tool_calls") or message.get("function_call"):
        raise DataError(f"{name}: tool calls in a message are not read: write them as its content.")
    return role, content
