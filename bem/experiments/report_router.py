"""What a router did with held-out conversations, and how it learned: the report's view of
`conversation_report`, `policy_gradient.Iteration` and `bc.CloningResult`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bem.config import ExperimentConfig
from bem.experiments import plots_routing as plots
from bem.experiments import wording
from bem.experiments.store import RunFolder, read_json, read_jsonl

GIST = 44
"""Characters at either end of a chunk's text that stand beneath its column."""
FAINT = 0.02
"""Experts that never reach this probability in a conversation have no row."""


@dataclass(frozen=True)
class Cell:
    """One expert in one chunk, or one skill under one option."""

    text: str
    shade: float
    """In [0, 1]."""
    marked: bool
    """Executed here; in the matrix: the maker's label."""


@dataclass(frozen=True)
class Chunk:
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
    chunks: list[Chunk]
    rows: list[tuple[str, list[Cell]]]


@dataclass(frozen=True)
class Use:
    """Which expert answered which skill."""

    options: list[str]
    rows: list[tuple[str, list[Cell]]]


@dataclass(frozen=True)
class Choosing:
    """How one arm chooses."""

    arm: str
    colour: int
    values: list[str]


@dataclass(frozen=True)
class Head:
    """One head of the cloned policy on held-out traces."""

    name: str
    values: list[str]
    """Chance, and `accuracy (majority)` of each seed."""


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
    learned: list[list[str]]
    """One row per seed: how many iterations, reward, KL, refusals, entropy."""
    learning: str
    delta: float
    experts: str
    remarks: list[str]
    cloning: str
    heads: list[Head]
    cloned: list[int]
    """Seeds of `heads`."""


CHOOSING = (
    "right expert at answers", "right at the last turn", "flips per chunk", "mean plan", "longest plan",
)  # fmt: skip


def part_of(folder: RunFolder, config: ExperimentConfig, colours: Mapping[str, int]) -> RouterPart:
    """Whatever the run's folder holds of its router; what it does not hold is left out."""
    facts = {a.name: _facts(folder, config, a.name) for a in config.arms if a.route}
    by_route = {a.route: a.name for a in reversed(config.arms) if a.route}
    shown = by_route.get("ar1") or by_route.get("ar0") or ""
    talks = [f["conversations"] for f in facts.get(shown, []) if "conversations" in f]
    owners = owners_of(config, talks[0]["skills"]) if talks else {}
    learned, cloned = _learned(folder, config), _cloned(folder, config)
    delta = config.routing.policy_gradient.delta if config.routing else 0.0
    options = talks[0]["options"] if talks else []
    return RouterPart(
        shown=shown,
        conversations=[_conversation(item, owners) for item in talks[0]["shown"]] if talks else [],
        use=_use(talks, owners) if talks else None,
        columns=list(CHOOSING),
        choosing=[
            Choosing(_named(name, found), colours[name], values)
            for name, found in facts.items()
            if any(values := _choosing(found))
        ],
        learned=[_learning_row(seed, rows) for seed, rows in learned.items()],
        learning=plots.learning(learned, delta) if learned else "",
        delta=delta,
        experts=plots.expert_use(learned, options) if options else "",
        remarks=list(_remarks(learned)),
        cloning=plots.cloning(cloned) if cloned else "",
        heads=_heads(cloned),
        cloned=list(cloned),
    )


def owners_of(config: ExperimentConfig, skills: Sequence[str]) -> dict[str, str]:
    """Skill -> the expert that the maker's labels give it to."""
    known = (config.routing.experts if config.routing else None) or {
        skill.replace("/", "-"): [skill] for skill in skills
    }
    return {
        skill: name
        for name, mine in known.items()
        for skill in skills
        if any(skill == wanted or skill.startswith(wanted + "/") for wanted in mine)
    }


def _facts(folder: RunFolder, config: ExperimentConfig, arm: str) -> list[dict[str, Any]]:
    paths = [folder.cell(arm, seed).path / "route.json" for seed in config.seeds]
    return [read_json(path) for path in paths if path.is_file()]


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


def _chunk(chunk: Mapping[str, Any], skill: str, owners: Mapping[str, str]) -> Chunk:
    text = " ".join(chunk["text"].split())
    whole = len(text) <= 2 * GIST + 3
    faded = f", faded {chunk['fade']:.0%}" if chunk["fade"] else ""
    return Chunk(
        number=chunk["chunk"],
        turn=chunk["turn"],
        skill=skill,
        right=owners.get(skill) == chunk["expert"],
        action=f"rank {chunk['rank']}, ×{chunk['strength']:g}{faded}",
        why=chunk["why"],
        gist=text if whole else f"{text[:GIST]} … {text[-GIST:]}",
        text=chunk["text"],
    )


