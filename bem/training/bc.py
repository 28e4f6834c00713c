"""AR0: the router learns by behavioural cloning what the oracle would have done.

First the router learns to read (`bem.training.reading`). Then the conversations are read under the
oracle's own route, and what the router saw at every decision is
paired with the oracle's action there; `rounds` more times they are read under the router's own
choices, each labelled with what the oracle would do from there (DAgger, arXiv:1011.0686): a router
that has erred once must know the way back. The critic is fitted to the oracle's cost to go: its value
to the least one, its Q to what each expert costs beyond that, which is all that hysteresis compares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bem.errors import TrainingError
from bem.routing.action import EXPERT, HEADS, ActionSpace
from bem.routing.router import Step
from bem.training.data import Encoded, collate
from bem.training.reading import expected_regret, learn_to_read, up_to
from bem.training.traces import Traces, best_expert, chunk_numbers, target_actions

if TYPE_CHECKING:
    from bem.config import CloningConfig
    from bem.routing.mounted import Mounted
    from bem.routing.policy import MacroPolicy


@dataclass(frozen=True)
class Decisions:
    """What was seen at decisions, and what the oracle would have done."""

    observations: Tensor  # (n, Observed.width)
    targets: Tensor  # int (n, 4)
    weights: Tensor  # (n, 4): 0 where a head's target means nothing
    q: Tensor  # (n, experts + 1): minus the least cost from here on under each option
    answers: Tensor  # bool (n,): an answer begins or goes on here
    conversation: Tensor  # int (n,)

    @staticmethod
    def join(parts: Sequence[Decisions]) -> Decisions:
        """One after the other."""
        names = Decisions.__dataclass_fields__
        return Decisions(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names})

    def select(self, rows: Tensor) -> Decisions:
        """Some of the decisions."""
        return Decisions(**{n: v[rows] for n, v in vars(self).items()})

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class Accuracy:
    """Of one head on held-out traces, each in [0, 1]."""

    head: str
    accuracy: float
    chance: float
    """Of a uniform choice among the options."""
    majority: float
    """Of always taking the most frequent option of the training traces."""
    decisions: int


@dataclass(frozen=True)
class CloningResult:
    """What cloning came to."""

    accuracy: list[Accuracy]
    """Of every head; "expert at answers" is the expert head where an answer begins or goes on."""
    curve: list[tuple[float, float]]
    """(training, held-out) loss of each epoch of the last round."""
    reading: list[tuple[float, float]]
    """The same of the reader."""
    decisions: int
    held_out: int


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
        TrainingError: too few conversations to hold any out, or the loss was not finite.
    """
    order = np.random.default_rng([seed, 7]).permutation(len(rows))
    held = max(1, round(config.held_out * len(rows)))
    if len(rows) <= held:
        raise TrainingError(f"{len(rows)} conversations are too few to hold {held} out.")
    out = torch.zeros(len(rows), dtype=torch.bool)
    out[torch.from_numpy(order[:held].copy())] = True
    say = on_progress or (lambda text: None)
    gather = _Gatherer(mounted, rows, traces, pad_id, config, batch_size)
    with torch.random.fork_rng(devices=[]), mounted.training("router"):
        torch.manual_seed(seed)
        read = learn_to_read(mounted, rows, traces, out, pad_id, config, seed, say)
        found = teacher = gather.oracle()
        curve = _fit(mounted, found, out, config, seed)
        for number in range(config.rounds):
            say(f"cloning: states of the router's own, round {number + 1} of {config.rounds}")
            found = Decisions.join([found, gather.own()])
            curve = _fit(mounted, found, out, config, seed + number + 1)
    accuracy = _accuracies(mounted, teacher, out)
    return CloningResult(accuracy, curve, read, len(found), int(out[found.conversation].sum()))


