"""What a learner's folder tells people: scores over time, and what became of every candidate.

scores.jsonl      a line per round: event, mean score, version that answered. Nothing is decided by it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bem.files import write_text
from bem.online.loop import Round

NAME = "scores.jsonl"
TAIL = 256 * 1024
"""Bytes of the newest scores that are read: some thousand rounds."""
POINTS = 240
CANDIDATES = 20


class Scores:
    """Writes them, one learner at a time."""

    def __init__(self, folder: Path, event: int):
        """
        Args:
            event: of the learner now. What was written of later ones, before a kill, is going to be done again.
        """
        self.path = folder / NAME
        kept = [line for line in _lines(self.path) if line["event"] <= event]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def add(self, done: Round) -> None:
        """One round; one without a score says nothing."""
        known = [score for score in done.scores if score is not None]
        if known:
            line = {"event": done.event, "n": len(known), "mean": sum(known) / len(known)}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({**line, "version": done.version}) + "\n")


def scores(folder: Path, most: int = POINTS) -> list[dict[str, Any]]:
    """The newest scores, neighbours of one version put together until they are few enough, oldest first."""
    lines = _lines(folder / NAME)
    each = -(-len(lines) // most) if lines else 1
    found: list[dict[str, Any]] = []
    rounds = 0
    for line in lines:
        last = found[-1] if found else None
        if last is None or rounds == each or last["version"] != line["version"]:
            found.append(dict(line))
            rounds = 1
            continue
        n = last["n"] + line["n"]
        last["mean"] += (line["mean"] - last["mean"]) * line["n"] / n
        last["n"], last["event"], rounds = n, line["event"], rounds + 1
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """Of the tail; a line that is torn, or cut by it, is left out."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL))
        raw = file.read().split(b"\n")[1 if size > TAIL else 0 :]
    found = []
    for line in raw:
        try:
            values = json.loads(line)
            found.append({name: values[name] for name in ("event", "n", "mean", "version")})
        except (ValueError, KeyError, TypeError):
            continue
    return found


class Journal:
    """A learner's journal, read on from where it was read last: it grows for as long as the learner lives."""

    def __init__(self, path: Path):
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self.entries: list[dict[str, Any]] = []
        """All lines but those of steps that were discarded, which are many and only counted."""
        self.counts: Counter[str] = Counter()
        self._read = 0

    def look(self) -> None:
        """Take in what was written since; a journal that was cut is read anew. A torn last line waits."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size < self._read:
            self._forget()
        if size == self._read:
            return
        with open(self.path, "rb") as file:
            file.seek(self._read)
            raw = file.read()
        whole = raw[: raw.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
                what, _ = entry["what"], entry["event"]
            except (ValueError, KeyError, TypeError):
                continue
            self.counts[what] += 1
            if what != "discarded":
                self.entries.append(entry)


def by_candidate(entries: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """Number -> what a journal says of that candidate; what happened to its version later counts too."""
    found: dict[int, list[dict[str, Any]]] = {}
    for entry in entries:
        if "number" in entry:
            found.setdefault(entry["number"], []).append(entry)
        elif entry["what"] == "rolled back":
            for listed in found.values():
                if listed[-1].get("version") == entry["version"]:
                    listed.append(entry)
    return found


def candidates(
    entries: Sequence[dict[str, Any]], on_trial: dict[str, Any] | None, most: int = CANDIDATES
) -> list[dict[str, Any]]:
    """The newest candidates, the newest first: what became of each, why, and its e-values.

    Args:
        entries: of a journal.
        on_trial: summary of the trial that runs; its candidate has no other yet.
    """
    found = []
    for number, told in sorted(by_candidate(entries).items(), reverse=True)[:most]:
        last = told[-1]
        runs = last["what"] == "candidate"
        trial = next((e["trial"] for e in reversed(told) if e.get("trial")), None)
        trial = (on_trial if runs else trial) or {}
        found.append(
            {
                "number": number,
                "version": last["version"],
                "what": "on trial" if runs else last["what"],
                "why": last.get("reason") or trial.get("reason", ""),
                "events": trial.get("events", 0),
                "metrics": trial.get("metrics", []),
            }
        )
    return found
