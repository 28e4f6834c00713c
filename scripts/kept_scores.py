"""Keep the scores of a run, every example of every arm and seed, and judge them again later.

    python scripts/kept_scores.py keep runs/public benchmarks/results/public.tar.xz
    python scripts/kept_scores.py judge benchmarks/results/public.tar.xz
    python scripts/kept_scores.py judge benchmarks/results/public.tar.xz --set gates.slice_margin_points=1

`judge` prints what was decided then and what today's gates and guards decide from the same scores. Adapters and
answers are not kept: a kept run can be judged, not promoted.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
import tempfile
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bem import config as configuration
from bem.runs.folder import RunFolder
from bem.runs.verdicts import judge_arms, measurements, read_verdicts

KEPT = ("config.yaml", "latency.json", "verdicts.json", "arms/*/*/measurement.json")

QUIET = ("  passed", "  not judged")
"""Lines of a verdict that did not decide it."""


def keep(run: Path, archive: Path) -> None:
    """Write the archive; the same run gives the same bytes."""
    files = sorted(file for pattern in KEPT for file in run.glob(pattern))
    missing = [name for name in KEPT if not any(run.glob(name))]
    if missing:
        raise SystemExit(f"{run} has no {', '.join(missing)}: has the run finished?")
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for file in files:
            content = _portable(file) if file.name == "config.yaml" else file.read_bytes()
            entry = tarfile.TarInfo(file.relative_to(run).as_posix())  # without owner and time
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def _portable(config: Path) -> bytes:
    """A run's config without the folders of the machine that it ran on."""
    values = yaml.safe_load(config.read_text(encoding="utf-8"))
    values["output"], values["data"]["root"] = "runs", None
    return yaml.safe_dump(values, sort_keys=False).encode()


def judge(archive: Path, changes: list[str]) -> None:
    """Print both verdicts of each candidate."""
    if not archive.is_file():
        raise SystemExit(f"No archive at {archive}. `keep` writes one.")
    with tempfile.TemporaryDirectory() as work:
        with tarfile.open(archive) as tar:
            tar.extractall(work, filter="data")
        folder = RunFolder(Path(work))
        config = configuration.load(Path(work) / "config.yaml", changes)
        then = read_verdicts(folder.verdicts).judgement
        now = judge_arms(config, measurements(folder, config), then.family)
    for name, verdict in now.candidates.items():
        before = then.candidates[name]
        same = "as then" if before.decision == verdict.decision else f"then {before.decision}"
        print(f"{name}: {verdict.decision} ({same})")
        print(*(x for x in verdict.summary().splitlines()[1:] if not x.startswith(QUIET)), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    keeping = commands.add_parser("keep", help="write an archive of a finished run's scores")
    keeping.add_argument("run", type=Path)
    keeping.add_argument("archive", type=Path)
    judging = commands.add_parser("judge", help="judge an archive again")
    judging.add_argument("archive", type=Path)
    judging.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes")
    given = parser.parse_args()
    if given.command == "keep":
        keep(given.run, given.archive)
    else:
        judge(given.archive, given.changes)


if __name__ == "__main__":
    main()
