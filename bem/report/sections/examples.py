"""Held-out examples on which the arms differ, answer beside answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from bem.config import ExperimentConfig
from bem.report import words
from bem.runs.folder import RunFolder, read_jsonl

MOST_EXAMPLES = 8
MOST_CHARACTERS = 1200
"""Of a prompt, whose end is what the model answered, and of an answer, from its beginning."""


@dataclass(frozen=True)
class ShownAnswer:
    arm: str
    colour: int
    text: str
    score: str


@dataclass(frozen=True)
class SideBySide:
    """One example with the answers of all arms."""

    task: str
    id: str
    prompt: str
    reference: str
    answers: list[ShownAnswer]


def examples_of(
    folder: RunFolder, config: ExperimentConfig, colours: Mapping[str, int]
) -> list[SideBySide]:
    """Of each task the examples on which the arms differ most, with the first seed's answers."""
    seed = config.seeds[0]
    predictions = {arm: read_jsonl(folder.cell(arm, seed).predictions) for arm in colours}
    if not all(predictions.values()):
        return []
    rows = list(zip(*predictions.values(), strict=True))
    tasks = list(dict.fromkeys(row[0]["task"] for row in rows))
    chosen = []
    for task in tasks:
        differ = [row for row in rows if row[0]["task"] == task and _spread(row) > 0]
        chosen += sorted(differ, key=_spread, reverse=True)[: max(1, MOST_EXAMPLES // len(tasks))]
    return [_side_by_side(row, list(predictions), colours) for row in chosen]


def _spread(row: Sequence[dict[str, Any]]) -> float:
    qualities = [q for answer in row if isfinite(q := answer["scores"]["quality"])]
    return max(qualities) - min(qualities) if qualities else 0.0


def _side_by_side(
    row: Sequence[dict[str, Any]], arms: Sequence[str], colours: Mapping[str, int]
) -> SideBySide:
    prompt, references = row[0]["input"], row[0]["references"]
    return SideBySide(
        task=row[0]["task"],
        id=row[0]["id"].removeprefix(row[0]["task"] + "/"),
        prompt="…" * (len(prompt) > MOST_CHARACTERS) + prompt[-MOST_CHARACTERS:],
        reference=_text(references[0] if references else ""),
        answers=[
            ShownAnswer(
                arm,
                colours[arm],
                _text(answer["prediction"]),
                f"{answer['scores']['quality']:.2f}",
            )
            for arm, answer in zip(arms, row, strict=True)
        ],
    )


def _text(answer: str) -> str:
    return words.shortened(answer, MOST_CHARACTERS) or "(empty)"