class _Gatherer:
    """Reads the conversations and notes what the router sees."""

    def __init__(
        self,
        mounted: Mounted,
        rows: Sequence[Encoded],
        traces: Traces,
        pad_id: int,
        config: CloningConfig,
        size: int,
    ):
        self.mounted, self.rows, self.traces, self.pad_id = mounted, rows, traces, pad_id
        self.config, self.size = config, size
        self.space: ActionSpace = mounted.router.space
        self.targets = target_actions(traces, self.space, config.rank_cost, config.margin)
        self.order = sorted(range(len(rows)), key=lambda i: len(rows[i]))

    def oracle(self) -> Decisions:
        """Under the oracle's actions."""
        schedule = torch.from_numpy(_schedule(self.traces, self.targets, self.space))
        return Decisions.join([self._read(batch, schedule[batch]) for batch in self._batches()])

    def own(self) -> Decisions:
        """Under the router's own most likely actions."""
        return Decisions.join([self._read(batch, None) for batch in self._batches()])

    def _batches(self) -> list[list[int]]:
        return [self.order[i : i + self.size] for i in range(0, len(self.order), self.size)]

    @torch.no_grad()
    def _read(self, chosen: list[int], schedule: Tensor | None) -> Decisions:
        model, router = self.mounted.model, self.mounted.router
        batch = collate([self.rows[i] for i in chosen], self.pad_id)
        batch.pop("route", None)
        if schedule is not None:
            at = (chunk_numbers(batch, router.chunk_size) - 1).clamp(min=0)
            batch["route"] = schedule.gather(1, at[..., None].expand(-1, -1, 4))
        training = model.training
        model.eval()
        layer = self.mounted.router_config.router_layer
        assert layer is not None
        inputs = {k: v.to(model.device) for k, v in batch.items() if k != "labels"}
        with router.watched() as tape, up_to(self.mounted.base, layer, decide=True):
            model(**inputs, use_cache=False)  # what comes after the decisions changes none of them
        model.train(training)
        chunks = enumerate(
            tape[: self.targets.shape[1]]
        )  # there may be slots for more than there are
        return Decisions.join([self._decisions(step, chosen, t) for t, step in chunks])

    def _decisions(self, step: Step, chosen: list[int], chunk: int) -> Decisions:
        decided = torch.where(step.forced, True, ~step.allowed.hold) & step.real
        if bool(step.forced.any()):
            decided &= step.forced
        at = decided.cpu().nonzero()[:, 0]
        rows = [chosen[int(r)] for r in at]
        current = step.boundary.record[:, EXPERT].long().cpu()[at].tolist()
        targets = torch.from_numpy(self.targets[rows, chunk].copy()).reshape(-1, 4)
        weights = torch.ones(len(rows), 4)
        for k, (row, before) in enumerate(zip(rows, current, strict=True)):
            best = best_expert(self.traces, self.config.switch_cost, row, chunk, before)
            if chunk and best != targets[k, 0]:  # it went astray: what else to do is not known
                targets[k, 0], weights[k, 1:] = best, 0.0
        return Decisions(
            step.observation.cpu()[at],
            targets,
            weights,
            -torch.from_numpy(self.traces.cost_to_go[rows, chunk].copy()).reshape(
                len(rows), self.space.sizes[0]
            ),
            torch.from_numpy(self.traces.answers[rows, chunk].copy()).reshape(-1),
            torch.tensor(rows, dtype=torch.long),
        )


def _schedule(traces: Traces, targets: np.ndarray, space: ActionSpace) -> np.ndarray:
    """The oracle's actions where it decides, -1 where a span goes on: (rows, chunks, 4)."""
    schedule = np.full_like(targets, -1)
    for row in range(len(traces)):
        t = 0
        while t < traces.chunks[row]:
            schedule[row, t] = targets[row, t]
            stop = t + space.spans[targets[row, t, 1]]
            t += 1
            while t < min(stop, traces.chunks[row]) and not traces.turns[row, t]:
                t += 1
    return schedule


