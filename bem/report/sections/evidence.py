"""The report's part on evidence: does quality follow it, does its margin tell, did reranking help?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import atanh, sqrt, tanh
from typing import Any

import numpy as np
from scipy.special import ndtri
from scipy.stats import spearmanr

from bem.config import EVIDENCE_FEATURES, ExperimentConfig, GatesConfig
from bem.errors import CheckpointError
from bem.files import read_json
from bem.report import words
from bem.report.plots import evidence as plots
from bem.runs.folder import RunFolder, read_jsonl
from bem.stats.bootstrap import bca_bootstrap
from bem.stats.measurement import Measurement, RouterFacts
from bem.stats.monotone import index_swap
from bem.tasks.scoring import QUALITY

MARGIN = EVIDENCE_FEATURES.index("margin")
PRESENT = EVIDENCE_FEATURES.index("present")


@dataclass(frozen=True)
class SwapRow:
    """One arm on ever worse evidence."""

    arm: str
    colour: int
    means: list[str]
    """Mean quality in points: clean, corrupt, shuffled, off."""
    losses: list[str]
    """Mean loss of the acceptable answer under the same conditions."""
    steps: list[str]
    """clean - corrupt, corrupt - shuffled, clean - off, in points, with intervals."""
    trend: str
    monotone: str


@dataclass(frozen=True)
class GateRow:
    """How one arm's gates go with the margin of the evidence."""

    arm: str
    colour: int
    n: int
    correlation: str
    low: str
    high: str
    """Mean gate in the lower and the upper third of the margins."""


@dataclass(frozen=True)
class FactRow:
    """What finding the evidence brought to light."""

    task: str
    values: list[str]


@dataclass(frozen=True)
class EvidencePart:
    """Everything that the template shows of evidence."""

    staircase: str
    reliability: str
    gain: str
    conditions: list[str]
    swaps: list[SwapRow]
    gates: list[GateRow]
    facts: list[FactRow]


def part_of(
    folder: RunFolder,
    config: ExperimentConfig,
    measured: Mapping[str, Measurement],
    colours: Mapping[str, int],
) -> EvidencePart | None:
    """None if no task of the run retrieves."""
    path = folder.path / "evidence.json"
    facts = read_json(path, CheckpointError) if path.is_file() else {}
    if not facts:
        return None
    arms = {a.name: a for a in config.arms}
    names = sorted(arms, key=lambda name: colours[name])
    swapped = {n: r for n in names if (r := measured[n].router) is not None and r.index_swap}
    conditions = list(next(iter(swapped.values())).index_swap or ()) if swapped else []
    stairs = [
        plots.Stairs(n, _means(r, config.gates), colours[n], arms[n].role == "control")
        for n, r in swapped.items()
    ]
    rows = {name: _answers(folder, config, name) for name in names}
    return EvidencePart(
        staircase=plots.staircase(stairs, f"{QUALITY} (points)") if stairs else "",
        reliability=_reliability(rows, colours, {n for n in names if arms[n].role == "control"}),
        gain=_gain(facts, config.gates),
        conditions=conditions,
        swaps=[_swap_row(n, colours[n], r, conditions, config.gates) for n, r in swapped.items()],
        gates=[g for n in names if (g := _gate_row(n, colours[n], rows[n])) is not None],
        facts=[_fact_row(task, values) for task, values in facts.items()],
    )


def _means(facts: RouterFacts, gates: GatesConfig) -> dict[str, plots.Interval]:
    assert facts.index_swap is not None
    return {
        condition: _interval(100 * np.asarray(scores), facts.clusters, gates)
        for condition, scores in facts.index_swap.items()
    }


def _interval(values: Any, clusters: Sequence[str] | None, gates: GatesConfig) -> plots.Interval:
    bca = bca_bootstrap(values, gates.n_bootstrap, gates.alpha, gates.seed, clusters=clusters)
    return plots.Interval(bca.observed, bca.lower, bca.upper)


def _swap_row(
    arm: str, colour: int, facts: RouterFacts, conditions: list[str], gates: GatesConfig
) -> SwapRow:
    assert facts.index_swap is not None
    scores = {c: np.asarray(v) for c, v in facts.index_swap.items()}
    losses = {c: np.asarray(v) for c, v in (facts.answer_loss or {}).items()}
    pairs = [("clean", "corrupt"), ("corrupt", "shuffled"), ("clean", "off")]
    steps = [
        _signed(_interval(100 * (scores[a] - scores[b]), facts.clusters, gates))
        for a, b in pairs
        if a in scores and b in scores
    ]
    swap = index_swap(scores, facts.clusters, gates)
    trend = "–" if swap.spearman is None else f"{swap.spearman:+.2f} (p = {swap.p_value:.2g})"
    return SwapRow(
        arm=arm,
        colour=colour,
        means=[f"{100 * scores[c].mean():.1f}" for c in conditions],
        losses=[f"{losses[c].mean():.3f}" for c in conditions if c in losses],
        steps=steps,
        trend=words.minus(trend),
        monotone={True: "yes", False: "no", None: "not decided"}[swap.monotone],
    )


