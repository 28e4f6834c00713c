"""Pictures in a conversation: out of what the client sent, through the tower, to what the router is told.

The newest picture of a conversation is the one that holds; what the last message says is checked against it. It
steers who answers and never becomes tokens: an answer does not describe it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bem.adapters.attached import Attached
from bem.config import ServingConfig
from bem.errors import DataError, Refused
from bem.serving.prompts import Prepared
from bem.serving.resident import Resident
from bem.serving.schemas import Asked, ChatRequest, Message
from bem.vision.eyes import Eyes, VisionRecord
from bem.vision.images import from_data_url
from bem.vision.load import load_tower


class Sight:
    """The pictures of a server's requests."""

    def __init__(self, config: ServingConfig):
        """
        Raises:
            CheckpointError: `config.vision` names no tower.
        """
        self.config = config
        self.eyes = None
        if config.vision is not None:
            self.eyes = Eyes(load_tower(config.vision, config.concepts))

    def add(self, asked: Asked, prepared: Prepared) -> Prepared:
        """The same requests, told what is seen; as they are where there is no picture.

        Raises:
            Refused: 400, a picture that cannot be taken, or a server without a tower.
        """
        if not isinstance(asked, ChatRequest) or not has_pictures(asked.messages):
            return prepared
        if self.eyes is None:
            why = "This server has no eyes: start it with --vision tiny."
            raise Refused(400, why, "messages", "unsupported_value")
        record = self._look(self.eyes, asked.messages)
        told = record.features()
        requests = tuple(replace(request, vision=told) for request in prepared.requests)
        return replace(prepared, requests=requests, vision=record)

    def _look(self, eyes: Eyes, messages: Sequence[Message]) -> VisionRecord:
        for message in messages:
            if message.images and message.role != "user":
                raise Refused(400, f"A message of {message.role} holds a picture.", "messages")
            if len(message.images) > 1:
                raise Refused(
                    400, f"{len(message.images)} pictures in a message: one is taken.", "messages"
                )
        url = [message.images[0] for message in messages if message.images][-1]
        config = self.config
        try:
            most = config.max_image_kib << 10, config.max_image_pixels
            picture = from_data_url(url, *most)
        except DataError as error:
            raise Refused(400, f"{error}", "messages", "invalid_image") from None
        return eyes.look(picture, messages[-1].text)


def has_pictures(messages: Sequence[Message]) -> bool:
    """Does any of them hold one?"""
    return any(message.images for message in messages)


def check_sees(resident: Resident, prepared: Prepared) -> None:
    """Refuse a picture for a version that would not look at it, or would read another tower's numbers.

    Raises:
        Refused: 400.
    """
    if prepared.vision is None:
        return
    adapted, here = resident.adapted, prepared.vision.encoder_id
    reads = adapted.encoder if isinstance(adapted, Attached) else ""
    if not reads:
        why = (
            f"Version {resident.short} reads no pictures: leave them out, or ask for one that does."
        )
        raise Refused(400, why, "messages", "unsupported_value")
    if reads != here:
        why = f"Version {resident.short} reads pictures through {reads}, this server looks through {here}."
        raise Refused(400, why, "messages", "unsupported_value")


def about_picture(record: VisionRecord) -> dict[str, Any]:
    """What is said of it beside an answer."""
    return {
        "gate": record.gate,
        "why": record.why,
        "encoder": record.encoder_id,
        "claims": [{"text": c.text, "probability": c.probability} for c in record.claims],
        "coverage": record.coverage,
        "explained": record.explained,
        "consistency": record.consistency,
        "conflict": record.conflict,
    }
