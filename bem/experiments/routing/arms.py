"""Arms with a route: our routers, PEFT's, and routes that no router chose.

The maker's labels, the oracle, the linear classifier and the controls are one expert option per turn of
every held-out conversation; `measure` follows them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from bem.config import ArmConfig
from bem.experiments.routing.interference import interference_of
from bem.experiments.routing.linear import fit_linear, turn_features
from bem.experiments.routing.peers import Peer, arrow, load_peer, xlora
from bem.experiments.routing.stages import Stages, routed
from bem.experiments.routing.transcript import conversations_of
from bem.routing.mount import load_router
from bem.runs.folder import Cell, write_json
from bem.tasks.load import Task
from bem.training.data import Encoded, Example
from bem.training.fit import fit

Options = list[list[int]]
"""Expert option of each turn of each row."""


@dataclass(frozen=True)
class Opened:
    """An arm that is ready to be measured."""

    attached: Any
    tasks: list[Task]
    facts: dict[str, Any]
    """What the report says of it."""


@contextmanager
def opened(arm: ArmConfig, stages: Stages, cell: Cell) -> Iterator[Opened]:
    """Make ready what an arm with a route needs; everything is taken off again at the end."""
    route = arm.route
    if route in ("xlora", "arrow"):
        peer = _peer(route, stages, cell)
        try:
            yield Opened(peer, stages.tasks, {})
        finally:
            stages.model = peer.detach()
    elif route in ("ar0", "ar1"):
        folder = stages.ar0() if route == "ar0" else stages.ar1()
        facts: dict[str, Any] = {"interference": interference_of(stages, folder)}
        with stages.mounted(folder) as mounted:
            facts["conversations"] = conversations_of(mounted, stages)
            yield Opened(mounted, stages.tasks, facts)
    else:
        assert route is not None
        tasks, facts = with_route(route, stages)
        with stages.mounted(stages.experts()) as mounted:
            yield Opened(mounted, tasks, facts)


def _peer(kind: str, stages: Stages, cell: Cell) -> Peer:
    """X-LoRA's classifier is trained on the conversations that the routers are trained on."""
    folders = {name: stages.peers() / name for name in stages.skills.experts}
    if kind == "arrow":
        return arrow(stages.model, folders)
    peer, steps = xlora(stages.model, folders, seed=stages.seed), stages.routing.peer_steps
    training = stages.config.training.model_copy(update={"steps": steps})
    fit(
        peer,  # pyright: ignore[reportArgumentType] - it has what fit asks for
        stages.tokenizer,
        stages.examples,
        training,
        cell.path,
        stages.seed,
        lambda step: stages.say("training X-LoRA", step.step, steps, f"loss {step.loss:.3f}"),
        "xlora",
    )
    return peer


def reopened(model: Any, arm: ArmConfig, cell: Cell, stages: Stages) -> Any:
    """What an arm with a route saved, on a copy of the base."""
    if arm.route in ("xlora", "arrow"):
        return load_peer(model, cell.checkpoint, stages.peers())
    return load_router(model, cell.checkpoint)


def keep_facts(cell: Cell, facts: dict[str, Any]) -> None:
    """Write what the report says of an arm beside its measurement."""
    write_json(cell.path / "route.json", facts)


def with_route(kind: str, stages: Stages) -> tuple[list[Task], dict]:
    """The tasks with every held-out row routed, and what is to be said of the route.

    Args:
        kind: gold, oracle, linear, single, random or wrong.
    """
    rows = [row for task in stages.tasks for row in task.dev]
    options, facts = FIXED[kind](stages, rows)
    gold = gold_route(stages, rows)
    last = [(o[-1], g[-1]) for o, g in zip(options, gold, strict=True)]
    facts |= {"agrees_with_gold": float(np.mean([a == b for a, b in last]))}
    found = iter(routed(rows, options))
    return [replace(task, dev=[next(found) for _ in task.dev]) for task in stages.tasks], facts


def gold_route(stages: Stages, rows: Sequence[Example]) -> Options:
    """The expert of the skill that each turn was made for."""
    return [stages.skills.route(row) for row in rows]


