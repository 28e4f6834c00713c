"""Kill an online learner and the log that it learns from, 200 times: nothing acknowledged is lost, nothing is torn.

    python benchmarks/faults/online_kills.py            # writes benchmarks/results/online_kills.md

One process takes feedback (and acknowledges every event on a pipe once `add` has returned) and lets the loop
catch up: lessons, steps, candidates, trials, promotions and rollbacks through the version store. The kernel ends it,
without a handler, at a random instant of its CPU time; the next process goes on in the same folders. Every time the
log must hold what was acknowledged, in order and without holes, every snapshot must be whole, and every byte of the
store as it was written. In the end the learner must be, to the last bit, what one is that was never killed.

The trainee has four numbers instead of a model (`tests/online/toys.py`): what is tested is everything around it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from bem.online.desk import Desk  # noqa: E402
from bem.online.events import Feedback, Served  # noqa: E402
from bem.online.feedback import FeedbackLog  # noqa: E402
from bem.online.live import catch_up  # noqa: E402
from bem.online.loop import Loop  # noqa: E402
from bem.runs.store import Store  # noqa: E402
from bem.runs.upkeep import check  # noqa: E402
from bem.training.state import read_state  # noqa: E402
from tests.online.toys import CONFIG, SKILLS, Toy  # noqa: E402

DAY, MORNING = 400, 250
"""Other answers are right after the morning, and the first ones again the next day: so that something is promoted,
and rolled back when the world turns back while it is watched."""


def work(folder: Path, total: int, pipe: int) -> None:
    """Take feedback in and learn from it until there is nothing left to do."""
    log = FeedbackLog(folder / "feedback.db")
    with opened(folder) as loop:
        while log.last() < total:
            for i in range(log.last(), min(log.last() + 8, total)):
                right = 1.0 + (i % DAY >= MORNING)
                user, skill = f"u{i * 7 % 60}", i * 13 % SKILLS
                log.record(Served(f"r{i}", "", f"skill {skill}", "0", user))
                said = Feedback(f"e{i}", f"r{i}", "correction", user, text=f"{skill} {right}")
                os.write(pipe, b"%d\n" % log.add(said).sequence)
            catch_up(loop, log)
        catch_up(loop, log)


def opened(folder: Path) -> Loop:
    """The learner of a folder."""
    return Loop(folder / "online", Store(folder / "store", by="learner"), Toy(), CONFIG)


def killed(folder: Path, total: int, after_s: float) -> tuple[bool, int]:
    """Let a process work for so many CPU seconds; (did it finish?, the last number it acknowledged)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, after_s)
        work(folder, total, writer)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as lines:
        acknowledged = [int(line) for line in lines.read().split()]
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"the worker failed with {os.WEXITSTATUS(status)}")
    return os.WIFEXITED(status), acknowledged[-1] if acknowledged else 0


def stage(folder: Path) -> str:
    """What the learner was about when it was killed."""
    desk = Desk(folder / "online")
    snapshots = sorted(desk.snapshots.glob("[0-9]*.pt"))
    if not snapshots:
        return "before its first snapshot"
    plain = json.loads(read_state(snapshots[-1], "cpu", "snapshot")["plain"])
    if plain["pending"]:
        return f"within a move ({plain['pending']['move']})"
    if desk.journal_size() > plain["journal"]:
        return "behind a snapshot, with decisions noted that it does not hold"
    return "watching" if plain["watching"] else "in a trial" if plain["trial"] else "learning"


def examine(folder: Path, acknowledged: int, seen: int) -> list[str]:
    """What is wrong; seen: events that were examined before."""
    problems = []
    if (folder / "feedback.db").exists():
        log = FeedbackLog(folder / "feedback.db")
        last, numbers = log.last(), [e.sequence for e in log.events(after=seen)]
        log.close()  # no connection may live on over the next fork
        if numbers != list(range(seen + 1, last + 1)):
            problems.append(f"holes in the log behind {seen}")
        if last < acknowledged:
            problems.append(f"{acknowledged - last} acknowledged events are lost")
    for path in Desk(folder / "online").snapshots.glob("[0-9]*.pt"):
        try:
            read_state(path, "cpu", "snapshot")
        except Exception as torn:
            problems.append(f"torn snapshot: {torn}")
    if (folder / "store").is_dir() and any((folder / "store").iterdir()):
        problems += [p for p in check(Store(folder / "store")) if "last line is torn" not in p]
    return problems


def outcome(folder: Path) -> tuple:
    """Everything that a later decision could depend on."""
    with opened(folder) as loop:
        moves = [(e.event, e.version) for e in loop.production.store.journal.ledger().moves()]
        parts = (loop.trainee.w.tolist(), loop.learner.state(), loop.drift.state())
        return loop.event, moves, loop.desk.journal.read_text(), loop.production.state(), parts


def main() -> None:
    """Kill, examine, compare, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--events", type=int, default=6000, help="at most; the kills end it before")
    parser.add_argument("--longest", type=float, default=0.08, help="CPU seconds between two kills")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/online_kills.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as work_folder:
        page = run(Path(work_folder), options, rng)
    options.out.write_text(page, encoding="utf-8")
    print(page)


def run(top: Path, options: argparse.Namespace, rng: random.Random) -> str:
    """The page."""
    folder, wrong, acknowledged, kills = top / "killed", [], 0, 0
    stages: Counter[str] = Counter()
    folder.mkdir()
    while kills < options.kills:
        finished, last = killed(folder, options.events, rng.uniform(0.001, options.longest))
        seen, acknowledged = acknowledged, max(acknowledged, last)
        wrong += examine(folder, acknowledged, seen)
        if finished:
            break
        kills += 1
        stages[stage(folder)] += 1
        stages["with new events acknowledged since the kill before"] += acknowledged > seen
    log = FeedbackLog(folder / "feedback.db")
    total = log.last()
    log.close()
    total += -total % CONFIG.round_size
    killed(folder, total, 3600.0)
    (top / "whole").mkdir()
    killed(top / "whole", total, 3600.0)
    wrong += examine(folder, total, 0)
    mine, other = outcome(folder), outcome(top / "whole")
    same = mine == other
    moves = [what for what, _ in mine[1]]
    return (
        "# Kills of an online learner\n\n"
        f"`python benchmarks/faults/online_kills.py --kills {options.kills}` on {platform.machine()}: {kills} kills at "
        f"random instants, 0.001 to {options.longest:g} CPU seconds after each start.\n\n"
        f"- Killed: {', '.join(f'{what} {n}' for what, n in sorted(stages.items()))}.\n"
        f"- {total} events in the log; acknowledged and lost, holes, torn snapshots, damaged files of the store: "
        f"{len(wrong)}{': ' + '; '.join(wrong[:5]) if wrong else ''}.\n"
        f"- Moves of the store meanwhile: {moves.count('promote')} promotions, {moves.count('rollback')} rollbacks.\n"
        f"- Compared with a learner that was never killed: {'the same to the last bit' if same else 'DIFFERENT'} "
        "(numbers, reservoirs, generators, drift detector, journal, moves).\n"
    )


if __name__ == "__main__":
    main()
