"""What a router did with held-out conversations, and what experts lose beside one another: the report's
view of the facts that `experiments.routing` writes, `transcript` and `interference`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bem.config import ExperimentConfig
from bem.config.arm import ROUTERS
from bem.errors import CheckpointError
from bem.files import read_json
from bem.report import words
from bem.runs.folder import RunFolder

GIST = 44
"""Characters at either end of a chunk's text that stand beneath its column."""
FAINT = 0.02
"""Experts that never reach this probability in a conversation have no row."""


@dataclass(frozen=True)
class HeatCell:
    """One expert in one chunk, or one skill under one option."""

    text: str
    shade: float
    """In [0, 1]."""
    marked: bool
    """Executed here; in the matrix: the maker's label."""


@dataclass(frozen=True)
class ShownChunk:
    """One column of a heat map, without its cells."""

    number: int
    turn: bool
    skill: str
    """What the turn that begins here asks for; "" elsewhere."""
    right: bool
    """The executed expert is the skill's own."""
    action: str
    why: str
    gist: str
    text: str


@dataclass(frozen=True)
class Conversation:
    """A heat map: chunks from left to right, experts from top to bottom."""

    id: str
    skills: list[str]
    """Of all turns."""
    chunks: list[ShownChunk]
    rows: list[tuple[str, list[HeatCell]]]


@dataclass(frozen=True)
class Use:
    """Which expert answered which skill."""

    options: list[str]
    rows: list[tuple[str, list[HeatCell]]]


@dataclass(frozen=True)
class Choosing:
    """How one arm chooses."""

    arm: str
    colour: int
    values: list[str]


@dataclass(frozen=True)
class InterferenceRow:
    """What one expert loses beside the others on its own skills."""

    expert: str
    alone: str
    beside: list[tuple[str, bool]]
    """Mounted under the maker's labels, and as the router chooses: loss with its growth, and
    whether that is within the limit."""


@dataclass(frozen=True)
class RouterPart:
    """Everything that the templates show of the router itself. Empty: the run has no such thing."""

    shown: str
    """Arm that the heat maps and the matrix are of."""
    conversations: list[Conversation]
    use: Use | None
    columns: list[str]
    """Of `choosing`."""
    choosing: list[Choosing]
    options: list[str]
    """Names of the experts that it chooses from, the base first."""
    limit: str
    """Of `losses`: largest growth allowed."""
    losses: list[InterferenceRow]


CHOOSING = (
    "right expert at answers", "right at the last turn", "right where it shows no cue", "flips per chunk", "mean plan", "longest plan",
)  # fmt: skip


def part_of(folder: RunFolder, config: ExperimentConfig, colours: Mapping[str, int]) -> RouterPart:
    """Whatever the run's folder holds of its router; what it does not hold is left out."""
    facts = {a.name: _facts(folder, config, a.name) for a in config.arms if a.route}
    by_route = {a.route: a.name for a in reversed(config.arms) if a.route}
    shown = next((by_route[route] for route in ROUTERS if route in by_route), "")
    talks = [f["conversations"] for f in facts.get(shown, []) if "conversations" in f]
    owners = talks[0]["owner"] if talks else {}
    disturbed = [f["interference"] for f in facts.get(shown, []) if "interference" in f]
    return RouterPart(
        shown=shown,
        conversations=[_conversation(item, owners) for item in talks[0]["shown"]] if talks else [],
        use=_use(talks, owners) if talks else None,
        columns=list(CHOOSING),
        choosing=[
            Choosing(_named(name, seeds), colours[name], values)
            for name, seeds in facts.items()
            if any(values := _choosing(seeds))
        ],
        options=talks[0]["options"] if talks else [],
        limit=f"{disturbed[0]['limit']:.0%}" if disturbed else "",
        losses=_losses(disturbed),
    )


def _facts(folder: RunFolder, config: ExperimentConfig, arm: str) -> list[dict[str, Any]]:
    paths = [folder.cell(arm, seed).route for seed in config.seeds]
    return [read_json(path, CheckpointError) for path in paths if path.is_file()]


def _named(arm: str, facts: Sequence[Mapping[str, Any]]) -> str:
    """`single (json)`: the one expert of each seed, if there is one."""
    experts = list(dict.fromkeys(f["expert"] for f in facts if "expert" in f))
    return f"{arm} ({', '.join(experts)})" if experts else arm


# ---------------------------------------------------------------------------------- conversations


