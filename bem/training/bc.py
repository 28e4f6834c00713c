"""AR0: the router learns by behavioural cloning what the oracle would have done.

First the reader is trained (`bem.training.reader`). Then the conversations are read under the oracle's
own route, and what the router saw at every decision is
paired with the oracle's action there; `rounds` more times they are read under the router's own
choices, each labelled with what the oracle would do from there (DAgger, arXiv:1011.0686): a router
that has erred once must know the way back. The critic is fitted to the oracle's cost to go: its value
to the least one, its Q to what each expert costs beyond that, which is all that hysteresis compares.

Conversations are split in three: the first part trains, the second chooses the reader's start and
every epoch, and the third chooses nothing, so that the accuracy stated on it is not flattered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from bem.config import CloningConfig
from bem.errors import TrainingError
from bem.routing.action import HEADS
from bem.routing.modes import seeded
from bem.routing.mounted import Mounted
from bem.routing.policy import MacroPolicy
from bem.training.data import Encoded
from bem.training.decisions import DecisionReader, Decisions
from bem.training.reader import Curve, expected_regret, train_reader
from bem.training.traces import Traces


@dataclass(frozen=True)
class Split:
    """Which conversations do what; every one is on exactly one side."""

    train: Bool[Tensor, " rows"]
    validation: Bool[Tensor, " rows"]
    """Chooses the reader's start and every epoch."""
    held_out: Bool[Tensor, " rows"]
    """Chooses nothing: accuracy is stated on it."""


@dataclass(frozen=True)
class Accuracy:
    """Of one head on the held-out conversations, each in [0, 1]."""

    head: str
    accuracy: float
    chance: float
    """Of a uniform choice among the options."""
    majority: float
    """Of always taking the most frequent option of the training conversations."""
    decisions: int


@dataclass(frozen=True)
class CloningResult:
    """Result of cloning."""

    accuracy: list[Accuracy]
    """Of every head; "expert at answers" is the expert head where an answer begins or goes on."""
    curve: Curve
    """Of the actor in the last round."""
    reading: Curve
    """Of the reader."""
    decisions: int
    held_out: int
    """Decisions among them that chose nothing."""


def clone(
    mounted: Mounted,
    rows: Sequence[Encoded],
    traces: Traces,
    pad_id: int,
    config: CloningConfig,
    seed: int,
    batch_size: int = 16,
    on_progress: Callable[[str], None] | None = None,
) -> CloningResult:
    """Train the mounted router's policy and critic on traces of `rows`.

    Raises:
        TrainingError: too few conversations for three sides, or the loss was not finite.
    """
    split = split_of(len(rows), config, seed)
    show = on_progress or (lambda text: None)
    reader = DecisionReader(mounted, rows, traces, pad_id, config, batch_size)
    train, validation = (s.nonzero()[:, 0].tolist() for s in (split.train, split.validation))
    with seeded(seed, mounted.base.device), mounted.training("router"):
        reading = train_reader(mounted, rows, traces, train, validation, pad_id, config, seed, show)
        decisions = on_path = reader.oracle()
        curve = _fit(mounted, decisions, split, config, seed)
        for number in range(config.rounds):
            show(f"cloning: states of the router's own, round {number + 1} of {config.rounds}")
            decisions = Decisions.join([decisions, reader.own()])
            curve = _fit(mounted, decisions, split, config, seed + number + 1)
    accuracy = _accuracies(mounted, on_path, split)
    return CloningResult(
        accuracy, curve, reading, len(decisions), len(decisions.of(split.held_out))
    )


def split_of(rows: int, config: CloningConfig, seed: int) -> Split:
    """A random split by the shares of the config; at least one conversation on each side.

    Raises:
        TrainingError: fewer conversations than the three sides need.
    """
    shares = (config.held_out, config.validation)
    out, chooses = (max(1, round(share * rows)) for share in shares)
    if rows <= out + chooses:
        raise TrainingError(
            f"{rows} conversations are too few: {out} to state accuracy on and {chooses} to choose the epoch "
            "leave none to train on. Trace more (routing.cloning.rows)."
        )
    order = np.random.default_rng([seed, 7]).permutation(rows)
    rank = torch.from_numpy(np.argsort(order))  # position of each row in the random order
    held_out, validation = rank < out, (rank >= out) & (rank < out + chooses)
    return Split(~held_out & ~validation, validation, held_out)


def _fit(
    mounted: Mounted, decisions: Decisions, split: Split, config: CloningConfig, seed: int
) -> Curve:
    """Critic, then actor; each keeps the weights that were best on the validation conversations."""
    decisions = decisions.to(mounted.base.device)
    train, validation = decisions.of(split.train), decisions.of(split.validation)
    if not len(train) or not len(validation):
        raise TrainingError("no decision on one side of the split: trace more conversations.")
    policy = mounted.router.policy
    policy.critic.net.dropout.p = policy.actor.net.dropout.p = config.dropout
    _descend(policy.critic, _critic_loss(policy, train, config), train, validation, config, seed)
    loss = _actor_loss(policy, mounted.router.available, config)
    # the net alone: `expert_bias` was trained with the reader
    return _descend(policy.actor.net, loss, train, validation, config, seed)


