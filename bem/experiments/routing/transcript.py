"""What a router did with the held-out conversations: for the report and for whoever wants to look."""

from __future__ import annotations

from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from bem.routing.explain import Explained, explain
from bem.tasks.conversations import skill_of
from bem.training.data import Example

if TYPE_CHECKING:
    from bem.experiments.routing.stages import Stages
    from bem.routing.mounted import Mounted

SHOWN = 4
"""Conversations that the report shows chunk by chunk; the longest plans first."""


def conversations_of(mounted: Mounted, stages: Stages, rows: int = 240) -> dict[str, Any]:
    """Read held-out conversations (their reference answers as they stand) under the router.

    Returns:
        `skills` and `options`: names; `use`: answers of each skill (rows) under each option
        (columns); `accuracy` at answers against the makers' labels; `flip_rate`: changes of expert /
        (chunks - 1); `plans`: number of different actions in each turn; `owner`: expert of each
        skill; `shown`: a few
        conversations chunk by chunk.
    """
    everything = [row for task in stages.tasks for row in task.dev]
    chosen = np.random.default_rng(0).permutation(len(everything))[:rows]
    skills = list(stages.skills.owner)
    options = ["base", *stages.skills.experts]
    use = np.zeros((len(skills), len(options)), int)
    flips = boundaries = 0
    plans: list[int] = []
    read: list[tuple[Example, list[Explained], list[str]]] = []
    for i in chosen:
        row = everything[int(i)]
        encoded = stages.encoded(row)
        chunks = explain(mounted, encoded.input_ids, encoded.turn_starts)
        turns = [c for c in chunks if c.turn]
        named = (row.meta.get("skills") or [skill_of(row)])[-len(turns) :]
        for chunk, skill in zip(turns, named, strict=True):
            use[skills.index(skill), options.index(chunk.expert)] += 1
        flips += sum(a.expert != b.expert for a, b in pairwise(chunks))
        boundaries += len(chunks) - 1
        plans += _plans(chunks)
        texts = [stages.tokenizer.decode(encoded.input_ids[c.start : c.stop]) for c in chunks]
        read.append((row, chunks, texts))
    read.sort(key=lambda item: -len({c.expert for c in item[1]}))
    right = sum(use[skills.index(s), o] for s, o in stages.skills.owner.items())
    return {
        "skills": skills,
        "options": options,
        "use": use.tolist(),
        "accuracy": float(right / max(1, use.sum())),
        "flip_rate": flips / max(1, boundaries),
        "plan_length": float(np.mean(plans)),
        "longest_plan": max(plans),
        "plans": plans,
        "owner": {s: options[o] for s, o in stages.skills.owner.items()},
        "shown": [_shown(row, chunks, texts) for row, chunks, texts in read[:SHOWN]],
    }


def _plans(chunks: list[Explained]) -> list[int]:
    """Different actions in a row within each turn."""
    found, last = [0], None
    for chunk in chunks:
        action = (chunk.expert, chunk.rank, chunk.strength)
        if chunk.turn and found[-1]:
            found.append(0)
        found[-1] += chunk.turn or action != last or not found[-1]
        last = action
    return found


def _shown(row: Example, chunks: list[Explained], texts: list[str]) -> dict[str, Any]:
    return {
        "id": f"{row.task}/{row.id}",
        "skills": row.meta.get("skills") or [skill_of(row)],
        "chunks": [{**asdict(c), "text": t} for c, t in zip(chunks, texts, strict=True)],
    }
