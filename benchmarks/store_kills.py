"""kill -9 while a version store is written: it must be whole, and in the last acknowledged state.

    python benchmarks/store_kills.py            # writes benchmarks/results/store_kills.md

A process promotes and rolls back without pause, and acknowledges every move on a pipe once the call has returned.
It is killed at a random instant; then every byte of the store is checked, and what is in use must be what was
acknowledged last, or what the move that was under way would have made of it. The next process goes on with the
same store. Besides, promotion and rollback are killed at each single operation on the file system, one by one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bem.errors import NotAccepted  # noqa: E402
from bem.runs.pointer import open_moves  # noqa: E402
from bem.runs.release import Content, Grounds, read_content  # noqa: E402
from bem.runs.store import Store  # noqa: E402
from bem.runs.upkeep import check, collect  # noqa: E402

BASE = {"digest": "b" * 64, "shapes": "5" * 64, "dtype": "float32"}
WATCHED = ("open", "os.mkdir", "os.rename", "os.remove", "os.truncate", "os.chmod", "os.link")
"""Audit events of CPython: each comes before the operation."""


def sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def make_content(folder: Path, name: str, size: int) -> Content:
    """A checkpoint with `size` bytes of its own and as many that all of them share."""
    folder.mkdir()
    files = {"own.safetensors": name.encode() * size, "shared.safetensors": b"s" * size}
    for file, raw in files.items():
        (folder / file).write_bytes(raw[:size])
    manifest = {
        "kind": "adapter",
        "base": BASE,
        "version": {"digest": sha256(name.encode())},
        "files": {file: sha256(raw[:size]) for file, raw in files.items()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return read_content(folder)


def make_grounds(folder: Path) -> Grounds:
    path = folder / "verdicts.json"
    path.write_text('{"decision": "PROMOTE"}\n')
    return Grounds("run", "arm", 0, path, sha256(path.read_bytes()))


class Writer:
    """Moves a store about; every move that returned is acknowledged on a pipe."""

    def __init__(self, home: Path, contents: list[Content], grounds: Grounds):
        self.home, self.contents, self.grounds = home, contents, grounds

    def store(self) -> Store:
        return Store(self.home / "store", by="writer")

    def promote(self, number: int) -> str | None:
        return self.store().promote(self.contents[number], self.grounds).id

    def rollback(self, to: str | None = None) -> str | None:
        release = self.store().rollback(to, reason="killed soon")
        return release.id if release else None

    def without_end(self, acknowledge: int, seed: int) -> None:
        rng = random.Random(seed)
        while True:
            before = (
                state_of(self.store())[0] if self.store().journal.pointer_file.exists() else None
            )
            try:
                if rng.random() < 0.5:
                    done = self.promote(rng.randrange(len(self.contents)))
                else:
                    done = self.rollback(rng.choice([None, "base"]))
            except NotAccepted:  # nothing lies before
                continue
            if done == before:  # promoted again what is in use: no move
                continue
            os.write(acknowledge, (json.dumps(done) + "\n").encode())


def started(work: Any) -> tuple[int, int]:
    """(process, pipe) of a fork that does `work(pipe)`."""
    reader, writer = os.pipe()
    if process := os.fork():
        os.close(writer)
        return process, reader
    try:
        os.close(reader)
        work(writer)
        os._exit(0)
    except BaseException as error:
        print(f"the writer failed: {type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)


def ended(process: int, reader: int) -> tuple[list[str | None], bool]:
    """(what it acknowledged, was it killed?)"""
    _, status = os.waitpid(process, 0)
    with os.fdopen(reader) as lines:
        said = [json.loads(line) for line in lines if line.endswith("\n")]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a writer failed, see above")
    return said, os.WIFSIGNALED(status)


def look(
    store: Store, last: str | None, said: list[str | None], moves: int, opened: set[int]
) -> Counter[str]:
    """Is the store whole and in the last acknowledged state? How the kill left it.

    Args:
        last: what was in use before the writer began; said: what it acknowledged.
        moves: how many completed moves the ledger had before.
        opened: numbers of the moves that earlier kills left open; a new one is added.
    """
    torn = [p for p in check(store) if "is torn" not in p]
    assert not torn, torn
    seen = store.journal.look()
    ledger, pointer = seen.ledger, seen.agreed()
    completed = [m.release for m in ledger.moves() if m.number <= pointer.entry][moves:]
    changed = completed[: len(said)]
    assert changed == said, f"acknowledged {said}, the ledger has {completed}"
    assert len(completed) <= len(said) + 1, "more than one move was under way"
    now = store.current()
    assert (now.id if now else None) == (completed[-1] if completed else last)
    found = Counter[str](kills=1, acknowledged=len(said))
    new = {move.number for move in open_moves(pointer, ledger)} - opened
    found["between ledger and pointer"] = len(new)
    opened |= new
    found["completed, not acknowledged"] = len(completed) > len(said)
    found["torn line"] = bool(ledger.torn)
    found["drafts of killed writers about"] = any(store.path.rglob(".*.draft"))
    return found


def state_of(store: Store) -> tuple[str | None, int]:
    """(what is in use, how many moves were completed)"""
    found = store.journal.look()
    ledger, pointer = found.ledger, found.agreed()
    return pointer.release, len([m for m in ledger.moves() if m.number <= pointer.entry])


def settled(store: Store, opened: set[int]) -> None:
    """Was every move that a kill left open abandoned by the next writer, once?"""
    look = store.journal.look()
    still = {move.number for move in open_moves(look.agreed(), look.ledger)}
    said = [entry.about for entry in look.ledger.entries if entry.event == "abandon"]
    assert sorted(said) == sorted(opened - still), (said, opened, still)


def at_random(writer: Writer, kills: int, longest: float, seed: int) -> Counter[str]:
    """Kill at random instants of the first `longest` seconds."""
    rng, found, store = random.Random(seed), Counter[str](), writer.store()
    last, moves, opened = None, 0, set[int]()
    for kill in range(kills):
        process, reader = started(lambda pipe, n=kill: writer.without_end(pipe, seed + n))
        time.sleep(rng.random() * longest)
        os.kill(process, signal.SIGKILL)
        said, _ = ended(process, reader)
        if not store.journal.pointer_file.exists():
            assert not said, "acknowledged, and there is no store"
            found["kills"] += 1
            continue
        found.update(look(store, last, said, moves, opened))
        last, moves = state_of(store)
        if kill % 20 == 19:  # what killed writers left is thrown away, what is in use stays
            collect(store, keep=3)
            assert check(store) == [] and state_of(store)[0] == last
    settled(store, opened)
    return found


def at_every_operation(writer: Writer) -> Counter[str]:
    """Kill before the first, the second, ... operation on the file system of a promotion and a rollback."""
    found, opened = Counter[str](), set[int]()
    for move in ("promote", "rollback"):
        for number in range(1, 1000):
            store = writer.store()
            before = writer.promote(number % 2)
            last, moves = state_of(store)
            assert last == before
            process, reader = started(lambda pipe, m=move, n=number: _until(writer, m, n, pipe))
            said, killed = ended(process, reader)
            if not killed:
                break
            found.update(look(store, last, said, moves, opened))
            found[f"operations of {move}"] += 1
    settled(writer.store(), opened)
    return found


def _until(writer: Writer, move: str, number: int, pipe: int) -> None:
    """Make one move, but die before its operation of this number."""
    left = [number]

    def die(event: str, arguments: Any) -> None:
        if event in WATCHED:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    done = writer.promote(2 + number % 2) if move == "promote" else writer.rollback()
    os.write(pipe, (json.dumps(done) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="at random instants")
    parser.add_argument("--size", type=int, default=200_000, help="bytes of each of two files")
    parser.add_argument("--longest", type=float, default=0.4, help="seconds until a kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/store_kills.md")
    args = parser.parse_args()
    found = {}
    for name in ("at random instants", "at every operation"):
        with tempfile.TemporaryDirectory() as made:
            home = Path(made)
            contents = [make_content(home / f"c{i}", f"v{i}", args.size) for i in range(6)]
            writer = Writer(home, contents, make_grounds(home))
            if name == "at random instants":
                found[name] = at_random(writer, args.kills, args.longest, args.seed)
            else:
                found[name] = at_every_operation(writer)
    args.out.write_text(page(found, args))
    print(args.out.read_text())


def page(found: dict[str, Counter[str]], args: argparse.Namespace) -> str:
    """The results, as they are kept."""
    command = f"python benchmarks/store_kills.py --kills {args.kills} --size {args.size}"
    command += f" --longest {args.longest} --seed {args.seed}"
    lines = ["# kill -9 of a version store", "", f"`{command}`", "", PREFACE, ""]
    for name, counts in found.items():
        rows = [f"| {what} | {count:,} |" for what, count in counts.items()]
        lines += [f"## {name}", "", "| | |", "|---|---:|", *rows, ""]
    return "\n".join(lines)


PREFACE = """After every kill every byte of the store was checked, and what is in use was what the writer had acknowledged last, or
what the one move that was under way makes of it. None failed: the script stops at the first that does. A kill loses
nothing that the kernel was given: what a power cut leaves rests on the order of the fsyncs and is not tested here."""


if __name__ == "__main__":
    main()
