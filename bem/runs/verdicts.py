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

from bem.config import ArmConfig, ExperimentConfig, GatesConfig
from bem.errors import CheckpointError, MeasurementError
from bem.files import read_json, sha256_file, sha256_json, write_json
from bem.runs.folder import RunFolder, written
from bem.stats.files import load
from bem.stats.gates import judge
from bem.stats.measurement import Measurement, RouterFacts
from bem.stats.verdict import Verdict

FORMAT = "bem-verdicts-2"


@dataclass(frozen=True)
class Judgement:
    """Everything that was judged in one run."""

    family: tuple[str, ...]
    """Primary metrics, declared before looking."""
    candidates: dict[str, Verdict]
    controls: dict[str, Verdict]
    contrasts: dict[str, dict[str, Verdict]]
    """candidate -> control -> verdict of the candidate against the control."""


@dataclass(frozen=True)
class VerdictFile:
    """What `verdicts.json` holds."""

    judgement: Judgement
    evidence: dict[str, str]
    """sha256 of every file that the verdicts rest on, by its path inside the run."""
    sha256: str
    """Of the rest of the file, as it says itself."""
    unchanged: bool
    """The rest of the file has that sha256."""


def judge_run(folder: RunFolder, config: ExperimentConfig, family: Sequence[str]) -> Judgement:
    """Judge the measurements in the folder and write `verdicts.json`."""
    judgement = judge_arms(config, measurements(folder, config), family)
    content = {
        "format": FORMAT,
        "family": list(family),
        "candidates": _dicts(judgement.candidates),
        "controls": _dicts(judgement.controls),
        "contrasts": {name: _dicts(row) for name, row in judgement.contrasts.items()},
        "evidence": evidence(folder, config),
    }
    write_json(folder.verdicts, {**content, "sha256": sha256_json(content)})
    return judgement


def read_verdicts(path: Path) -> VerdictFile:
    """Read `verdicts.json`.

    Raises:
        CheckpointError: the run has not written it, or it is not JSON.
        MeasurementError: another version wrote it.
    """
    content = read_json(written(path), CheckpointError)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise MeasurementError(f"{path} holds no verdicts of this version. Run `bem run` again.")
    rest = {key: value for key, value in content.items() if key != "sha256"}
    stated = content.get("sha256", "")
    judgement = Judgement(
        tuple(content["family"]),
        _verdicts(content["candidates"]),
        _verdicts(content["controls"]),
        {name: _verdicts(row) for name, row in content["contrasts"].items()},
    )
    return VerdictFile(judgement, content["evidence"], stated, sha256_json(rest) == stated)


def judge_arms(
    config: ExperimentConfig, measured: Mapping[str, Measurement], family: Sequence[str]
) -> Judgement:
    """Judge every arm that is no baseline; all candidates with one opponent share one family."""

    gates = gates_of(config, measured)

    def against(arms: list[ArmConfig]) -> dict[str, Verdict]:
        verdicts: dict[str, Verdict] = {}
        for opponent in dict.fromkeys(opponent_of(config, arm) for arm in arms):
            group = [arm for arm in arms if opponent_of(config, arm) == opponent]
            sides = {arm.name: measured[arm.name] for arm in group}
            routed = [arm.name for arm in group if arm.route]
            verdicts |= judge(measured[opponent], sides, gates, family, routed)
        return {arm.name: verdicts[arm.name] for arm in arms}

    candidates = [arm for arm in config.arms if arm.role == "candidate"]
    controls = [arm for arm in config.arms if arm.role == "control"]
    contrasts: dict[str, dict[str, Verdict]] = {}
    for candidate in candidates:
        for control in controls_of(config, candidate):
            side = {candidate.name: measured[candidate.name]}
            verdict = judge(measured[control.name], side, gates, family)[candidate.name]
            contrasts.setdefault(candidate.name, {})[control.name] = verdict
    return Judgement(tuple(family), against(candidates), against(controls), contrasts)


def gates_of(config: ExperimentConfig, measured: Mapping[str, Measurement]) -> GatesConfig:
    """The config's gates; where no arm was asked with other indices there is none to swap, and every
    verdict lists that gate as waived."""
    swapped = [m for m in measured.values() if m.router and m.router.index_swap]
    waived = {*config.gates.waived, *(() if swapped else ("index_swap",))}
    return config.gates.model_copy(update={"waived": tuple(sorted(waived))})


