"""The contract that every variant passes, ours or a stranger's, on every architecture.

    report = check_adapter(lambda model: bem.attach(model, "v1", rank=4, chunk_size=8))
    print(report.table()); report.raise_if_failed()

Models are built here, tiny and random, so nothing is downloaded. Adapter weights are perturbed
before a check (except `identity_at_birth`): an adapter that does nothing would pass everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bem.adapters.attached import Attached
from bem.adapters.checks_control import (
    blind_to_the_future,
    cache_is_exact,
    evidence_travels,
    generation_is_exact,
    padding_is_invisible,
    threads_are_exact,
    turns_restart_chunks,
)
from bem.adapters.checks_models import ARCHITECTURES, tiny_model
from bem.adapters.checks_probe import TOKENS, TOLERANCE
from bem.adapters.checks_state import (
    detach_restores,
    disable_restores,
    foreign_scales_survive,
    identity_at_birth,
    price_is_true,
    round_trip,
)
from bem.adapters.checks_training import (
    compiles,
    moves_to_another_dtype,
    only_the_adapter_trains,
    runs_in_bfloat16,
    survives_checkpointing,
)
from bem.errors import AttachError

__all__ = [
    "ARCHITECTURES",
    "CHECKS",
    "TOKENS",
    "TOLERANCE",
    "Outcome",
    "Report",
    "check_adapter",
    "tiny_model",
]

Make = Callable[[Any], Attached]


@dataclass(frozen=True)
class Outcome:
    """Result of one check on one architecture."""

    architecture: str
    check: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """All outcomes of one adapter."""

    outcomes: tuple[Outcome, ...]

    @property
    def passed(self) -> bool:
        """True if nothing failed."""
        return all(o.passed for o in self.outcomes)

    def table(self) -> str:
        """Architectures by checks, as text."""
        names = list(dict.fromkeys(o.check for o in self.outcomes))
        lines = []
        for arch in dict.fromkeys(o.architecture for o in self.outcomes):
            row = {o.check: o for o in self.outcomes if o.architecture == arch}
            marks = " ".join("ok" if row[n].passed else "FAIL" for n in names if n in row)
            lines.append(f"{arch:10s} {marks}")
        return "\n".join(["checks: " + ", ".join(names), *lines])

    def raise_if_failed(self) -> None:
        """AttachError naming every failed check."""
        failed = [f"{o.architecture}/{o.check}: {o.detail}" for o in self.outcomes if not o.passed]
        if failed:
            raise AttachError("the adapter breaks its contract:\n" + "\n".join(failed))


def check_adapter(
    make: Make,
    architectures: Sequence[str] | None = None,
    checks: Sequence[str] | None = None,
) -> Report:
    """Run the contract.

    Args:
        make: attaches the adapter to a model; called afresh for every check.
        architectures: names from `ARCHITECTURES`; None: all.
        checks: names from `CHECKS`; None: all.
    """
    outcomes = []
    for arch in architectures or list(ARCHITECTURES):
        for name in checks or list(CHECKS):
            try:
                detail = CHECKS[name](make, arch)
                outcomes.append(Outcome(arch, name, True, detail or ""))
            except Exception as error:  # a check of foreign code: whatever it raises is its result
                outcomes.append(Outcome(arch, name, False, f"{type(error).__name__}: {error}"))
    return Report(tuple(outcomes))


CHECKS: dict[str, Callable[[Make, str], str]] = {
    check.__name__: check
    for check in (
        identity_at_birth,
        detach_restores,
        disable_restores,
        only_the_adapter_trains,
        blind_to_the_future,
        cache_is_exact,
        padding_is_invisible,
        generation_is_exact,
        threads_are_exact,
        turns_restart_chunks,
        evidence_travels,
        round_trip,
        foreign_scales_survive,
        price_is_true,
        survives_checkpointing,
        runs_in_bfloat16,
        moves_to_another_dtype,
        compiles,
    )
}
"""Name -> (what attaches the adapter, architecture) -> what was measured; raises if it fails."""
