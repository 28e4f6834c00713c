"""Learning to choose an expert from few rows: the router's reader, and the plain ways to choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bem.adapters.sites import find_sites
from bem.config import CloningConfig, ReadingConfig
from bem.routing.mounted import Mounted
from bem.training.data import Encoded
from bem.training.linear import best_linear, fit_centroids, turn_features
from bem.training.picture import Taught, check_pictures, fit_picture
from bem.training.plain_policy import follow_reader, worth_of
from bem.training.reader import ReaderTrainer, States, read_states
from bem.training.reader_start import Recipe, Start, Turn, start_reader
from bem.training.router_targets import UNKNOWN, Targets, as_traces, folds_of

FOLDS, TUNED_ON = 5, 3
"""Folds that choose the start's recipe, and those of them that choose how long it is trained on."""
TUNING = CloningConfig(
    reading=ReadingConfig(epochs=12, learning_rate=1e-3, batch_size=16, dropout=0.2), regret=1.0
)
"""How the reader is trained on from its start."""
GAIN = 0.1
"""It is, if the loss on left-out folds falls by more than this share: less is as often noise as not."""


@dataclass(frozen=True)
class Learned:
    """How the reader was fitted."""

    recipe: Recipe
    epochs: int
    """Of training behind its start; 0: left-out folds were best at the start."""
    left_out: list[float]
    """Loss on left-out folds at the start and after each epoch."""
    worth: float
    """Nats that a unit of an expert's logit stands for."""


Tell = Callable[[str, int, int], None]


def learn(
    mounted: Mounted,
    prompts: Sequence[Encoded],
    targets: Targets,
    train: Sequence[int],
    pad_id: int,
    seed: int,
    tell: Tell,
) -> Learned:
    """Fit reader and policy to the turns of the training rows.

    Args:
        prompts: of all rows.
        train: those that teach; others are not looked at.
    """
    policy, device = mounted.router.policy, mounted.base.device
    check_pictures([prompts[i] for i in train], policy.actor.sight is not None)
    tell("reading the prompts", 0, 0)
    read = read_states(mounted, prompts, train, train, pad_id)
    trainee = _Trainee(mounted, read, targets, train, seed)
    tell("fitting the router", 0, 0)
    start = trainee.start(range(len(trainee.turns)))
    curve = trainee.left_out(start, tell)
    epochs = int(np.argmin(curve)) if min(curve) < (1 - GAIN) * curve[0] else 0
    trainee.start(range(len(trainee.turns)), start.recipe)
    if epochs:
        trainee.train(train, epochs)
    logits = start.logits
    if policy.actor.sight is not None:
        logits = fit_picture(policy, start, trainee.taught(prompts))
    policy.reader.rescale(read.centre.to(device), read.spread.to(device))
    regrets = torch.from_numpy(trainee.regrets[:, start.options])
    worth = worth_of(logits, regrets)
    follow_reader(policy, worth)
    return Learned(start.recipe, epochs, [round(loss, 4) for loss in curve], worth)


