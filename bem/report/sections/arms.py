"""The arms of a run: what each is, what was decided, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from bem.config import ArmConfig, ExperimentConfig
from bem.errors import CheckpointError
from bem.files import read_json
from bem.report import words
from bem.report.sections.routing import ROUTES
from bem.runs.folder import RunFolder
from bem.runs.verdicts import Judgement
from bem.stats.measurement import Measurement
from bem.stats.verdict import Verdict

ABOUT = {
    "s0": "static LoRA",
    "pt1": "head-group gates",
    "v1": "head-group gates and rank mask",
    "v2": "head-group gates and attention temperatures, shaped by evidence",
    "v3": "Kronecker update at the MLP",
    "v4": "FiLM on the residual stream",
}
"""Variants in words; one that is not listed stands under its own name."""


@dataclass(frozen=True)
class Arm:
    """One arm as the report shows it."""

    name: str
    role: str
    colour: int
    description: str
    price: list[str]
    decision: str = ""
    sentence: str = ""
    reasons: list[str] = field(default_factory=list)
    checks: list[words.Gate] = field(default_factory=list)
    waived: list[str] = field(default_factory=list)
    not_judged: list[str] = field(default_factory=list)
    """Metrics and slices under no gate, with the reason."""


def ordered(config: ExperimentConfig) -> list[ArmConfig]:
    """All arms, the baseline first."""
    return sorted(config.arms, key=lambda arm: arm.role != "baseline")


def arms_of(
    folder: RunFolder,
    config: ExperimentConfig,
    judgement: Judgement,
    measured: Mapping[str, Measurement],
) -> list[Arm]:
    """Every arm with its price, and candidates with their verdict."""
    base, plans = measured[config.baseline.name], _plans(folder)
    whole = read_json(folder.latency, CheckpointError).get("base_memory_bytes")
    arms = []
    for colour, arm in enumerate(ordered(config)):
        rank = _rank_of(folder, config, arm)
        verdict = judgement.candidates.get(arm.name) or judgement.controls.get(arm.name)
        arms.append(
            Arm(
                arm.name,
                arm.role,
                colour,
                _describe(config, arm, plans.get(arm.name, {})),
                [
                    *_price(measured[arm.name], base, rank, verdict),
                    _added(measured[arm.name], whole),
                ],
                **(_decided(verdict) if arm.role == "candidate" and verdict else {}),
            )
        )
    return arms


def price_columns(base: Measurement) -> list[str]:
    """Names of what `Arm.price` holds."""
    phases = [f"{phase} p50" for phase in base.latency_ms]
    return ["rank", "parameters", "FLOPs / token", *phases, "added memory"]


def _decided(verdict: Verdict) -> dict[str, Any]:
    return {
        "decision": verdict.decision,
        "sentence": words.sentence(verdict),
        "reasons": words.reasons(verdict),
        "checks": words.gates(verdict),
        "waived": list(verdict.waived),
        "not_judged": list(verdict.not_judged),
    }


def _plans(folder: RunFolder) -> dict[str, Any]:
    """What was decided before training; nothing, for a run that did not write it."""
    return read_json(folder.plans, CheckpointError) if folder.plans.is_file() else {}


def _describe(config: ExperimentConfig, arm: ArmConfig, plan: Mapping[str, Any]) -> str:
    where = f", {plan['layers']}" if "layers" in plan else ""
    if arm.shots is not None:
        return f"the base itself, {words.shots(arm.shots)}"
    if arm.route:
        return f"experts, {ROUTES[arm.route]}{where}"
    variant = config.variant_of(arm)
    changes = {k: v for k, v in arm.adapters.items() if k not in ("variant", "rank")}
    details = [f"{key} {value}" for key, value in changes.items()]
    if arm.role != "baseline":
        details.append("rank as configured" if arm.match == "none" else f"equal {arm.match}")
    inside = f" ({', '.join(details)})" if details else ""
    return f"{ABOUT.get(variant, variant)}{inside}{where}"


def _rank_of(folder: RunFolder, config: ExperimentConfig, arm: ArmConfig) -> str:
    """`_rank`; of experts that were saved no setting knows the ranks: as their files say."""
    checkpoint = folder.cell(arm.name, config.seeds[0]).checkpoint
    manifest = read_json(checkpoint / "manifest.json", CheckpointError)
    if not arm.route or config.routing is None or config.routing.checkpoint is None:
        return _rank(manifest, config)
    where, names = folder.routing(config.seeds[0]) / "peer-experts", manifest.get("peer", {})
    names, shared = list(names.get("experts", ())), None
    if "experts" in manifest:
        where, shared = checkpoint / "experts", manifest["router"]["shared"]
        names = [expert["name"] for expert in manifest["experts"]]
    ranks = {n: read_json(where / n / "adapter_config.json", CheckpointError)["r"] for n in names}
    beside = [str(ranks.pop(shared))] if shared in ranks else []
    runs = ((rank, len(list(each))) for rank, each in groupby(ranks.values()))
    return " + ".join([*(f"{count} × {rank}" for rank, count in runs), *beside])


def _rank(manifest: dict[str, Any], config: ExperimentConfig) -> str:
    """`8`, `8 / 4` where the two sites differ; `7 × 8 + 16`: seven experts and a shared one; `–`: none."""
    if manifest.get("kind") == "bare":
        return "–"
    adapter = manifest.get("adapter")
    if adapter is None:
        assert config.routing is not None
        own, shared = config.routing.expert_rank, config.routing.shared_rank
        if "peer" in manifest:  # the shared one is folded into each
            return f"{len(manifest['peer']['experts'])} × {own + shared}"
        count = len(manifest["experts"]) - (shared > 0)
        return f"{count} × {own}" + (f" + {shared}" if shared else "")
    ranks = [adapter.get("rank_attn"), adapter.get("rank_mlp")]
    if all(r is None for r in ranks):
        return str(adapter["rank"])
    return " / ".join(str(adapter["rank"] if r is None else r) for r in ranks)


def _price(m: Measurement, base: Measurement, rank: str, verdict: Verdict | None) -> list[str]:
    checks = verdict.checks if verdict else ()
    ratios = {check.phase: check.value for check in checks if check.kind == "latency"}
    return [
        rank,
        _against(m.adapter_parameters, base.adapter_parameters),
        _against(m.adapter_flops_per_token, base.adapter_flops_per_token),
        *(_latency(m, phase, ratios.get(phase)) for phase in base.latency_ms),
    ]


def _against(value: float | None, base: float | None) -> str:
    if value is None:
        return "–"
    ratio = f" (×{value / base:.2f})" if base else ""
    return f"{value:,.0f}{ratio}"


def _latency(m: Measurement, phase: str, ratio: float | None) -> str:
    if phase not in m.latency_ms:
        return "–"
    p50 = f"{float(np.median(np.asarray(m.latency_ms[phase]))):.1f} ms"
    return p50 + (f" (×{ratio:.2f})" if ratio else "")


def _added(m: Measurement, base_bytes: float | None) -> str:
    """`0.54 MiB (+3.1%)`: what an arm adds, and how much that is of what the bare base needs."""
    if m.adapter_memory_bytes is None:
        return "–"
    share = f" ({m.adapter_memory_bytes / base_bytes:+.1%})" if base_bytes else ""
    return words.minus(f"{m.adapter_memory_bytes / 2**20:.2f} MiB{share}")
