"""What a router did with a conversation, and why: for people who ask (`bem chat`'s /why)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pydantic import Field

from bem.errors import Refused
from bem.routing.explain import explain
from bem.routing.mounted import Mounted
from bem.serving.driver import Driver
from bem.serving.pictures import has_pictures
from bem.serving.prompts import UNLIMITED, example_of
from bem.serving.resident import Resident
from bem.serving.schemas import Message, Part
from bem.training.data import encode


class ExplainRequest(Part):
    """`POST /v1/bem/explain`."""

    model: str = Field("bem", max_length=256)
    messages: list[Message] = Field(min_length=1, max_length=4096)
    """A conversation, with or without the last answer."""


async def explained(
    driver: Driver, resident: Resident, asked: ExplainRequest, tokenizer: Any
) -> dict[str, Any]:
    """Every chunk of a conversation: who acted, what the policy thought of it, and its text.

    Raises:
        Refused: that version has no router, or the conversation is too long.
    """
    adapted = resident.adapted
    if not isinstance(adapted, Mounted):
        raise Refused(400, f"Version {resident.short} has no router: nothing was chosen.", "model")
    if has_pictures(asked.messages):
        why = (
            "Conversations with pictures are not explained: the answer's `bem` says what was seen."
        )
        raise Refused(400, why, "messages", "unsupported_value")
    ids, turns = _tokens(asked.messages, tokenizer)
    most = resident.engine.max_tokens
    if len(ids) > most:
        raise Refused(400, f"The conversation has {len(ids)} tokens, {most} fit.", "messages")
    chunks = await driver.call(lambda: explain(adapted, ids, turns))
    said = [{**asdict(c), "text": tokenizer.decode(ids[c.start : c.stop])} for c in chunks]
    return {"version": resident.version, "chunks": said}


def _tokens(messages: list[Message], tokenizer: Any) -> tuple[list[int], list[bool]]:
    answered = messages[-1].role == "assistant" and len(messages) > 1
    example = example_of(messages[:-1] if answered else messages)
    if answered:
        example = type(example)(
            example.id,
            example.input,
            (messages[-1].text,),
            history=example.history,
            system=example.system,
        )
    encoded = encode(example, tokenizer, UNLIMITED, with_answer=answered)
    return encoded.input_ids, encoded.turn_starts
