"""The one way into use: a verdict that says PROMOTE, on evidence that is still what it was."""

from __future__ import annotations

from pathlib import Path

from bem.config import ExperimentConfig
from bem.errors import NotAccepted
from bem.files import sha256_file
from bem.releases.named import router_of
from bem.runs.folder import STORE, RunFolder, checkpoint_kind, written
from bem.runs.release import Content, Grounds, Release, read_content
from bem.runs.store import Store
from bem.runs.verdicts import VerdictFile, evidence, judge_arms, measurements, read_verdicts
from bem.stats.verdict import Verdict


def promote(
    run: str | Path, arm: str, seed: int | None = None, store: Store | None = None
) -> Release:
    """Put an arm's adapter into use.

    The verdict must say PROMOTE, every file it rests on must be what it was, and judging the
    measurements again must come to the same decision.

    Args:
        seed: whose checkpoint; None: the config's first seed. (The verdict is on all seeds.)
        store: None: the folder `store` beside the run.
    Raises:
        NotAccepted: no such verdict, something changed since, or the store serves another base.
        CheckpointError: not a finished run, a file is missing or changed, or the store is damaged.
    """
    content, grounds = accepted(run, arm, seed)
    return (store or store_of(run)).promote(content, grounds)


def store_of(run: str | Path) -> Store:
    """The version store that lies beside a run."""
    return Store(Path(run).parent / STORE)


def accepted(run: str | Path, arm: str, seed: int | None = None) -> tuple[Content, Grounds]:
    """An arm's checkpoint and the verdict that lets it into use; see `promote`."""
    folder = RunFolder(Path(run))
    config, digest = folder.config, sha256_file(written(folder.verdicts))
    file = read_verdicts(folder.verdicts)
    _accepted(_verdict_of(arm, config, file))
    _unchanged(folder, config, file, arm)
    again = judge_arms(config, measurements(folder, config), file.judgement.family).candidates[arm]
    if not again.accepted:
        raise NotAccepted(f"Judged again, {arm} comes out {again.decision}: {again.reasons[0]}")
    seed = config.seeds[0] if seed is None else seed
    if seed not in config.seeds:
        raise NotAccepted(f"{arm} has no seed {seed}. Seeds: {', '.join(map(str, config.seeds))}.")
    checkpoint = folder.cell(arm, seed).checkpoint
    if checkpoint_kind(checkpoint) == "peer":
        raise NotAccepted(
            f"{arm} is a method of PEFT's, measured beside ours: BEM cannot serve it."
        )
    manifest = (checkpoint / "manifest.json").relative_to(folder.path)
    content = read_content(checkpoint, file.evidence[str(manifest)])
    return content, Grounds(folder.path.name, arm, seed, folder.verdicts, digest)


def import_release(store: Store, folder: str | Path) -> Release:
    """Keep a checkpoint in a store without putting it into use: nobody judged it here.

    Args:
        folder: of a static adapter, or of a router with its experts; or the name of a release, whose
            router it is: `bem-smol`.
    Raises:
        NotAccepted: the store serves another base.
        CheckpointError: neither a folder nor a release, no checkpoint of ours, a missing or changed file, or the store is damaged.
    """
    return store.add(read_content(router_of(folder)), str(folder))


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
