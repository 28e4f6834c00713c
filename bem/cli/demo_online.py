"""The last part of `bem demo`: a version that learns from corrections, and what its trials made of that."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from bem.online.adapter_trainee import AdapterTrainee
    from bem.online.loop import Loop, Round
    from bem.online.stream import Turn

LONGEST = 64
EVENTS, TRUSTED = 256, 48
WORDS = {"promote": "promoted", "reject": "rejected", "rollback": "rolled back"}
TITLE = (
    f"bem-tiny learns from corrections: {EVENTS} questions (the `def` line of a function, its arguments as JSON), the "
    "right answer behind every answer. What it learned is used only once its trial rules out a loss of 10 points"
)


def learn_online(console: Console, progress: Console, output: str) -> None:
    """Run the whole loop on a short stream of the embedded tasks, and say what came out, whatever it is.

    Args:
        output: the folder of the runs; what an earlier demo left in its `demo-online` is replaced.
    """
    from bem.online.loop import Loop
    from bem.runs.store import Store

    folder = Path(output) / "demo-online"
    shutil.rmtree(folder, ignore_errors=True)
    progress.print(Text("Learning from corrections", "bold"))
    trainee, stream, known = _begin()
    with Loop(folder, Store(folder / "store", by="bem demo"), trainee, trainee.config) as loop:
        loop.trust(known)
        rounds = loop.go(stream, lambda done: _say(progress, done))
        _tell(console, loop, rounds, known)


def _begin() -> tuple[AdapterTrainee, list[Turn], list[Turn]]:
    """A trainee that stands for the bare base, the stream, and rows of another task that it must not lose."""
    import torch

    from bem.adapters.attach import attach
    from bem.bases.load import load_base
    from bem.config import OnlineConfig
    from bem.online.adapter_trainee import AdapterTrainee
    from bem.online.marks import marks_by

    model, tokenizer = load_base("bem-tiny")
    torch.manual_seed(0)
    config = OnlineConfig(
        learning_rate=1e-2,
        steps_per_round=2,
        max_length=LONGEST,
        largest_step=0.2,
        largest_distance=4.0,
        candidate_every=32,
        margin=0.1,
        tolerance=0.1,
        trial_events=200,
        watch_events=32,
        drift_window=200,
    )
    marks = marks_by("tokens", tokenizer, LONGEST)
    trainee = AdapterTrainee(attach(model, "s0", rank=8), tokenizer, marks, config)
    return trainee, _turns("sig2json", tokenizer, EVENTS), _turns("sig2doc", tokenizer, TRUSTED)


def _turns(task: str, tokenizer: Any, count: int) -> list[Turn]:
    """Short rows of an embedded task, each of a user of its own."""
    from bem.online.stream import Turn
    from bem.tasks.embedded import EMBEDDED, embedded
    from bem.training.data import encode

    found: list[Turn] = []
    for row in embedded(task, "train"):
        row = replace(row, instruction=EMBEDDED[task].instruction, task=task)
        if len(encode(row, tokenizer, 4096)) <= LONGEST:
            found.append(Turn(row, f"user {row.id}", task))
        if len(found) == count:
            break
    return found


def _say(progress: Console, done: Round) -> None:
    if done.moved:
        progress.print(Text(f"  after {done.event} answers: {WORDS[done.moved]}"))


def _tell(console: Console, loop: Loop, rounds: list[Round], known: list[Turn]) -> None:
    scores = [s or 0.0 for done in rounds for s in done.scores]
    parts = [scores[i : i + EVENTS // 4] for i in range(0, len(scores), EVENTS // 4)]
    shown = ", ".join(f"{100 * sum(part) / len(part):.0f}" for part in parts)
    moves = [done.moved for done in rounds if done.moved]
    made = ", ".join(f"{moves.count(m)} {word}" for m, word in WORDS.items())
    held = known[1::2]
    versions = (loop.trainee.born, loop.production.live.weights)
    before, after = (
        sum(a.score or 0.0 for a in loop.trainee.answers(v, held, None)) / len(held)
        for v in versions
    )
    lines = (
        f"\n{TITLE}.",
        f"Right tokens of an answer, in percent, by quarters of the stream: {shown}.",
        f"Candidates: {made}. On {len(held)} trusted questions of another task that it never practised: "
        f"{100 * before:.0f} at the beginning, {100 * after:.0f} at the end.",
        f"Why: bem online candidates --folder {loop.desk.folder}",
    )
    for line in lines:
        console.print(Text(line), soft_wrap=True)