Loss = Callable[[Decisions], Tensor]


def _critic_loss(policy: MacroPolicy, train: Decisions, config: CloningConfig) -> Loss:
    spread = train.q.max(-1).values.var().clamp(min=1e-6)

    def loss(part: Decisions) -> Tensor:
        value, q = policy.critic(part.observations)
        best = part.q.max(-1).values
        regret = (part.q - best[:, None]).clamp(min=-config.largest_regret)
        # the value differs from state to state far more than Q does from expert to expert
        return F.mse_loss(q, regret) + 0.1 * F.mse_loss(value, best) / spread

    return loss


def _actor_loss(policy: MacroPolicy, available: Tensor, config: CloningConfig) -> Loss:
    scales = (1.0, *[config.other_heads] * 3)

    def loss(part: Decisions) -> Tensor:
        heads = _logits(policy, part.observations, available)
        losses = [
            scales[h]
            * (F.cross_entropy(z, part.targets[:, h], reduction="none") * part.weights[:, h]).sum()
            / part.weights[:, h].sum().clamp(min=1)
            for h, z in enumerate(heads)
        ]
        regret = expected_regret(heads[0], -part.q, config.largest_regret)
        return torch.stack(losses).sum() + config.regret * regret.mean()

    return loss


def _logits(policy: MacroPolicy, observations: Tensor, available: Tensor) -> list[Tensor]:
    """Logits of every head; the value is the critic's as it is now, not as it was when this was seen."""
    with torch.no_grad():
        value = policy.critic(observations)[0]
    expert, *rest = policy.actor.logits(policy.actor.observed.valued(observations, value))
    return [expert.masked_fill(~available, -torch.inf), *rest]


def _descend(
    module: torch.nn.Module,
    loss_of: Loss,
    train: Decisions,
    validation: Decisions,
    config: CloningConfig,
    seed: int,
) -> Curve:
    """AdamW; the weights of the epoch with the least validation loss stay."""
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    rng = np.random.default_rng([seed, 11])
    best, weights, curve = np.inf, None, []
    for _ in range(config.epochs):
        mean = _epoch(module, loss_of, train, optimizer, config.batch_size, rng)
        with torch.no_grad():
            loss = float(loss_of(validation))
        if not np.isfinite(loss):
            raise TrainingError(
                f"cloning diverged: validation loss {loss}. Lower routing.cloning.learning_rate "
                f"(now {config.learning_rate:g})."
            )
        curve.append((mean, loss))
        if loss < best:
            best, weights = loss, {k: v.clone() for k, v in module.state_dict().items()}
    assert weights is not None
    module.load_state_dict(weights)
    return curve


def _epoch(
    module: torch.nn.Module,
    loss_of: Loss,
    train: Decisions,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    rng: np.random.Generator,
) -> float:
    """One pass over the decisions in a new order; the mean loss."""
    total = 0.0
    module.train()
    for rows in torch.from_numpy(rng.permutation(len(train))).split(batch_size):
        loss = loss_of(train.select(rows.to(train.targets.device)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        total += float(loss.detach()) * len(rows)
    module.eval()
    return total / len(train)


@torch.no_grad()
def _accuracies(mounted: Mounted, decisions: Decisions, split: Split) -> list[Accuracy]:
    """Of every head that has targets on both sides; majority is that of the training side."""
    train, held_out = decisions.of(split.train), decisions.of(split.held_out)
    policy, device = mounted.router.policy, mounted.base.device
    logits = _logits(policy, held_out.observations.to(device), mounted.router.available)
    rows = [
        (name, h, train.weights[:, h] > 0, held_out.weights[:, h] > 0)
        for h, name in enumerate(HEADS)
    ]
    rows.append(("expert at answers", 0, train.answers, held_out.answers))
    return [
        _accuracy(name, logits[h].cpu()[there], held_out.targets[there, h], train.targets[here, h])
        for name, h, here, there in rows
        if bool(here.any()) and bool(there.any())
    ]


def _accuracy(name: str, logits: Tensor, targets: Tensor, trained_on: Tensor) -> Accuracy:
    majority = trained_on.bincount().argmax()
    return Accuracy(
        name,
        accuracy=float((logits.argmax(-1) == targets).float().mean()),
        chance=1 / int(torch.isfinite(logits[0]).sum()),
        majority=float((targets == majority).float().mean()),
        decisions=len(targets),
    )