class _Trainee:
    """The reader, and the turns that it learns from."""

    def __init__(
        self, mounted: Mounted, read: States, targets: Targets, train: Sequence[int], seed: int
    ):
        self.policy, self.read, self.train_rows, self.seed = (
            mounted.router.policy,
            read,
            train,
            seed,
        )
        self.traces = as_traces(targets)
        rows, turns = (targets.best != UNKNOWN).nonzero()
        kept = np.isin(rows, train)
        rows, turns = rows[kept], turns[kept]
        self.rows = rows.tolist()
        self.place = {row: at for at, row in enumerate(train)}
        wanted = torch.from_numpy(targets.wanted[rows, turns])
        chunks = targets.starts[rows, turns].tolist()
        self.turns = [
            Turn(self.place[r], c, w) for r, c, w in zip(self.rows, chunks, wanted, strict=True)
        ]
        self.regrets = targets.regrets()[rows, turns]
        self.folds = folds_of(self.rows, targets.best[rows, turns].tolist(), FOLDS, seed)

    def start(self, chosen: Sequence[int], recipe: Recipe | None = None) -> Start:
        """Begin anew as the classifier of some of the turns."""
        reader, bias = self.policy.reader, self.policy.actor.expert_bias
        torch.manual_seed(self.seed)
        reader.reset()
        bias.reset_parameters()
        hidden = [self.read.hidden[row] for row in self.train_rows]
        numbers = [self.read.numbers[row] for row in self.train_rows]
        turns = [self.turns[at] for at in chosen]
        return start_reader(reader, bias, hidden, numbers, turns, self.folds[list(chosen)], recipe)

    def taught(self, prompts: Sequence[Encoded]) -> Taught:
        """What a picture is learned from."""
        nothing = (0.0,) * self.policy.actor.observed.n_vision
        seen = torch.tensor([prompts[row].vision or nothing for row in self.rows])
        hidden = [self.read.hidden[row] for row in self.train_rows]
        numbers = [self.read.numbers[row] for row in self.train_rows]
        return Taught(hidden, numbers, self.turns, seen, self.folds)

    def left_out(self, start: Start, tell: Tell) -> list[float]:
        """Mean loss per turn on left-out folds: of the start, and after each epoch of training."""
        total, turns = np.zeros(TUNING.reading.epochs + 1), 0
        folds = self.folds.unique().tolist()[:TUNED_ON]
        for done, fold in enumerate(folds):
            tell("fitting the router", done, len(folds))
            out = (self.folds == fold).numpy()
            self.start(np.flatnonzero(~out).tolist(), start.recipe)
            sides = [sorted({self.rows[at] for at in np.flatnonzero(side)}) for side in (~out, out)]
            trainer = self._trainer(*sides)
            losses = [trainer.validation_loss()]
            losses += [loss for _, loss in trainer.once(self.seed, lambda text: None)]
            total, turns = total + out.sum() * np.array(losses), turns + out.sum()
        return (total / turns).tolist()

    def train(self, rows: Sequence[int], epochs: int) -> None:
        """Go on from the start for so many epochs of the schedule."""
        trainer = self._trainer(rows, rows)
        trainer.once(self.seed, lambda text: None, epochs)

    def _trainer(self, train: Sequence[int], validation: Sequence[int]) -> ReaderTrainer:
        size, policy = TUNING.reading.batch_size, self.policy
        taught, judged = (
            self.read.batches(rows, self.traces, size) for rows in (train, validation)
        )
        return ReaderTrainer(policy.reader, policy.actor.expert_bias, taught, judged, TUNING)


def plain_choices(
    mounted: Mounted,
    prompts: Sequence[Encoded],
    targets: Targets,
    train: Sequence[int],
    pad_id: int,
    batch_size: int,
    seed: int,
    tell: Tell,
) -> dict[tuple[str, str], NDArray[np.int64]]:
    """(name, what it reads) -> option of each turn of all rows (rows, turns), of each plain way to choose.

    Both are fitted to the turns of the training rows: on what the router reads, and on what enters the
    base's last block, which is known only after a forward pass of its own.
    """
    layer = mounted.router_config.router_layer
    assert layer is not None  # `mount` has filled it in
    last = len(find_sites(mounted.base).blocks) - 1
    rows, turns = (targets.best != UNKNOWN).nonzero()
    kept = np.isin(rows, train)
    rows, turns = rows[kept], turns[kept]
    best = torch.from_numpy(targets.best[rows, turns])
    options = best.unique()
    wanted = torch.from_numpy(targets.wanted[rows, turns])[:, options]
    right = (best[:, None] == options).float()
    folds = folds_of(rows.tolist(), best.tolist(), FOLDS, seed)
    found = {}
    for depth in sorted({layer, last}):
        tell(f"baselines on layer {depth}", 0, 0)
        features = turn_features(mounted.base, prompts, depth, pad_id, batch_size)
        seen = torch.stack([features[r][t] for r, t in zip(rows, turns, strict=True)])
        fitted = {
            "nearest centroid": fit_centroids(seen, right),
            "linear": best_linear(seen, wanted / wanted.sum(-1, keepdim=True), folds),
        }
        for name, classify in fitted.items():
            chosen = np.full(targets.best.shape, UNKNOWN)
            for i, of_row in enumerate(features):
                chosen[i, : len(of_row)] = options[classify(of_row)].numpy()
            found[name, f"layer {depth}"] = chosen
    return found
