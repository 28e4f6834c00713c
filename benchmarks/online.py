"""Does online learning pay, and does it forget? Four arms on streams whose world changes.

    python benchmarks/online.py --data DATA --streams clinc,rnnlg,tldr     # public sets as JSONL
    python benchmarks/online.py --streams embedded                         # without any data

A stream begins with what the frozen version was trained for and goes on with something else: intents of
another domain, dialogue acts of another domain, commands by the date at which they were written, another task of the
standard library's functions (`online_streams.py`). Right answers come as corrections behind every answer. The arms:

    frozen        the version that was trained for the beginning, for ever
    unprotected   as many plain AdamW steps on every round's corrections, used at once
    protected     `bem.online.loop.Loop`: replay, bounded steps, candidates, canary, watch, the version store
    oracle        trained beforehand on other rows of everything that will come

The frozen version and the oracle are trained once a stream; every seed draws a stream of its own. Every finished
arm is a file under --work, and is not run again: stopped, it goes on where it was. Other settings, other files.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from online_page import page  # noqa: E402
from online_streams import STREAMS, Stream  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import bem  # noqa: E402
from bem.config import OnlineConfig  # noqa: E402
from bem.files import read_json, sha256_json, write_json  # noqa: E402
from bem.online.adapter_trainee import AdapterTrainee, lesson_of  # noqa: E402
from bem.online.loop import Loop  # noqa: E402
from bem.online.marks import marks_by  # noqa: E402
from bem.online.stream import Turn  # noqa: E402
from bem.runs.store import Store  # noqa: E402
from bem.training.data import encode  # noqa: E402
from bem.training.example import Example  # noqa: E402

RANK, RATE, BATCH = 8, 1e-2, 16  # of what is trained offline, and of plain steps
KNOWN_STEPS, ORACLE_STEPS = 12, 24
POOL, TAUGHT = (
    900,
    128,
)  # rows of a part; of them, what the frozen version and the oracle learned from
PROTECTED = OnlineConfig(
    learning_rate=5e-3,
    batch_size=12,
    trusted_share=0.375,
    round_size=16,
    pull=0.02,
    largest_step=0.05,
    largest_distance=4.0,
    candidate_every=16,
    steps_per_round=3,
    margin=0.1,
    tolerance=0.1,
    trial_events=48,
    watch_events=32,
    drift_window=200,
    snapshot_every=100,
)
ARMS = ("frozen", "protected", "calm frozen", "calm protected", "oracle", "unprotected")
"""calm: on a stream in which nothing changes."""
MOVES = ("candidate", "promoted", "rejected", "rolled back", "drift", "discarded")


class Bench:
    """A base; of each stream the versions that begin it, trained once, and the rows that are left."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.work = options, options.work
        self.settings = sha256_json([
            PROTECTED.model_dump(mode="json"), RANK, KNOWN_STEPS, ORACLE_STEPS, POOL, TAUGHT, options.sizes, options.base,
        ])[:12]  # fmt: skip
        self.beginning = sha256_json(
            [RANK, RATE, BATCH, KNOWN_STEPS, ORACLE_STEPS, POOL, TAUGHT, options.base]
        )[:12]
        self._base: tuple[Any, Any] | None = None
        self._begun: dict[str, tuple[Any, Any, list[list[Example]]]] = {}
        self._known: dict[tuple[str, str], dict[str, float]] = {}

    @property
    def base(self) -> tuple[Any, Any]:
        """Model and tokenizer, loaded when something has to be run."""
        if self._base is None:
            self._base = bem.load_base(self.options.base)
        return self._base

    def cell(self, name: str, seed: int, arm: str) -> dict[str, Any]:
        """One arm on one stream, from its file if it has been run."""
        path = self.work / f"{name}-{seed}-{arm.replace(' ', '_')}-{self.settings}.json"
        if not path.is_file():
            started = time.process_time()
            found = self._run(name, seed, arm)
            cpu = round(time.process_time() - started, 1)
            write_json(
                path, {"stream": name, "seed": seed, "arm": arm, "cpu_s": cpu, **found}, indent=None
            )
            print(f"{name} {seed} {arm}: {cpu} CPU s", flush=True)
        return read_json(path)

    def _run(self, name: str, seed: int, arm: str) -> dict[str, Any]:
        if name not in self._begun:
            self._begun[name] = self._begin(name)
        start, oracle, pools = self._begun[name]
        spec = STREAMS[name]
        stream, old, trusted, still = self._drawn(pools, seed)
        if arm.startswith("calm"):
            stream, old = still, []
        if arm.endswith("protected") and arm != "unprotected":
            return self._protected(spec, start, stream, old, trusted, seed)
        if arm == "unprotected":
            return self._unprotected(spec, start, stream, old, seed)
        weights = oracle if arm == "oracle" else start
        return self._fixed(name, arm.split()[-1], weights, stream, old)

    def _drawn(self, pools: list[list[Example]], seed: int) -> list[list[Turn]]:
        """The stream; what was known, to measure forgetting; what the learner trusts; a stream without change."""
        rng, sizes = np.random.default_rng([seed, 5]), self.options.sizes
        drawn = [list(rng.permutation(len(pool))) for pool in pools]

        def take(part: int, count: int) -> list[Turn]:
            rows = [pools[part][drawn[part].pop()] for _ in range(count)]
            return [Turn(row, f"row {row.id}", f"part {part}") for row in rows]

        new = [t for part in range(1, len(pools)) for t in take(part, sizes["events"])]
        return [
            take(0, sizes["known"]) + new,
            *(take(0, sizes[n]) for n in ("old", "trusted", "stationary")),
        ]

    # --- what a stream begins with ------------------------------------------------------------------

    def _begin(self, name: str) -> tuple[Any, Any, list[list[Example]]]:
        """The frozen version, the oracle, and rows that neither has seen."""
        spec, rng = STREAMS[name], np.random.default_rng(99)
        pools = [self._short(pool, spec.longest, rng) for pool in spec.parts(self.options.data)]
        apart = [[Turn(row, row.id) for row in pool[:TAUGHT]] for pool in pools]
        files = [
            self.work / f"{name}-{which}-{self.beginning}.safetensors"
            for which in ("frozen", "oracle")
        ]
        if not files[0].is_file():
            save_file(self._trained(spec, apart[0], None, KNOWN_STEPS), files[0])
        start = load_file(files[0])
        if not files[1].is_file():
            everything = [t for part in apart for t in part]
            save_file(self._trained(spec, everything, start, ORACLE_STEPS), files[1])
        return start, load_file(files[1]), [pool[TAUGHT:] for pool in pools]

    def _short(self, pool: list[Example], longest: int, rng: np.random.Generator) -> list[Example]:
        """Rows that fit, as many as the seeds choose from."""
        found = []
        for i in rng.permutation(len(pool)):
            if len(encode(pool[i], self.base[1], 4096)) <= longest:
                found.append(pool[i])
            if len(found) == POOL:
                break
        return found

    def _trainee(self, spec: Stream, start: Any, config: OnlineConfig) -> AdapterTrainee:
        model, tokenizer = self.base
        config = config.model_copy(update={"max_length": spec.longest})
        torch.manual_seed(config.seed)
        attached = bem.attach(model, "s0", rank=RANK)
        marks = marks_by(spec.metric, tokenizer, spec.longest)
        try:
            if start is not None:
                attached.load_state_dict(start)
            return AdapterTrainee(attached, tokenizer, marks, config)
        finally:
            attached.detach()

    def _trained(self, spec: Stream, turns: list[Turn], start: Any, steps: int) -> Any:
        """Weights after some epochs, offline."""
        trainee = self._trainee(spec, start, _plain(0))
        lessons, rng = [lesson_of(t) for t in turns], np.random.default_rng(6)
        epochs = 1 + steps * BATCH // len(lessons)
        order = np.concatenate([rng.permutation(len(lessons)) for _ in range(epochs)])
        for step in range(steps):
            trainee.learn([lessons[i] for i in order[step * BATCH : (step + 1) * BATCH]])
        return trainee.weights()

    # --- arms ---------------------------------------------------------------------------------------

    def _fixed(
        self, name: str, arm: str, weights: Any, stream: list[Turn], old: list[Turn]
    ) -> dict[str, Any]:
        """Versions that never change answer every row once, whichever seed asks."""
        known = self._known.setdefault((name, arm), {})
        new = [t for t in (*stream, *old) if t.row.id not in known]
        scores = _scores(self._trainee(STREAMS[name], weights, _plain(0)), weights, new)
        known |= {t.row.id: s for t, s in zip(new, scores, strict=True)}
        return _result(*([known[t.row.id] for t in turns] for turns in (stream, old)))

    def _unprotected(
        self, spec: Stream, start: Any, stream: list[Turn], old: list[Turn], seed: int
    ) -> dict[str, Any]:
        trainee, scores = self._trainee(spec, start, _plain(seed)), []
        for at in range(0, len(stream), PROTECTED.round_size):
            turns = stream[at : at + PROTECTED.round_size]
            scores += _scores(trainee, trainee.weights(), turns)
            for _ in range(PROTECTED.steps_per_round):
                trainee.learn([lesson_of(t) for t in turns])
        return _result(scores, _scores(trainee, trainee.weights(), old))

    def _protected(
        self,
        spec: Stream,
        start: Any,
        stream: list[Turn],
        old: list[Turn],
        trusted: list[Turn],
        seed: int,
    ) -> dict[str, Any]:
        trainee = self._trainee(spec, start, PROTECTED.model_copy(update={"seed": seed}))
        with tempfile.TemporaryDirectory() as work:
            store = Store(Path(work) / "store", by="benchmark")
            with Loop(Path(work) / "online", store, trainee, trainee.config) as loop:
                loop.trust(trusted)
                scores = [s for r in loop.go(stream) for s in r.scores]
            journal = [{k: v for k, v in e.items() if k != "version"} for e in loop.desk.entries()]
            live = loop.production.live.weights
        moves = [e["what"] for e in journal]
        found = _result(scores, _scores(trainee, live, old))
        return {**found, "moves": {w: moves.count(w) for w in MOVES}, "journal": journal}


