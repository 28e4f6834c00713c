"""Arms with a route: our routers, PEFT's, and routes that no router chose.

The maker's labels, the oracle, the linear classifier, the sentence encoder and the controls are one expert option per turn of
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
from bem.config.arm import ROUTERS
from bem.experiments.adapted import put_on
from bem.experiments.measuring.kept import KeptAnswers
from bem.experiments.routing.arrow import arrow
from bem.experiments.routing.encoder import encoder_route
from bem.experiments.routing.interference import interference_of
from bem.experiments.routing.peer import Peer, load_peer
from bem.experiments.routing.skills import Options, routed, unrouted
from bem.experiments.routing.stages import RoutingArtifacts
from bem.experiments.routing.transcript import conversations_of
from bem.experiments.routing.xlora import xlora
from bem.routing.mount import load_router
from bem.runs.folder import Cell
from bem.tasks.load import Task
from bem.training.data import Encoded, Example
from bem.training.fit import fit
from bem.training.linear import fit_linear, turn_features

PEERS: dict[str, Callable[..., Peer]] = {"arrow": arrow, "xlora": xlora}
"""Methods of PEFT's, by route."""


@dataclass(frozen=True)
class ReadyArm:
    """An arm that is ready to be measured."""

    attached: Any
    tasks: list[Task]
    facts: dict[str, Any]
    """Facts for the report."""
    kept: KeptAnswers | None = None
    """Answers of all arms that choose among the same experts; None: nobody else's are the same."""


@contextmanager
def ready_arm(arm: ArmConfig, artifacts: RoutingArtifacts, cell: Cell) -> Iterator[ReadyArm]:
    """Make ready what an arm with a route needs; everything is taken off again at the end."""
    route = arm.route
    assert route is not None
    if route in PEERS:
        folders = {name: artifacts.peers() / name for name in artifacts.skills.experts}
        with put_on(artifacts.model, lambda base: _peer(route, base, folders, artifacts)) as peer:
            _train_peer(peer, artifacts, cell)
            yield ReadyArm(peer, artifacts.inputs.tasks, {})
    elif route in ROUTERS:
        folder = getattr(artifacts, route)()
        facts: dict[str, Any] = {}
        if artifacts.saved is None:
            facts["interference"] = interference_of(artifacts, folder)
        with artifacts.mounted(folder) as mounted:
            facts["conversations"] = conversations_of(mounted, artifacts)
            yield ReadyArm(mounted, artifacts.inputs.tasks, facts)
    else:
        tasks, facts = with_route(route, artifacts)
        with artifacts.mounted(artifacts.experts()) as mounted:
            acting = mounted.version.digest
            kept = KeptAnswers(artifacts.folder / "answers", acting, artifacts.model)
            yield ReadyArm(mounted, tasks, facts, kept)


def _peer(route: str, base: Any, folders: Any, artifacts: RoutingArtifacts) -> Peer:
    if route == "xlora":
        return xlora(base, folders, seed=artifacts.seed)
    return PEERS[route](base, folders)


def _train_peer(peer: Peer, artifacts: RoutingArtifacts, cell: Cell) -> None:
    """X-LoRA's classifier is trained on the conversations that the routers are trained on."""
    if not peer.parameters():
        return
    steps = artifacts.routing.peer_steps
    fit(
        peer,  # pyright: ignore[reportArgumentType] - it has what fit asks for
        artifacts.inputs.tokenizer,
        artifacts.inputs.examples,
        artifacts.config.training.model_copy(update={"steps": steps}),
        cell.path,
        artifacts.seed,
        lambda step: artifacts.say("training X-LoRA", step.step, steps, f"loss {step.loss:.3f}"),
        "xlora",
        validation=artifacts.inputs.validation,
    )


def reopened(model: Any, arm: ArmConfig, cell: Cell, artifacts: RoutingArtifacts) -> Any:
    """What an arm with a route saved, on a copy of the base."""
    if arm.route in PEERS:
        return load_peer(model, cell.checkpoint, artifacts.peers(), PEERS)
    mounted = load_router(model, cell.checkpoint)
    if arm.route in FIXED:
        mounted.model.register_forward_pre_hook(_under_one_expert, with_kwargs=True, prepend=True)
    return mounted