def _cell(chunk: Mapping[str, Any], name: str) -> Cell:
    p = chunk["probabilities"].get(name)
    return Cell("" if p is None else f"{100 * p:.0f}", p or 0.0, chunk["expert"] == name)


def _use(talks: Sequence[Mapping[str, Any]], owners: Mapping[str, str]) -> Use:
    """Answers of each skill under each option, summed over seeds, as shares of the skill's answers."""
    counts = np.sum([talk["use"] for talk in talks], axis=0)
    skills, options = talks[0]["skills"], talks[0]["options"]
    rows = []
    for skill, row in zip(skills, counts, strict=True):
        n = int(row.sum())
        cells = [
            Cell(str(c) if c else "", float(c / max(1, n)), owners.get(skill) == option)
            for c, option in zip(row.tolist(), options, strict=True)
        ]
        rows.append((f"{skill} ({n})", cells))
    return Use(options, rows)


def _choosing(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns CHOOSING, means over seeds; "" where the arm has no such number."""
    talks = [f["conversations"] for f in facts if "conversations" in f]
    known = [f["accuracy_per_turn"] for f in facts if "accuracy_per_turn" in f]
    right = [talk["accuracy"] for talk in talks] or known
    last = [f["agrees_with_gold"] for f in facts if "agrees_with_gold" in f]
    return [
        f"{np.mean(right):.1%}" if right else "",
        f"{np.mean(last):.1%}" if last else "",
        f"{np.mean([t['flip_rate'] for t in talks]):.3f}" if talks else "",
        f"{np.mean([t['plan_length'] for t in talks]):.2f}" if talks else "",
        str(max(t["longest_plan"] for t in talks)) if talks else "",
    ]


# --------------------------------------------------------------------------------------- learning

Learned = dict[int, list[dict[str, Any]]]
"""Seed -> rows of its metrics.jsonl (`policy_gradient.Iteration`)."""


def _stage(folder: RunFolder, seed: int) -> Path:
    return folder.path / "routing" / f"seed-{seed}"


def _learned(folder: RunFolder, config: ExperimentConfig) -> Learned:
    found = {s: read_jsonl(_stage(folder, s) / "ar1-training/metrics.jsonl") for s in config.seeds}
    return {seed: rows for seed, rows in found.items() if rows}


def _learning_row(seed: int, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    first, last = rows[0], rows[-1]
    refused = sum(not row["accepted"] for row in rows)
    numbers = [f"{row['reward']:.3f} ± {2 * row['reward_se']:.3f}" for row in (first, last)]
    largest = max(row["kl"] for row in rows)
    ends = [*numbers, f"{largest:.4f}", str(refused), f"{last['entropy']:.2f}"]
    return [wording.minus(text) for text in (str(seed), str(len(rows)), *ends)]


def _remarks(learned: Learned) -> Iterator[str]:
    """Refused steps and alarms in words."""
    for seed, rows in learned.items():
        refused = [row for row in rows if not row["accepted"]]
        if refused:
            which = _numbers([row["iteration"] for row in refused])
            yield (
                f"Seed {seed}: {len(refused)} of {len(rows)} steps refused ({which}), the policy stayed as "
                f"it was. The last one: {refused[-1]['reason']}."
            )
        alarms = [row for row in rows if row["alarm"]]
        if alarms:
            which = _numbers([row["iteration"] for row in alarms])
            yield f"Seed {seed}: the policy seems to have collapsed ({which}): {alarms[-1]['alarm']}."


def _numbers(iterations: Sequence[int]) -> str:
    """`iterations 2, 5 to 9`."""
    runs: list[list[int]] = []
    for i in iterations:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    texts = [f"{r[0]} to {r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs]
    return f"iteration{'s' * (len(iterations) > 1)} {', '.join(texts)}"


def _cloned(folder: RunFolder, config: ExperimentConfig) -> dict[int, list[dict[str, Any]]]:
    """Seed -> `bc.Accuracy` of each head."""
    paths = {seed: _stage(folder, seed) / "cloning.json" for seed in config.seeds}
    return {seed: read_json(path)["accuracy"] for seed, path in paths.items() if path.is_file()}


def _heads(cloned: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[Head]:
    names = dict.fromkeys(a["head"] for heads in cloned.values() for a in heads)
    found = {seed: {a["head"]: a for a in heads} for seed, heads in cloned.items()}
    return [
        Head(
            name,
            [
                next(f"{heads[name]['chance']:.1%}" for heads in found.values() if name in heads),
                *(_against_majority(heads.get(name)) for heads in found.values()),
            ],
        )
        for name in names
    ]


def _against_majority(a: Mapping[str, Any] | None) -> str:
    if a is None:
        return "–"
    return f"{a['accuracy']:.1%} ({a['majority']:.1%}, {a['decisions']})"
