"""How a base model writes a conversation: its chat template, or `User: ...` and `Assistant:` lines."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from bem.errors import DataError
from bem.training.example import Example


@dataclass(frozen=True)
class ChatForm:
    """What a tokenizer puts around the turns."""

    end: int
    """Token that ends an answer."""
    bos: int | None
    """Token that opens a conversation, if there is one."""
    opening: str
    """Text between the mark that opens an answer and the answer."""
    mark_length: int
    """Tokens that any prompt must keep: BOS and the mark that opens the answer."""


def chat_form(tokenizer: Any) -> ChatForm:
    """The form of a tokenizer, probed once per chat template.

    Raises:
        DataError: it has no token that ends an answer, or its chat template cannot be rendered.
    """
    return _probed(tokenizer, repr(tokenizer.chat_template))


def end_of_turn(tokenizer: Any) -> int:
    """Id of the token that ends an answer: the chat template's own mark, else EOS."""
    return chat_form(tokenizer).end


def turns_of(example: Example, tokenizer: Any) -> list[tuple[str, str | None]]:
    """(text before an answer, that answer or None for the one to come), in order.

    A template that rewrites earlier turns gives one turn: they are context only, never labelled.

    Raises:
        DataError: the chat template refuses the conversation.
    """
    if not tokenizer.chat_template:
        return _plain_turns(example, chat_form(tokenizer).opening)
    messages = [{"role": "system", "content": example.system}] if example.system else []
    for user, assistant in example.history:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": assistant})
    return turns_of_messages([*messages, {"role": "user", "content": example.prompt}], tokenizer)


def turns_of_messages(
    messages: list[dict[str, Any]], tokenizer: Any, tools: list[dict[str, Any]] | None = None
) -> list[tuple[str, str | None]]:
    """`turns_of` a conversation as a chat template takes it, with calls of tools and what they returned.

    Args:
        messages: the last one is not an answer.
        tools: shown to the model, as JSON schemas.
    Raises:
        DataError: the chat template refuses the conversation.
    """
    end = tokenizer.convert_ids_to_tokens(chat_form(tokenizer).end)
    turns: list[tuple[str, str | None]] = []
    shown = ""
    told_apart = True
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opened = render(tokenizer, messages[:i], True, tools)
        closed = render(tokenizer, messages[: i + 1], False, tools)
        answer = message["content"]
        if message.get("tool_calls"):  # only the template knows how they are written
            answer = closed[len(opened) :].partition(end)[0]
        told_apart &= opened.startswith(shown) and closed.startswith(opened + answer)
        turns.append((opened[len(shown) :], answer))
        shown = opened + answer + end
        shown = shown if closed.startswith(shown) else closed
    final = render(tokenizer, messages, True, tools)
    if not (told_apart and final.startswith(shown)):
        return [(final, None)]
    return [*turns, (final[len(shown) :], None)]


def _plain_turns(example: Example, opening: str) -> list[tuple[str, str | None]]:
    users = [*(user for user, _ in example.history), example.prompt]
    answers = [*(opening + assistant for _, assistant in example.history), None]
    texts = [f"User: {user}\nAssistant:" for user in users]
    if example.system:
        texts[0] = f"{example.system}\n{texts[0]}"
    return list(zip(texts, answers, strict=True))


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text without special ones around it.

    Raises:
        DataError: the tokenizer refuses a text, or has no token for one that is not blank.
    """
    try:
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    except Exception as error:  # `tokenizers` raises plain Exceptions
        raise DataError(f"the tokenizer refuses {text!r:.60}: {error}") from error
    if not ids and text.strip():
        raise DataError(
            f"the tokenizer has no token for {text!r:.60}: it cannot be learnt or asked."
        )
    return ids


@lru_cache(maxsize=8)
def _probed(tokenizer: Any, template: str) -> ChatForm:
    """`template` is part of the key: a tokenizer may get another one."""
    end, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if tokenizer.chat_template:
        probe = [{"role": "user", "content": "x"}]
        opened = render(tokenizer, probe, opens=True)
        asked = render(tokenizer, probe, opens=False)
        closed = render(tokenizer, [*probe, {"role": "assistant", "content": "x"}], opens=False)
        mark = opened[len(asked) :] if opened.startswith(asked) else ""
        if closed.startswith(opened + "x"):
            special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
            after = token_ids(tokenizer, closed[len(opened) + 1 :])
            end = after[0] if after and after[0] in special else end
        if bos is not None and not opened.startswith(tokenizer.bos_token):
            bos = None
    else:
        mark = "\nAssistant:"
        if bos is not None and tokenizer("x")["input_ids"][0] != bos:
            bos = None
    if end is None:
        raise DataError(
            "The tokenizer has no end-of-text token (eos_token); answers could not end."
        )
    mark_length = max(1, len(token_ids(tokenizer, mark))) + (bos is not None)
    return ChatForm(end, bos, "" if tokenizer.chat_template else " ", mark_length)


def render(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    opens: bool,
    tools: list[dict[str, Any]] | None = None,
) -> str:
    """What the chat template writes; opens: with the mark behind which the answer comes.

    Raises:
        DataError: it refuses the conversation.
    """
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=opens
        )
    except (
        Exception
    ) as error:  # a template is a program of the base's makers and may raise anything
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the base's chat template refuses a conversation of {roles}: {error}"
        ) from error