def _plain(seed: int) -> OnlineConfig:
    """Nothing that holds a step back."""
    free = {"seed": seed, "pull": 0.0, "largest_step": 1e6, "largest_distance": 1e6, "learning_rate": RATE, "batch_size": BATCH}  # fmt: skip
    return PROTECTED.model_copy(update=free)


def _scores(trainee: AdapterTrainee, weights: Any, turns: list[Turn]) -> list[float]:
    return [float(a.score or 0.0) for a in trainee.answers(weights, turns, None)] if turns else []


def _result(scores: list[float], old: list[float]) -> dict[str, Any]:
    return {"scores": [round(s, 4) for s in scores], "old": round(float(np.mean(old)), 4) if old else None}  # fmt: skip


def main() -> None:
    """Run what is not done yet, arm by arm, and write the page after each."""
    options = _options()
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    seeds = range(options.first, options.first + options.seeds)
    names = [name for name in STREAMS if name in options.streams.split(",")]
    runs = [{"stream": name, "seed": seed, "arms": {}} for name in names for seed in seeds]
    for arm in options.arms.split(","):
        for run in runs:
            run["arms"][arm] = bench.cell(run["stream"], run["seed"], arm)
        _write(runs, options)
    print(options.out.read_text(encoding="utf-8"))


def _write(runs: list[dict[str, Any]], options: argparse.Namespace) -> None:
    about = (
        f"`{options.command}` on {platform.processor() or platform.machine()}, one thread, base {options.base}, "
        f"torch {torch.__version__}."
    )
    options.out.write_text(page(runs, options.sizes, about), encoding="utf-8")
    kept = [
        {**run, "arms": {arm: {k: v for k, v in cell.items() if k != "journal"} for arm, cell in run["arms"].items()}}
        for run in runs
    ]  # fmt: skip
    write_json(
        options.out.with_suffix(".json"), {"command": options.command, "runs": kept}, indent=None
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder of the public sets")
    parser.add_argument("--streams", default="embedded", help=f"of {', '.join(STREAMS)}")
    parser.add_argument("--arms", default=",".join(ARMS), help="in the order in which they are run")
    parser.add_argument("--base", default="bem-tiny")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--events", type=int, default=192, help="of each new part")
    parser.add_argument("--known", type=int, default=32, help="events before anything is new")
    parser.add_argument("--old", type=int, default=96, help="rows on which forgetting is measured")
    parser.add_argument("--trusted", type=int, default=128, help="rows that the learner trusts")
    parser.add_argument("--stationary", type=int, default=64, help="events of the calm stream")
    work = Path(tempfile.gettempdir()) / "bem_online"
    parser.add_argument("--work", type=Path, default=work, help="one file for each finished arm")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "online.md")
    options = parser.parse_args()
    options.sizes = {
        n: getattr(options, n) for n in ("events", "known", "old", "trusted", "stationary")
    }
    typed = ["DATA" if a == options.data else a for a in sys.argv[1:]]
    for path in ("--out", "--work"):
        if path in typed:
            at = typed.index(path)
            del typed[at : at + 2]
    options.command = " ".join(["python benchmarks/online.py", *typed])
    return options


if __name__ == "__main__":
    main()