def _fit(
    mounted: Mounted, data: Decisions, out: Tensor, config: CloningConfig, seed: int
) -> list[tuple[float, float]]:
    """Critic, then actor; each keeps the weights that were best on the held-out conversations."""
    held = out[data.conversation]
    device = mounted.base.device
    data = Decisions(**{n: v.to(device) for n, v in vars(data).items()})
    train, test = data.select((~held).nonzero()[:, 0]), data.select(held.nonzero()[:, 0])
    if not len(test) or not len(train):
        raise TrainingError("no decision on one side of the split: trace more conversations.")
    policy = mounted.router.policy
    critic, actor = policy.critic, policy.actor
    available, scales = mounted.router.available, (1.0, *[config.other_heads] * 3)

    spread = train.q.max(-1).values.var().clamp(min=1e-6)

    def value_loss(part: Decisions) -> Tensor:
        v, q = critic(part.observations)
        best = part.q.max(-1).values
        regret = (part.q - best[:, None]).clamp(min=-config.largest_regret)
        # the value differs from state to state far more than Q does from expert to expert
        return F.mse_loss(q, regret) + 0.1 * F.mse_loss(v, best) / spread

    def action_loss(part: Decisions) -> Tensor:
        heads = _logits(policy, part.observations, available)
        losses = [
            scales[h]
            * (F.cross_entropy(z, part.targets[:, h], reduction="none") * part.weights[:, h]).sum()
            / part.weights[:, h].sum().clamp(min=1)
            for h, z in enumerate(heads)
        ]
        regret = expected_regret(heads[0], -part.q, config.largest_regret)
        return torch.stack(losses).sum() + config.regret * regret.mean()

    critic.net.dropout.p = actor.net.dropout.p = config.dropout
    _descend(critic, value_loss, train, test, config, seed)
    return _descend(actor.net, action_loss, train, test, config, seed)  # the opinion is learned


def _logits(policy: MacroPolicy, observations: Tensor, available: Tensor) -> list[Tensor]:
    """Logits of every head; the value is the critic's as it is now, not as it was when this was seen."""
    with torch.no_grad():
        value = policy.critic(observations)[0]
    expert, *rest = policy.actor.logits(policy.actor.observed.valued(observations, value))
    return [expert.masked_fill(~available, -torch.inf), *rest]


def _descend(
    module: torch.nn.Module,
    loss_of: Callable[[Decisions], Tensor],
    train: Decisions,
    test: Decisions,
    config: CloningConfig,
    seed: int,
) -> list[tuple[float, float]]:
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    rng = np.random.default_rng([seed, 11])
    best, kept, curve = np.inf, None, []
    for _ in range(config.epochs):
        total = 0.0
        module.train()
        order = torch.from_numpy(rng.permutation(len(train)))
        for rows in order.split(config.batch_size):
            loss = loss_of(train.select(rows.to(train.targets.device)))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            total += float(loss.detach()) * len(rows)
        module.eval()
        with torch.no_grad():
            held = float(loss_of(test))
        if not np.isfinite(held):
            raise TrainingError(
                f"cloning diverged: held-out loss {held}. Lower routing.cloning.learning_rate "
                f"(now {config.learning_rate:g})."
            )
        curve.append((total / len(train), held))
        if held < best:
            best, kept = held, {k: v.clone() for k, v in module.state_dict().items()}
    assert kept is not None
    module.load_state_dict(kept)
    return curve


@torch.no_grad()
def _accuracies(mounted: Mounted, data: Decisions, out: Tensor) -> list[Accuracy]:
    held = out[data.conversation]
    train, test = data.select((~held).nonzero()[:, 0]), data.select(held.nonzero()[:, 0])
    policy, device = mounted.router.policy, mounted.base.device
    logits = _logits(policy, test.observations.to(device), mounted.router.available)
    found = []
    subsets = [(name, h, test.weights[:, h] > 0) for h, name in enumerate(HEADS)]
    subsets.append(("expert at answers", 0, test.answers))
    for name, head, part in subsets:
        known = train.answers if name == "expert at answers" else train.weights[:, head] > 0
        wanted = test.targets[part, head]
        usual = train.targets[known, head]
        if not len(wanted) or not len(usual):
            continue
        options = int(torch.isfinite(logits[head][0]).sum())
        guess = logits[head].argmax(-1).cpu()[part]
        common = usual.bincount().argmax()
        found.append(
            Accuracy(
                name,
                float((guess == wanted).float().mean()),
                1 / options,
                float((wanted == common).float().mean()),
                len(wanted),
            )
        )
    return found
