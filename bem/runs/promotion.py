"""The one place that promotes: it moves a pointer if, and only if, a verdict says PROMOTE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bem.config import ExperimentConfig
from bem.errors import CheckpointError, NotAccepted
from bem.files import check_listed, read_json, write_json
from bem.runs.folder import RunFolder, checkpoint_kind
from bem.runs.verdicts import VerdictFile, evidence, judge_arms, measurements, read_verdicts
from bem.stats.verdict import Verdict

POINTER = "promoted.json"


@dataclass(frozen=True)
class Pointer:
    """What is in use."""

    path: Path
    """The pointer file, beside the runs."""
    checkpoint: Path
    arm: str
    seed: int


def promote(run: str | Path, arm: str, seed: int | None = None) -> Pointer:
    """Point at an arm's checkpoint: one atomic move of `promoted.json` in the folder of all runs.

    The verdict must say PROMOTE, every file it rests on must be what it was, and judging the
    measurements again must come to the same decision.

    Args:
        seed: whose checkpoint; None: the config's first seed. (The verdict is on all seeds.)
    Raises:
        NotAccepted: no such verdict, or something changed since.
        CheckpointError: not a finished run, or a file is missing or changed.
    """
    folder = RunFolder(Path(run))
    config, file = folder.config, read_verdicts(folder.verdicts)
    _accepted(_verdict_of(arm, config, file))
    _unchanged(folder, config, file, arm)
    again = judge_arms(config, measurements(folder, config), file.judgement.family).candidates[arm]
    if not again.accepted:
        raise NotAccepted(f"Judged again, {arm} comes out {again.decision}: {again.reasons[0]}")
    seed = config.seeds[0] if seed is None else seed
    if seed not in config.seeds:
        raise NotAccepted(f"{arm} has no seed {seed}. Seeds: {', '.join(map(str, config.seeds))}.")
    checkpoint = folder.cell(arm, seed).checkpoint
    _whole(checkpoint, arm)
    path = folder.path.parent / POINTER
    manifest = (checkpoint / "manifest.json").relative_to(folder.path)
    write_json(
        path,
        {
            "run": folder.path.name,
            "arm": arm,
            "seed": seed,
            "checkpoint": str(checkpoint.relative_to(folder.path.parent)),
            "manifest_sha256": file.evidence[str(manifest)],
            "verdicts_sha256": file.sha256,
            "base": config.base,
        },
    )
    return Pointer(path, checkpoint, arm, seed)


def current(runs: str | Path) -> Pointer | None:
    """What is in use, or None."""
    path = Path(runs) / POINTER
    if not path.is_file():
        return None
    values = read_json(path, CheckpointError)
    return Pointer(path, path.parent / values["checkpoint"], values["arm"], values["seed"])


def _verdict_of(arm: str, config: ExperimentConfig, file: VerdictFile) -> Verdict:
    judgement = file.judgement
    if arm in judgement.candidates:
        return judgement.candidates[arm]
    if arm in judgement.controls:
        raise NotAccepted(f"{arm} is a control: controls are measured and shown, never promoted.")
    if arm == config.baseline.name:
        raise NotAccepted(f"{arm} is the baseline: there is nothing it was judged against.")
    judged = ", ".join(judgement.candidates) or "none"
    raise NotAccepted(f"No arm {arm!r} was judged. Judged: {judged}.")


def _accepted(verdict: Verdict) -> None:
    if verdict.accepted:
        return
    against = [reason for reason in verdict.reasons if not reason.startswith("passed")]
    raise NotAccepted(
        f"{verdict.candidate} was judged {verdict.decision}, not PROMOTE:\n  "
        + "\n  ".join(against)
    )


def _unchanged(folder: RunFolder, config: ExperimentConfig, file: VerdictFile, arm: str) -> None:
    if not file.unchanged:
        raise NotAccepted(
            f"{folder.verdicts} was changed after it was written. Run `bem run` again."
        )
    now = evidence(folder, config)
    changed = [name for name, digest in now.items() if file.evidence.get(name) != digest]
    if changed:
        raise NotAccepted(
            f"Changed since {arm} was judged: {', '.join(changed)}. Run `bem run` again."
        )


def _whole(checkpoint: Path, arm: str) -> None:
    """Every file that the checkpoint's manifest lists is there, unchanged, and can be served."""
    if checkpoint_kind(checkpoint) == "peer":
        raise NotAccepted(
            f"{arm} is a method of PEFT's, measured beside ours: BEM cannot serve it."
        )
    manifest = read_json(checkpoint / "manifest.json", CheckpointError)
    check_listed(checkpoint, manifest.get("files"), CheckpointError)