def _conversation(item: Mapping[str, Any], owners: Mapping[str, str]) -> Conversation:
    chunks = item["chunks"]
    asked = _asked(chunks, item["skills"])
    names = dict.fromkeys(name for chunk in chunks for name in chunk["probabilities"])
    strong = [
        name
        for name in names
        if any(c["expert"] == name or c["probabilities"].get(name, 0) >= FAINT for c in chunks)
    ]
    return Conversation(
        item["id"],
        item["skills"],
        [_chunk(c, s, owners) for c, s in zip(chunks, asked, strict=True)],
        [(name, [_cell(chunk, name) for chunk in chunks]) for name in strong],
    )


def _asked(chunks: Sequence[Mapping[str, Any]], skills: Sequence[str]) -> list[str]:
    """The skill that each chunk's turn asks for where one begins; turns that were cut off came first."""
    turns = sum(chunk["turn"] for chunk in chunks)
    left = iter(skills[-turns:] if turns else [])
    return [next(left) if chunk["turn"] else "" for chunk in chunks]


def _chunk(chunk: Mapping[str, Any], skill: str, owners: Mapping[str, str]) -> ShownChunk:
    text = " ".join(chunk["text"].split())
    whole = len(text) <= 2 * GIST + 3
    faded = f", faded {chunk['fade']:.0%}" if chunk["fade"] else ""
    return ShownChunk(
        number=chunk["chunk"],
        turn=chunk["turn"],
        skill=skill,
        right=owners.get(skill) == chunk["expert"],
        action=f"rank {chunk['rank']}, ×{chunk['strength']:g}{faded}",
        why=chunk["why"],
        gist=text if whole else f"{text[:GIST]} … {text[-GIST:]}",
        text=chunk["text"],
    )


def _cell(chunk: Mapping[str, Any], name: str) -> HeatCell:
    p = chunk["probabilities"].get(name)
    return HeatCell("" if p is None else f"{100 * p:.0f}", p or 0.0, chunk["expert"] == name)


def _use(talks: Sequence[Mapping[str, Any]], owners: Mapping[str, str]) -> Use:
    """Answers of each skill under each option, summed over seeds, as shares of the skill's answers."""
    counts = np.sum([talk["use"] for talk in talks], axis=0)
    skills, options = talks[0]["skills"], talks[0]["options"]
    rows = []
    for skill, row in zip(skills, counts, strict=True):
        n = int(row.sum())
        cells = [
            HeatCell(str(c) if c else "", float(c / max(1, n)), owners.get(skill) == option)
            for c, option in zip(row.tolist(), options, strict=True)
        ]
        rows.append((f"{skill} ({n})", cells))
    return Use(options, rows)


def _choosing(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns CHOOSING, means over seeds; "" where the arm has no such number."""
    talks = [f["conversations"] for f in facts if "conversations" in f]
    by_turn = [f["accuracy_per_turn"] for f in facts if "accuracy_per_turn" in f]
    right = [talk["accuracy"] for talk in talks] or by_turn
    last = [f["agrees_with_gold"] for f in facts if "agrees_with_gold" in f]
    sticky = [f["agrees_with_gold_sticky"] for f in facts if "agrees_with_gold_sticky" in f]
    return [
        f"{np.mean(right):.1%}" if right else "",
        f"{np.mean(last):.1%}" if last else "",
        f"{np.mean(sticky):.1%}" if sticky else "",
        f"{np.mean([t['flip_rate'] for t in talks]):.3f}" if talks else "",
        f"{np.mean([t['plan_length'] for t in talks]):.2f}" if talks else "",
        str(max(t["longest_plan"] for t in talks)) if talks else "",
    ]


def _losses(disturbed: Sequence[Mapping[str, Any]]) -> list[InterferenceRow]:
    """Losses in nats per answer token, averaged over seeds."""

    def mean(kind: str, key: str, at: int) -> float:
        return float(np.mean([seed[kind]["experts"][at][key] for seed in disturbed]))

    names = [row["expert"] for row in disturbed[0]["mounted"]["experts"]] if disturbed else []
    rows = []
    for at, name in enumerate(names):
        alone = mean("mounted", "alone", at)
        beside = []
        for kind in ("mounted", "routed"):
            loss = mean(kind, "mounted", at)
            growth = loss / alone - 1
            text = words.minus(f"{loss:.3f} ({growth:+.1%})")
            beside.append((text, growth <= disturbed[0]["limit"]))
        rows.append(InterferenceRow(name, f"{alone:.3f}", beside))
    return rows
