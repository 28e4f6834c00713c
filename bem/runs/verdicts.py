"""From a run's measurements to its verdicts, and the file that says what they rest on.

candidates   against the baseline (or `compare_to`): the only verdicts that can promote
controls     against the same, in a family of their own: shown beside every gain
contrasts    each candidate against each control of its variant: is it the idea, or its size?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bem.config import ArmConfig, ExperimentConfig
from bem.errors import MeasurementError
from bem.runs.folder import RunFolder, digest_of, read_json, sha256, write_json
from bem.stats.files import load
from bem.stats.gates import judge
from bem.stats.measurement import Measurement
from bem.stats.verdict import Verdict

FORMAT = "bem-verdicts-1"


@dataclass(frozen=True)
class Judgement:
    """Everything that was judged in one run."""

    candidates: dict[str, Verdict]
    controls: dict[str, Verdict]
    contrasts: dict[str, dict[str, Verdict]]
    """candidate -> control -> verdict of the candidate against the control."""


def judge_run(folder: RunFolder, config: ExperimentConfig, family: Sequence[str]) -> Judgement:
    """Judge the measurements in the folder and write `verdicts.json`."""
    judgement = judge_arms(config, measurements(folder, config), family)
    content = {
        "format": FORMAT,
        "family": list(family),
        "candidates": {name: v.to_dict() for name, v in judgement.candidates.items()},
        "controls": {name: v.to_dict() for name, v in judgement.controls.items()},
        "contrasts": {
            name: {control: v.to_dict() for control, v in row.items()}
            for name, row in judgement.contrasts.items()
        },
        "evidence": evidence(folder, config),
    }
    write_json(folder.verdicts, {**content, "sha256": digest_of(content)})
    return judgement


def judge_arms(
    config: ExperimentConfig, measured: Mapping[str, Measurement], family: Sequence[str]
) -> Judgement:
    """Judge every arm that is no baseline; all candidates with one opponent share one family."""

    def against(arms: list[ArmConfig]) -> dict[str, Verdict]:
        verdicts: dict[str, Verdict] = {}
        for opponent in dict.fromkeys(arm.compare_to or config.baseline.name for arm in arms):
            group = [a for a in arms if (a.compare_to or config.baseline.name) == opponent]
            sides = {arm.name: measured[arm.name] for arm in group}
            verdicts |= judge(measured[opponent], sides, config.gates, family)
        return {arm.name: verdicts[arm.name] for arm in arms}

    candidates = [arm for arm in config.arms if arm.role == "candidate"]
    controls = [arm for arm in config.arms if arm.role == "control"]
    contrasts: dict[str, dict[str, Verdict]] = {}
    for candidate in candidates:
        for control in controls_of(config, candidate):
            side = {candidate.name: measured[candidate.name]}
            verdict = judge(measured[control.name], side, config.gates, family)[candidate.name]
            contrasts.setdefault(candidate.name, {})[control.name] = verdict
    return Judgement(against(candidates), against(controls), contrasts)


def controls_of(config: ExperimentConfig, candidate: ArmConfig) -> list[ArmConfig]:
    """Controls of the candidate's variant; one of the baseline's variant serves every candidate.

    Of routes only those that a router must beat: the oracle and other methods are shown, not passed.
    """
    variant = config.variant_of(candidate)
    shared = config.variant_of(config.baseline)
    return [
        arm
        for arm in config.arms
        if arm.role == "control"
        and config.variant_of(arm) in (variant, shared)
        and arm.route in (None, "linear", "single", "random", "wrong")
    ]


def measurements(folder: RunFolder, config: ExperimentConfig) -> dict[str, Measurement]:
    """Every arm's measurement over all seeds, with the interleaved timings and peak memory."""
    timings = read_json(folder.latency)
    return {
        arm.name: replace(
            over_seeds(
                arm.name, [load(folder.cell(arm.name, s).measurement) for s in config.seeds]
            ),
            latency_ms=timings["latency_ms"][arm.name],
            memory_bytes=timings["memory_bytes"][arm.name],
        )
        for arm in config.arms
    }


def over_seeds(name: str, parts: Sequence[Measurement]) -> Measurement:
    """One measurement of several seeds, measured on the same examples."""
    first = parts[0]
    for part in parts[1:]:
        if part.example_ids != first.example_ids:
            raise MeasurementError(f"{name}: its seeds were measured on different examples.")

    def stacked(key: str) -> dict[str, Any]:
        return {
            metric: np.concatenate([np.asarray(getattr(part, key)[metric]) for part in parts])
            for metric in getattr(first, key)
        }

    def largest(key: str) -> float | None:
        values = [getattr(part, key) for part in parts]
        return None if any(v is None for v in values) else max(values)

    def joined(key: str) -> Any:
        values = [getattr(part, key) for part in parts]
        return None if any(v is None for v in values) else np.concatenate(values)

    def swapped(key: str) -> dict[str, Any] | None:
        facts = [getattr(part.router, key, None) for part in parts]
        if any(f is None for f in facts):
            return None
        return {c: np.concatenate([np.atleast_2d(f[c]) for f in facts]) for c in facts[0]}  # type: ignore[index]

    plans = [list(getattr(part.router, "plan_lengths", None) or ()) for part in parts]
    router = first.router and replace(
        first.router,
        plan_lengths=[n for lengths in plans for n in lengths] if all(plans) else None,
        index_swap=swapped("index_swap"),
        answer_loss=swapped("answer_loss"),
    )
    return replace(
        first,
        name=name,
        router=router,
        kv_hits=joined("kv_hits"),
        kv_needed=joined("kv_needed"),
        metrics=stacked("metrics"),
        corpus=stacked("corpus"),
        adapter_parameters=largest("adapter_parameters"),
        adapter_flops_per_token=largest("adapter_flops_per_token"),
    )


def evidence(folder: RunFolder, config: ExperimentConfig) -> dict[str, str]:
    """sha256 of every file that the verdicts rest on, by its path inside the run."""
    files = [folder.path / "config.yaml", folder.latency]
    for arm in config.arms:
        for seed in config.seeds:
            cell = folder.cell(arm.name, seed)
            files += [cell.measurement, cell.checkpoint / "manifest.json"]
    return {str(path.relative_to(folder.path)): sha256(path) for path in files}


def read_verdicts(path: Path) -> dict[str, Any]:
    """The content of `verdicts.json` as plain values."""
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise MeasurementError(f"{path} holds no verdicts of this version. Run `bem run` again.")
    return content
