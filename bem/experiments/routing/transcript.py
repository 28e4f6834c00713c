"""What a router did with the held-out conversations: for the report and for whoever wants to look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from bem.experiments.routing.stages import RoutingArtifacts
from bem.routing.explain import Explained, explained
from bem.routing.modes import mode
from bem.routing.mounted import Mounted
from bem.tasks.conversations import skill_of
from bem.training.data import Example, collate
from bem.training.decisions import READ
from bem.training.hidden import run_up_to

SHOWN = 4
"""Conversations that the report shows chunk by chunk; the longest plans first."""


@dataclass(frozen=True)
class Transcript:
    """One conversation as the router read it."""

    row: Example
    chunks: list[Explained]
    texts: list[str]
    """Of each chunk."""

    @property
    def skills(self) -> list[str]:
        """Of every turn, turns that were cut off included."""
        return self.row.meta.get("skills") or [skill_of(self.row)]

    def shown(self) -> dict[str, Any]:
        """As JSON for the report."""
        return {
            "id": f"{self.row.task}/{self.row.id}",
            "skills": self.skills,
            "chunks": [
                {**asdict(chunk), "text": text}
                for chunk, text in zip(self.chunks, self.texts, strict=True)
            ],
        }


def conversations_of(
    mounted: Mounted, artifacts: RoutingArtifacts, rows: int = 240
) -> dict[str, Any]:
    """Read held-out conversations (their reference answers as they stand) under the router.

    Args:
        rows: how many at most; a fixed choice.
    Returns:
        `skills` and `options`: names; `use`: answers of each skill (rows) under each option
        (columns); `accuracy` at answers against the makers' labels; `flip_rate`: changes of expert /
        (chunks - 1); `plans`: number of different actions in each turn; `owner`: expert of each
        skill; `shown`: a few conversations chunk by chunk.
    """
    chosen = np.random.default_rng(0).permutation(len(artifacts.held_out))[:rows]
    read = _read(mounted, artifacts, [artifacts.held_out[int(i)] for i in chosen])
    skills, owner = list(artifacts.skills.owner), artifacts.skills.owner
    options = ["base", *artifacts.skills.experts]
    use = _use(read, skills, options)
    flips = sum(a.expert != b.expert for t in read for a, b in pairwise(t.chunks))
    plans = [length for transcript in read for length in plan_lengths(transcript.chunks)]
    right = sum(use[skills.index(skill), option] for skill, option in owner.items())
    read.sort(key=lambda transcript: -len({chunk.expert for chunk in transcript.chunks}))
    return {
        "skills": skills,
        "options": options,
        "use": use.tolist(),
        "accuracy": float(right / max(1, use.sum())),
        "flip_rate": flips / max(1, sum(len(t.chunks) - 1 for t in read)),
        "plan_length": float(np.mean(plans)),
        "longest_plan": max(plans),
        "plans": plans,
        "owner": {skill: options[option] for skill, option in owner.items()},
        "shown": [transcript.shown() for transcript in read[:SHOWN]],
    }


def _read(
    mounted: Mounted, artifacts: RoutingArtifacts, rows: Sequence[Example]
) -> list[Transcript]:
    """In batches, and no further up than the router reads."""
    layer = mounted.router_config.router_layer
    assert layer is not None  # `mount` has filled it in
    encoded = [artifacts.encoded(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(encoded[i]))
    size, decode = artifacts.config.eval_batch_size, artifacts.inputs.tokenizer.decode
    read: dict[int, Transcript] = {}
    for at in range(0, len(rows), size):
        some = order[at : at + size]
        batch = collate([encoded[i] for i in some], artifacts.inputs.pad_id)
        batch.pop("route", None)
        with mode(mounted.model, training=False), mounted.router.watched() as tape:
            run_up_to(mounted.model, mounted.base, layer, batch, READ)
        for row, i in enumerate(some):
            chunks = explained(mounted, tape, row, encoded[i].turn_starts)
            texts = [decode(encoded[i].input_ids[chunk.start : chunk.stop]) for chunk in chunks]
            read[i] = Transcript(rows[i], chunks, texts)
    return [read[i] for i in range(len(rows))]


def _use(read: Sequence[Transcript], skills: Sequence[str], options: Sequence[str]) -> np.ndarray:
    """[skills, options]: answers of each skill under each option."""
    use = np.zeros((len(skills), len(options)), int)
    for transcript in read:
        turns = [chunk for chunk in transcript.chunks if chunk.turn]
        for chunk, skill in zip(turns, transcript.skills[-len(turns) :], strict=True):
            use[skills.index(skill), options.index(chunk.expert)] += 1
    return use


def plan_lengths(chunks: Sequence[Explained]) -> list[int]:
    """Number of different actions in a row within each turn."""
    lengths, last = [0], None
    for chunk in chunks:
        action = (chunk.expert, chunk.rank, chunk.strength)
        if chunk.turn and lengths[-1]:
            lengths.append(0)
        lengths[-1] += chunk.turn or action != last or not lengths[-1]
        last = action
    return lengths