def _under_one_expert(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What chose for such an arm was no router: it is timed under an expert, whichever it is."""
    return args, {"route": torch.ones_like(kwargs["input_ids"]), **kwargs}


# --------------------------------------------------------------------------------- fixed routes


def with_route(kind: str, artifacts: RoutingArtifacts) -> tuple[list[Task], dict[str, Any]]:
    """The tasks with every held-out row routed, and facts for the report.

    Args:
        kind: gold, oracle, linear, encoder, single, random or wrong.
    Returns:
        The facts: how often the last turn has the maker's expert, and how often where it shows no cue.
    """
    rows = artifacts.held_out
    options, facts = FIXED[kind](artifacts, rows)
    gold = gold_route(artifacts, rows)
    last = [o[-1] == g[-1] for o, g in zip(options, gold, strict=True)]
    facts = facts | {"agrees_with_gold": float(np.mean(last))}
    sticky = [right for right, row in zip(last, rows, strict=True) if row.meta.get("sticky")]
    if sticky:
        facts["agrees_with_gold_sticky"] = float(np.mean(sticky))
    by_task = iter(routed(rows, options))
    tasks = [
        replace(task, dev=[next(by_task) for _ in task.dev]) for task in artifacts.inputs.tasks
    ]
    return tasks, facts


def gold_route(artifacts: RoutingArtifacts, rows: Sequence[Example]) -> Options:
    """The expert of the skill that each turn was made for."""
    return [artifacts.skills.route(row) for row in rows]


def _gold(artifacts: RoutingArtifacts, rows: Sequence[Example]) -> tuple[Options, dict]:
    return gold_route(artifacts, rows), {}


def _random(artifacts: RoutingArtifacts, rows: Sequence[Example]) -> tuple[Options, dict]:
    """Any expert, drawn anew for each turn."""
    rng = np.random.default_rng([artifacts.seed, 21])
    n = len(artifacts.skills.experts)
    return [rng.integers(1, n + 1, len(g)).tolist() for g in gold_route(artifacts, rows)], {}


def _wrong(artifacts: RoutingArtifacts, rows: Sequence[Example]) -> tuple[Options, dict]:
    """Any expert but the right one."""
    rng = np.random.default_rng([artifacts.seed, 22])
    n = len(artifacts.skills.experts)
    return [
        [int((o - 1 + rng.integers(1, n)) % n) + 1 for o in gold]
        for gold in gold_route(artifacts, rows)
    ], {}


def _single(artifacts: RoutingArtifacts, rows: Sequence[Example]) -> tuple[Options, dict]:
    """The expert with the least loss over the training traces, for everything."""
    with artifacts.mounted(artifacts.experts()) as mounted:
        encoded = _encoded(artifacts, artifacts.traced_rows())
        traces = artifacts.trace(mounted, encoded, artifacts.folder / "traces.npz")
    best = int(traces.experts.sum((0, 1))[1:].argmin()) + 1
    options = [[best] * len(gold) for gold in gold_route(artifacts, rows)]
    return options, {"expert": artifacts.skills.experts[best - 1]}


def _oracle(artifacts: RoutingArtifacts, rows: Sequence[Example]) -> tuple[Options, dict]:
    """The least loss of the reference answers, in hindsight: no router can know it."""
    encoded = _encoded(artifacts, [unrouted(row) for row in rows])
    with artifacts.mounted(artifacts.experts()) as mounted:
        traces = artifacts.trace(mounted, encoded, artifacts.folder / "traces-dev.npz", True)
    options = []
    for row, turns in enumerate(traces.turns):
        begins = turns[: traces.chunks[row]].nonzero()[0]
        options.append([int(traces.path[row, t]) for t in begins])
    return _whole(options, gold_route(artifacts, rows)), {}


def _linear(artifacts: RoutingArtifacts, rows: Sequence[Example]) -> tuple[Options, dict]:
    """A linear classifier on the base's mean hidden states, trained on the makers' labels."""
    layer, train = _router_layer(artifacts), artifacts.labelled_rows()
    seen = _turn_features(artifacts, train, layer)
    labels = [
        option
        for route, turns in zip(gold_route(artifacts, train), seen, strict=True)
        for option in route[-len(turns) :]
    ]
    n = len(artifacts.skills.experts)
    classifier = fit_linear(torch.cat(seen), torch.tensor(labels) - 1, n)
    gold = gold_route(artifacts, rows)
    chosen = [(classifier(t) + 1).tolist() for t in _turn_features(artifacts, rows, layer)]
    options = _whole(chosen, gold)
    right = [a == b for o, g in zip(options, gold, strict=True) for a, b in zip(o, g, strict=True)]
    return options, {"accuracy_per_turn": float(np.mean(right)), "trained_on": len(labels)}


def _whole(options: Options, gold: Options) -> Options:
    """Turns that were cut off a long conversation are under the bare base."""
    return [[0] * (len(g) - len(o)) + o for o, g in zip(options, gold, strict=True)]


def _router_layer(artifacts: RoutingArtifacts) -> int:
    with artifacts.mounted(artifacts.experts()) as mounted:
        layer = mounted.router_config.router_layer
    assert layer is not None  # `mount` has filled it in
    return layer


def _encoded(artifacts: RoutingArtifacts, rows: Sequence[Example]) -> list[Encoded]:
    return [artifacts.encoded(row) for row in rows]


def _turn_features(artifacts: RoutingArtifacts, rows: Sequence[Example], layer: int) -> list[Any]:
    encoded, size = _encoded(artifacts, rows), artifacts.config.eval_batch_size
    return turn_features(artifacts.model, encoded, layer, artifacts.inputs.pad_id, size)


FIXED: dict[str, Callable[[RoutingArtifacts, Sequence[Example]], tuple[Options, dict]]] = {
    "gold": _gold,
    "oracle": _oracle,
    "linear": _linear,
    "encoder": encoder_route,
    "single": _single,
    "random": _random,
    "wrong": _wrong,
}
