"""The one place that promotes: it moves a pointer if, and only if, a verdict says PROMOTE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bem.adapters.checkpoint import check
from bem.errors import NotAccepted
from bem.routing.mounted import check_files as check_router_files
from bem.routing.mounted import is_router
from bem.runs.folder import RunFolder, digest_of, read_json, write_json
from bem.runs.verdicts import evidence, judge_arms, measurements, read_verdicts

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
        CheckpointError: not a finished run, or a file is missing.
    """
    folder = RunFolder(Path(run))
    config = folder.config
    verdicts = read_verdicts(folder.verdicts)
    verdict = verdicts["candidates"].get(arm)
    if verdict is None:
        raise NotAccepted(_no_verdict(arm, config.baseline.name, verdicts))
    if verdict["decision"] != "PROMOTE":
        open_or_failed = [
            reason for reason in verdict["reasons"] if not reason.startswith("passed")
        ]
        raise NotAccepted(
            f"{arm} was judged {verdict['decision']}, not PROMOTE:\n  "
            + "\n  ".join(open_or_failed)
        )
    content = {key: value for key, value in verdicts.items() if key != "sha256"}
    if digest_of(content) != verdicts.get("sha256"):
        raise NotAccepted(
            f"{folder.verdicts} was changed after it was written. Run `bem run` again."
        )
    changed = [
        name for name, digest in evidence(folder, config).items()
        if verdicts["evidence"].get(name) != digest
    ]  # fmt: skip
    if changed:
        raise NotAccepted(
            f"Changed since {arm} was judged: {', '.join(changed)}. Run `bem run` again."
        )
    again = judge_arms(config, measurements(folder, config), verdicts["family"]).candidates[arm]
    if not again.accepted:
        raise NotAccepted(f"Judged again, {arm} comes out {again.decision}: {again.reasons[0]}")
    seed = config.seeds[0] if seed is None else seed
    if seed not in config.seeds:
        raise NotAccepted(f"{arm} has no seed {seed}. Seeds: {', '.join(map(str, config.seeds))}.")
    checkpoint = folder.cell(arm, seed).checkpoint
    (check_router_files if is_router(checkpoint) else check)(checkpoint)
    path = folder.path.parent / POINTER
    write_json(
        path,
        {
            "run": folder.path.name,
            "arm": arm,
            "seed": seed,
            "checkpoint": str(checkpoint.relative_to(folder.path.parent)),
            "manifest_sha256": verdicts["evidence"][
                str((checkpoint / "manifest.json").relative_to(folder.path))
            ],
            "verdicts_sha256": verdicts["sha256"],
            "base": config.base,
        },
    )
    return Pointer(path, checkpoint, arm, seed)


def current(runs: str | Path) -> Pointer | None:
    """What is in use, or None."""
    path = Path(runs) / POINTER
    if not path.is_file():
        return None
    values = read_json(path)
    return Pointer(path, path.parent / values["checkpoint"], values["arm"], values["seed"])


def _no_verdict(arm: str, baseline: str, verdicts: dict) -> str:
    if arm in verdicts["controls"]:
        return f"{arm} is a control: controls are measured and shown, never promoted."
    if arm == baseline:
        return f"{arm} is the baseline: there is nothing it was judged against."
    return f"No arm {arm!r} was judged. Judged: {', '.join(verdicts['candidates']) or 'none'}."
