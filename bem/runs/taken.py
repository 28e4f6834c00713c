"""Which release of a version store is to be served, and why: the one in use, or the last good one before it."""

from __future__ import annotations

from dataclasses import dataclass

from bem.errors import CheckpointError
from bem.runs.ledger import Ledger, in_use
from bem.runs.pointer import REPAIR, Look
from bem.runs.release import Release
from bem.runs.shelf import Shelf


@dataclass(frozen=True)
class Taken:
    """What a store says is to be served."""

    release: Release | None
    """None: the bare base."""
    why: str
    problems: tuple[str, ...] = ()
    """What was found damaged on the way; empty: nothing."""


def damage_of(ledger: Ledger) -> list[str]:
    """What is wrong with a ledger."""
    found = [f"{ledger.path} is damaged: {ledger.damage}. {REPAIR}"] if ledger.damage else []
    if ledger.torn:
        found.append(f"The last line of {ledger.path} is torn: it was never acknowledged.")
    return found


def good(shelf: Shelf, look: Look, problems: list[str]) -> Taken:
    """What the pointer names, if it can be believed and is whole; else the newest whole release of those
    that were put into use and not taken back.

    Args:
        problems: what is known to be damaged; what else is found is added.
    Raises:
        CheckpointError: none is whole.
    """
    if look.trouble:
        problems.append(f"{look.trouble}. {REPAIR}")
    if pointer := look.believed:
        try:
            release = shelf.whole(pointer.release)
            why = f"entry {pointer.entry} put it into use"
            return Taken(release, why if pointer.entry else "nothing was promoted yet")
        except CheckpointError as damaged:
            problems.append(str(damaged))
    return _last_good(shelf, look.ledger, problems)


def _last_good(shelf: Shelf, ledger: Ledger, problems: list[str]) -> Taken:
    names, moves = in_use(ledger.moves()), ledger.moves()
    if names == [None] and moves:
        return Taken(None, f"entry {moves[-1].number} went back to the bare base")
    for name in reversed(names[1:]):
        try:
            which = "the last put into use" if name == names[-1] else "in use before"
            return Taken(shelf.whole(name), f"{which}, because {problems[-1]}")
        except CheckpointError as damaged:
            problems += [str(damaged)] if str(damaged) not in problems else []
    raise CheckpointError(
        f"{shelf.releases.parent} holds no release that is whole:\n  "
        + "\n  ".join(problems)
        + "\nPut the files back from a copy, or promote into a new folder: --store."
    )