def _signed(i: plots.Interval) -> str:
    return str(words.Difference(i.value, i.low, i.high))


@dataclass(frozen=True)
class _Answers:
    """Held-out rows with evidence; quality and gate averaged over seeds."""

    margins: np.ndarray
    quality: np.ndarray
    gates: np.ndarray | None


def _answers(folder: RunFolder, config: ExperimentConfig, arm: str) -> _Answers:
    seeds = [
        [
            row
            for row in read_jsonl(folder.cell(arm, seed).predictions)
            if row.get("relevance") and row["relevance"][PRESENT]
        ]
        for seed in config.seeds
    ]
    gates = [[row.get("gate") for row in rows] for rows in seeds]
    gated = all(gate is not None for row in gates for gate in row)
    return _Answers(
        np.array([row["relevance"][MARGIN] for row in seeds[0]]),
        np.mean([[row["scores"][QUALITY] for row in rows] for rows in seeds], axis=0),
        np.mean(gates, axis=0) if gated and seeds[0] else None,
    )


def _reliability(
    answers: Mapping[str, _Answers], colours: Mapping[str, int], controls: set[str]
) -> str:
    margins = next(iter(answers.values())).margins
    if not margins.size:
        return ""
    lines = [
        plots.Correctness(arm, a.quality, colours[arm], arm in controls)
        for arm, a in answers.items()
    ]
    return plots.reliability(margins, lines)


def _gate_row(arm: str, colour: int, answers: _Answers) -> GateRow | None:
    if answers.gates is None:
        return None
    margins, gates = answers.margins, answers.gates
    order = np.argsort(margins, kind="stable")
    third = max(1, len(order) // 3)
    return GateRow(
        arm=arm,
        colour=colour,
        n=len(margins),
        correlation=correlation(margins, gates),
        low=f"{gates[order[:third]].mean():.3f}",
        high=f"{gates[order[-third:]].mean():.3f}",
    )


def correlation(x: np.ndarray, y: np.ndarray, alpha: float = 0.05) -> str:
    """Spearman's rank correlation with Fisher's interval (variance of Bonett & Wright 2000)."""
    if len(x) < 5 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return "none (constant)"
    r = float(spearmanr(x, y).statistic)  # pyright: ignore
    centre = atanh(min(max(r, -1 + 1e-12), 1 - 1e-12))
    half = -float(ndtri(alpha / 2)) * sqrt((1 + r * r / 2) / (len(x) - 3))
    return words.minus(f"{r:+.2f} [{tanh(centre - half):+.2f}, {tanh(centre + half):+.2f}]")


def _gain(facts: Mapping[str, Any], gates: GatesConfig) -> str:
    """Mean reciprocal rank of the gold passage by the search and by the reranker."""
    gains = []
    for task, values in facts.items():
        if not values["ranks"]:
            continue
        before, after = (_reciprocal(values["ranks"][k]) for k in ("search", "reranked"))
        parts = [_interval(v, None, gates) for v in (before, after, after - before)]
        gains.append(plots.RerankerGain(task, len(before), *parts))
    return plots.reranker_gain(gains) if gains else ""


def _reciprocal(ranks: Sequence[int]) -> np.ndarray:
    """1 / rank, and 0 where the gold passage was not among the candidates (rank 0)."""
    place = np.array(ranks, dtype=float)
    return np.divide(1, place, out=np.zeros_like(place), where=place > 0)


def _fact_row(task: str, facts: Mapping[str, Any]) -> FactRow:
    ranks = facts["ranks"]
    among = "–" if not ranks else f"{np.mean(np.array(ranks['search']) > 0):.0%}"
    first = "–" if not ranks else f"{np.mean(np.array(ranks['reranked']) == 1):.0%}"
    passages = facts["passages"]
    return FactRow(
        task,
        [
            f"{passages:,}" if passages else "each row's own",
            among,
            first,
            f"{facts['leaked']} of {facts['held_out']}",
            str(facts["withheld"]),
        ],
    )