def _gold(stages: Stages, rows: Sequence[Example]) -> tuple[Options, dict]:
    return gold_route(stages, rows), {}


def _random(stages: Stages, rows: Sequence[Example]) -> tuple[Options, dict]:
    """Any expert, drawn anew for each turn."""
    rng = np.random.default_rng([stages.seed, 21])
    n = len(stages.skills.experts)
    return [rng.integers(1, n + 1, len(g)).tolist() for g in gold_route(stages, rows)], {}


def _wrong(stages: Stages, rows: Sequence[Example]) -> tuple[Options, dict]:
    """Any expert but the right one."""
    rng = np.random.default_rng([stages.seed, 22])
    n = len(stages.skills.experts)
    return [
        [int((o - 1 + rng.integers(1, n)) % n) + 1 for o in gold]
        for gold in gold_route(stages, rows)
    ], {}


def _single(stages: Stages, rows: Sequence[Example]) -> tuple[Options, dict]:
    """The expert with the least loss over the training traces, for everything."""
    with stages.mounted(stages.experts()) as mounted:
        encoded = [stages.encoded(row) for row in stages.traced_rows()]
        traces = stages.trace(mounted, encoded, stages.folder / "traces.npz")
    best = int(traces.experts.sum((0, 1))[1:].argmin()) + 1
    options = [[best] * len(gold) for gold in gold_route(stages, rows)]
    return options, {"expert": stages.skills.experts[best - 1]}


def _oracle(stages: Stages, rows: Sequence[Example]) -> tuple[Options, dict]:
    """The least loss of the reference answers, in hindsight: no router can know it."""
    encoded = [stages.encoded(replace(row, meta={**row.meta, "route": None})) for row in rows]
    with stages.mounted(stages.experts()) as mounted:
        traces = stages.trace(mounted, encoded, stages.folder / "traces-dev.npz", True)
    options = []
    for row, turns in enumerate(traces.turns):
        begins = turns[: traces.chunks[row]].nonzero()[0]
        options.append([int(traces.path[row, t]) for t in begins])
    return _whole(options, gold_route(stages, rows)), {}


def _linear(stages: Stages, rows: Sequence[Example]) -> tuple[Options, dict]:
    """A linear classifier on the base's mean hidden states, trained on the makers' labels."""
    train = stages.traced_rows()
    layer = _router_layer(stages)
    size = stages.config.eval_batch_size
    known = turn_features(stages.model, _encoded(stages, train), layer, stages.pad_id, size)
    kept = zip(gold_route(stages, train), known, strict=True)
    labels = [o for gold, turns in kept for o in gold[-len(turns) :]]
    n = len(stages.skills.experts)
    classifier = fit_linear(torch.cat(known), torch.tensor(labels) - 1, n)
    found = turn_features(stages.model, _encoded(stages, rows), layer, stages.pad_id, size)
    gold = gold_route(stages, rows)
    options = _whole([(classifier(turns) + 1).tolist() for turns in found], gold)
    right = [a == b for o, g in zip(options, gold, strict=True) for a, b in zip(o, g, strict=True)]
    return options, {"accuracy_per_turn": float(np.mean(right)), "trained_on": len(labels)}


def _whole(options: Options, gold: Options) -> Options:
    """Turns that were cut off a long conversation are under the bare base."""
    return [[0] * (len(g) - len(o)) + o for o, g in zip(options, gold, strict=True)]


def _router_layer(stages: Stages) -> int:
    with stages.mounted(stages.experts()) as mounted:
        layer = mounted.router_config.router_layer
    assert layer is not None  # `mount` has filled it in
    return layer


def _encoded(stages: Stages, rows: Sequence[Example]) -> list[Encoded]:
    return [stages.encoded(row) for row in rows]


FIXED: dict[str, Callable[[Stages, Sequence[Example]], tuple[Options, dict]]] = {
    "gold": _gold,
    "oracle": _oracle,
    "linear": _linear,
    "single": _single,
    "random": _random,
    "wrong": _wrong,
}