def opponent_of(config: ExperimentConfig, arm: ArmConfig) -> str:
    """Name of the arm that one is judged against."""
    return arm.compare_to or config.baseline.name


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
        and arm.route in (None, "linear", "encoder", "single", "random", "wrong")
    ]


# ------------------------------------------------------------------------------------ measurements


def measurements(folder: RunFolder, config: ExperimentConfig) -> dict[str, Measurement]:
    """Every arm's measurement over all seeds, with the interleaved timings and the added memory."""
    timings = read_json(written(folder.latency), CheckpointError)
    sides = {}
    for arm in config.arms:
        parts = [load(written(folder.cell(arm.name, s).measurement)) for s in config.seeds]
        sides[arm.name] = replace(
            over_seeds(arm.name, parts),
            latency_ms=timings["latency_ms"].get(arm.name, {}),
            adapter_memory_bytes=timings["adapter_memory_bytes"].get(arm.name),
        )
    return sides


def over_seeds(name: str, parts: Sequence[Measurement]) -> Measurement:
    """One measurement of several seeds, measured on the same examples.

    Scores and cache use are stacked, [seeds, ...]: the seeds of one example or request are not
    independent of each other. A fact that one seed lacks is missing (None).

    Raises:
        MeasurementError: the seeds were measured on different examples.
    """
    first = parts[0]
    for part in parts[1:]:
        if part.example_ids != first.example_ids:
            raise MeasurementError(f"{name}: its seeds were measured on different examples.")
    return replace(
        first,
        name=name,
        metrics=_stacked([part.metrics for part in parts]),
        corpus=_stacked([part.corpus for part in parts]),
        kv_hits=_rows([part.kv_hits for part in parts]),
        kv_held=_rows([part.kv_held for part in parts]),
        kv_needed=_rows([part.kv_needed for part in parts]),
        adapter_parameters=_largest([part.adapter_parameters for part in parts]),
        adapter_flops_per_token=_largest([part.adapter_flops_per_token for part in parts]),
        router=_router_facts([part.router for part in parts]),
    )


def _stacked(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """[seeds, ...] of every metric that all seeds have."""
    return {
        metric: np.concatenate([np.asarray(part[metric]) for part in parts])
        for metric in parts[0]
        if all(metric in part for part in parts)
    }


def _rows(parts: Sequence[Any]) -> Any:
    """[seeds, requests]; None: one seed lacks them."""
    if any(part is None for part in parts):
        return None
    return np.concatenate([np.atleast_2d(part) for part in parts])


def _largest(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return max(present) if len(present) == len(values) else None


def _router_facts(parts: Sequence[RouterFacts | None]) -> RouterFacts | None:
    """Facts that every seed has; None: no seed has any."""
    facts = [part or RouterFacts() for part in parts]
    if all(part is None for part in parts):
        return None
    plans = [part.plan_lengths for part in facts]
    return RouterFacts(
        plan_lengths=(
            [int(n) for lengths in plans for n in lengths or ()]
            if all(lengths is not None for lengths in plans)
            else None
        ),
        index_swap=_by_condition([part.index_swap for part in facts]),
        clusters=facts[0].clusters,
        answer_loss=_by_condition([part.answer_loss for part in facts]),
    )


def _by_condition(parts: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """[seeds, examples] of every condition that all seeds have."""
    if any(part is None for part in parts):
        return None
    return _stacked([{c: np.atleast_2d(v) for c, v in (part or {}).items()} for part in parts])


def evidence(folder: RunFolder, config: ExperimentConfig) -> dict[str, str]:
    """sha256 of every file that the verdicts rest on, by its path inside the run.

    Raises:
        CheckpointError: one of them is not there.
    """
    files = [folder.path / "config.yaml", folder.latency]
    for arm in config.arms:
        for seed in config.seeds:
            cell = folder.cell(arm.name, seed)
            files += [cell.measurement, cell.checkpoint / "manifest.json"]
    return {str(path.relative_to(folder.path)): sha256_file(written(path)) for path in files}


# -------------------------------------------------------------------------------------- as JSON


def _dicts(verdicts: Mapping[str, Verdict]) -> dict[str, dict[str, Any]]:
    return {name: verdict.to_dict() for name, verdict in verdicts.items()}


def _verdicts(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Verdict]:
    return {name: Verdict.from_dict(row) for name, row in values.items()}
