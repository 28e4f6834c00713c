"""Is a choice of rank budget or strength worth anything? Losses of finished experts under every option.

    python benchmarks/heads.py RUN [--rows 150] [--seed 0]        # writes benchmarks/results/heads.md

RUN is the folder of a finished `bem run` with routing (its data must still be where its config says). Each
turn of its held-out conversations stands under the expert of its maker's label, and is read under each rank
budget (a quarter, a half, all of the largest expert's ranks) and each strength (0.5, 1, 1.5), everything else
plain. A rule chooses an option for each turn; it is fitted on half of the conversations and judged on the other
half, and the other way round. Rules that look at the answer (its length, its loss) know more than a router can.

Gain: loss under the plain option minus loss under the chosen one, nats per answer token, mean over turns;
BCa intervals over conversations' sources.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from bem.config import ExperimentConfig  # noqa: E402
from bem.experiments.inputs import load_inputs  # noqa: E402
from bem.experiments.routing.skills import routed  # noqa: E402
from bem.experiments.routing.stages import RoutingArtifacts  # noqa: E402
from bem.runs.folder import RunFolder  # noqa: E402
from bem.stats.bootstrap import Bca, bca_bootstrap  # noqa: E402
from bem.tasks.conversations import skill_of  # noqa: E402
from bem.training.chunk_losses import LossReader  # noqa: E402

HEADS = ("rank", "strength")


@dataclass
class Turns:
    """Every answered turn: its losses under the options of both heads, and what a rule may look at."""

    losses: dict[str, np.ndarray]
    """Head -> (turns, options)."""
    plain: dict[str, int]
    options: dict[str, tuple[float, ...]]
    skill: np.ndarray
    length: np.ndarray
    """Tokens of the answer."""
    source: np.ndarray
    row: np.ndarray


def read_turns(artifacts: RoutingArtifacts, rows: int) -> Turns:
    """Read a seeded choice of held-out conversations under every option."""
    held_out = artifacts.held_out
    chosen = np.random.default_rng(0).choice(len(held_out), min(rows, len(held_out)), replace=False)
    examples = [held_out[i] for i in sorted(chosen.tolist())]
    gold = [artifacts.skills.route(row) for row in examples]
    encoded = [artifacts.encoded(row) for row in routed(examples, gold)]
    routing = artifacts.routing
    largest = routing.expert_rank + routing.shared_rank
    ranks = tuple(sorted({max(1, largest // 4), max(1, largest // 2), largest}))
    plain = routing.router.model_copy(update={"ranks": ranks, "strengths": (0.5, 1.0, 1.5)})
    artifacts.routing = routing.model_copy(update={"router": plain})
    passes = iter(range(1, 99))
    with artifacts.with_new_router(artifacts.folder / "experts") as mounted:
        space = mounted.router.space
        tell = lambda: print(f"pass {next(passes)} of 5", file=sys.stderr)  # noqa: E731
        reader = LossReader(mounted, encoded, artifacts.inputs.pad_id, 8, tell)
        path = _path(reader, [row.route for row in encoded])
        _, all_ranks, as_trained = space.plain
        whole = reader.losses(path, all_ranks, as_trained)
        ranks = [
            whole if r == all_ranks else reader.losses(path, r, as_trained)
            for r in range(len(space.ranks))
        ]
        strengths = [
            whole if s == as_trained else reader.losses(path, all_ranks, s)
            for s in range(len(space.strengths))
        ]
    turn_of = np.cumsum(reader.turns, 1) - 1
    units = [
        (r, t)
        for r in range(len(examples))
        for t in np.unique(turn_of[r][reader.answers[r]]).tolist()
    ]

    def per_turn(losses: list[np.ndarray]) -> np.ndarray:
        return np.array([[(x[r] * (turn_of[r] == t)).sum() for x in losses] for r, t in units])

    skills = [row.meta.get("skills", [skill_of(row)]) for row in examples]
    answers = [[a for _, a in row.history] + [row.answer] for row in examples]
    tokens = artifacts.inputs.tokenizer
    of = lambda per_row, r, t: per_row[r][t - int(turn_of[r].max()) - 1]  # noqa: E731 - cut ones lose the first
    return Turns(
        losses={"rank": per_turn(ranks), "strength": per_turn(strengths)},
        plain={"rank": all_ranks, "strength": as_trained},
        options={"rank": space.ranks, "strength": space.strengths},
        skill=np.array([of(skills, r, t) for r, t in units]),
        length=np.array([len(tokens(of(answers, r, t)).input_ids) for r, t in units]),
        source=np.array([examples[r].group for r, _ in units]),
        row=np.array([r for r, _ in units]),
    )


def _path(reader: LossReader, routes: list[list[int]]) -> np.ndarray:
    """Expert option of each chunk (rows, chunks), -1 where there is none."""
    path = np.full(reader.shape, -1, np.int64)
    for chosen, _, number in reader.batches:
        for r, i in enumerate(chosen):
            numbers = number[r][number[r] > 0] - 1
            path[i, numbers.numpy()] = np.array(routes[i])
    return path


# --- rules ----------------------------------------------------------------------------------------


def cells(turns: Turns, head: str) -> dict[str, np.ndarray]:
    """Rule -> the cell of each turn; all turns of a cell get one option."""
    plain = turns.losses[head][:, turns.plain[head]]
    third = lambda x: np.digitize(x, np.quantile(x, [1 / 3, 2 / 3]))  # noqa: E731
    return {
        "one for all": np.zeros(len(plain), int).astype(str),
        "by skill": turns.skill,
        "by length of the answer": third(turns.length).astype(str),
        "by skill and length": _within(turns.skill, turns.length, third),
        "by skill and difficulty": _within(turns.skill, plain, third),
    }


def _within(skill: np.ndarray, x: np.ndarray, third: Callable) -> np.ndarray:
    out = skill.astype(object)
    for name in np.unique(skill):
        at = skill == name
        out[at] = [f"{name} {part}" for part in third(x[at])]
    return out.astype(str)


def chosen_by(rule: np.ndarray, losses: np.ndarray, plain: int, row: np.ndarray) -> np.ndarray:
    """Option of each turn: the best of its cell on the other half of the conversations."""
    options = np.full(len(rule), plain)
    for half in (0, 1):
        fit, use = row % 2 != half, row % 2 == half
        for cell in np.unique(rule):
            here = fit & (rule == cell)
            if here.any():
                options[use & (rule == cell)] = losses[here].mean(0).argmin()
    return options


def gain(losses: np.ndarray, plain: int, options: np.ndarray, source: np.ndarray) -> Bca:
    """Of the chosen options over the plain one."""
    saved = losses[:, plain] - np.take_along_axis(losses, options[:, None], 1)[:, 0]
    return bca_bootstrap(saved, clusters=source.tolist())


def table(turns: Turns) -> list[str]:
    lines = [
        "| head | chosen | gain, nats per token [95 %] | turns that leave the plain option |",
        "|---|---|---:|---:|",
    ]
    for head in HEADS:
        losses, plain = turns.losses[head], turns.plain[head]
        rows = {f"always {o:g}": np.full(len(losses), i) for i, o in enumerate(turns.options[head])}
        del rows[f"always {turns.options[head][plain]:g}"]
        rows |= {
            name: chosen_by(rule, losses, plain, turns.row)
            for name, rule in cells(turns, head).items()
        }
        rows["best of each turn, in hindsight"] = losses.argmin(1)
        for name, options in rows.items():
            g = gain(losses, plain, options, turns.source)
            left = (options != plain).mean()
            lines.append(
                f"| {head} | {name} | {g.observed:+.4f} [{g.lower:+.4f}, {g.upper:+.4f}] | {left:.0%} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/heads.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = RunFolder(args.run)
    config: ExperimentConfig = folder.config
    inputs = load_inputs(config, folder, lambda event: None)
    artifacts = RoutingArtifacts(inputs, args.seed, lambda *_: None)
    turns = read_turns(artifacts, args.rows)
    n, rows, sources = len(turns.row), len(np.unique(turns.row)), len(np.unique(turns.source))
    lengths = f"{turns.length.mean():.1f} tokens on average, longest {turns.length.max()}"
    text = [
        "# Rank budget and strength: is there anything to choose?",
        "",
        f"`python benchmarks/heads.py RUN --rows {args.rows} --seed {args.seed}` on the experts of `{config.name}` "
        f"({config.base}, {config.dtype or 'float32'}): {n} turns of {rows} held-out conversations from {sources} "
        f"sources; answers of {lengths}. What the columns mean: the script's first lines.",
        "",
        *table(turns),
        "",
    ]
    args.out.write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
