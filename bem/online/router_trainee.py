"""A router that learns from scores which expert should answer: by policy gradient, and by cloning what was right.

    L = - mean min(p/m, 10) (score - b)  -  mean over right answers of log p          p = policy, m = what chose
    step    gradient descent with both penalties in closed form, then cut until KL to the last accepted
            policy and to the first one hold on a frozen probe set

One lesson is the decision at the beginning of the answered turn. Other experts are only ever learned about where
chance chose them (`explore`); m is then known exactly. The reader, and so what is observed, does not learn.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bem.adapters.copies import without_adapter
from bem.adapters.version import base_digest
from bem.config import OnlineConfig
from bem.errors import AttachError, CheckpointError, Diverged
from bem.online.adapter_trainee import check_near, lesson_of, row_of, shorten
from bem.online.kl_region import KlRegion
from bem.online.marks import Marks
from bem.online.penalties import OnlineEwc, Strength, exact_fisher, proximal_step, trainable
from bem.online.stream import FULL_MARKS, Turn
from bem.online.trainee import Answer, Lesson, Step, Weights
from bem.routing.distribution import HeadsDistribution
from bem.routing.mount import load_router
from bem.routing.mounted import Mounted
from bem.routing.policy import Actor, MacroPolicy
from bem.routing.router import Step as Decision
from bem.training.plain_policy import LINEAR

LARGEST_RATIO = 10.0
NEVER_CHOSEN, FLOOR = -20.0, -4.0
"""A logit that says that an option was never right in training, and what it becomes: low enough to change no
choice, high enough to be learned from."""


class RouterTrainee:
    """See the module's docstring. `mounted` is only copied: it may go on serving."""

    kind = "router"

    def __init__(self, mounted: Mounted, tokenizer: Any, marks: Marks, config: OnlineConfig):
        """
        Args:
            mounted: with a trained router.
            marks: judges answers, see `marks_by`.
        """
        self.marks, self.config = marks, config
        self._tokenizer = f"{type(tokenizer).__name__} {len(tokenizer)}"
        self._stage = mounted.shadow()
        self._stage.router.trained = True
        self._worth = _worth_of(self.policy)
        open_options(self.policy.actor)
        self.actor: Actor = copy.deepcopy(self.policy.actor).requires_grad_(True)
        self._region: KlRegion | None = None
        """Around the policy that learning began with, on the situations of its first step."""
        self._born = self.weights()
        self.start_from(self._born)

    @property
    def policy(self) -> MacroPolicy:
        """The stage's."""
        return self._stage.router.policy

    @property
    def born(self) -> Weights:
        return self._born

    def fingerprint(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "base": base_digest(self._stage.base),
            "experts": [expert.digest for expert in self._stage.experts],
            "rules": self._stage.router_config.model_dump(mode="json"),
            "tokenizer": self._tokenizer,
        }

    # --- answering --------------------------------------------------------------------------------

    def answers(
        self, weights: Weights, turns: Sequence[Turn], draws: np.random.Generator | None
    ) -> list[Answer]:
        self._put_on_stage(weights)
        return [self._answer(turn, draws) for turn in turns]

    def _answer(self, turn: Turn, draws: np.random.Generator | None) -> Answer:
        """One at a time: what was decided for a request stands alone on the tape."""
        forced = self._drawn_option(draws)
        router = self._stage.router

        def choose(distribution: HeadsDistribution) -> Tensor:
            action = distribution.mode()
            if forced is None:
                return action
            return router.space.full(torch.full_like(action[:, 0], forced))

        with router.watched(choose) as tape:
            score = self.marks(self._stage.model, [turn])[0]
        decided = [s for s in tape if bool(s.boundary.turn[0]) and bool(s.real[0])]
        lesson = None if score is None or not decided else self._lesson(turn, decided[-1], score)
        return Answer(score, lesson, explored=forced is not None)

    def _drawn_option(self, draws: np.random.Generator | None) -> int | None:
        """An expert that chance chooses; None: the router decides."""
        if draws is None or not self.config.explore or draws.random() >= self.config.explore:
            return None
        there = self._stage.router.available.nonzero()[:, 0].tolist()
        return int(there[int(draws.integers(len(there)))])

    def _lesson(self, turn: Turn, decision: Decision, score: float) -> Lesson:
        asked = lesson_of(replace(turn, row=_with_reference(turn))) or {}
        option = int(decision.action[0, 0])
        mode = int(decision.distribution.mode()[0, 0])
        return {
            **asked,
            "observed": [float(x) for x in decision.observation[0]],
            "option": option,
            "chance": chance_of(option, mode, int(self._stage.router.available.sum()), self.config.explore),
            "score": float(score),
        }  # fmt: skip

    def turn_of(self, lesson: Lesson, id: str) -> Turn:
        return Turn(row_of(lesson, id), id)

    def _put_on_stage(self, weights: Weights) -> None:
        if bad := [name for name, t in weights.items() if not torch.isfinite(t).all()]:
            raise Diverged(f"{bad[0]} of this version is not finite.")
        self.policy.actor.load_state_dict(dict(weights))
        if self._worth is not None:
            _let_critic_follow(self.policy, self._worth)

    # --- learning ---------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        return {name: t.detach().clone() for name, t in self.actor.state_dict().items()}

    def start_from(self, weights: Weights) -> None:
        self.actor.load_state_dict(dict(weights))
        self._accepted = {n: weights[n].clone() for n in trainable(self.actor)}
        self._ewc = OnlineEwc(Strength(self.config.ewc, "exact_heads"))
        self._baseline, self._seen = 0.0, 0
        if self._region is not None:
            self._region.accept(self.actor)

    def accept(self, weights: Weights, lessons: Sequence[Lesson]) -> None:
        self._accepted = {n: weights[n].clone() for n in self._accepted}
        accepted = copy.deepcopy(self.actor)
        accepted.load_state_dict(dict(weights))
        if self._region is not None:
            self._region.accept(accepted)
        if self.config.ewc and lessons:
            obs = _observed(lessons)
            fisher = exact_fisher(accepted, obs, self._masks(len(obs)))
            self._ewc.accept(self._accepted, fisher)

    def _masks(self, n: int) -> list[Tensor]:
        """What is loaded; the rules of a conversation are not the policy's to learn."""
        sizes = self._stage.router.space.sizes
        experts = self._stage.router.available.expand(n, -1)
        return [experts, *(torch.ones(n, size, dtype=torch.bool) for size in sizes[1:])]

    def learn(self, lessons: Sequence[Lesson]) -> Step:
        obs = _observed(lessons)
        if self._region is None:
            near, far = self.config.kl_near, self.config.kl_far
            self._region = KlRegion.around(self.actor, obs, self._masks(len(obs)), near, far)
        before = {n: p.detach().clone() for n, p in trainable(self.actor).items()}
        try:
            loss = self._loss(obs, lessons)
            named = trainable(self.actor)
            gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            filled = {
                n: torch.zeros_like(p) if g is None else g
                for (n, p), g in zip(named.items(), gradients, strict=True)
            }
            rate, pull = self.config.learning_rate, self.config.pull
            proximal_step(named, filled, rate, self._accepted, pull, self._ewc)
            shorten(named, before, self.config.largest_step)
            limited = self._region.limit(self.actor, before)
            length = shorten(named, before, self.config.largest_step)
            check_near(named, self._accepted, self.config.largest_distance)
        except Diverged as discarded:
            self._put_back(before)
            return Step(False, math.nan, 0.0, str(discarded))
        return Step(limited.accepted, float(loss.detach()), length, limited.reason)

    def _loss(self, obs: Tensor, lessons: Sequence[Lesson]) -> Tensor:
        option = torch.tensor([lesson["option"] for lesson in lessons])
        score = torch.tensor([lesson["score"] for lesson in lessons])
        chance = torch.tensor([lesson["chance"] for lesson in lessons])
        log_p = self.actor.distribution(obs, self._masks(len(obs))).log_probs[0]
        chosen = log_p.gather(1, option[:, None])[:, 0]
        self._seen += len(lessons)
        self._baseline += (float(score.sum()) - len(lessons) * self._baseline) / self._seen
        ratio = (chosen.exp() / chance).clamp(max=LARGEST_RATIO)
        gained = ratio * (score - self._baseline)
        right = (score >= FULL_MARKS).float()
        return -(gained + right * chosen).mean()

    @torch.no_grad()
    def _put_back(self, before: Weights) -> None:
        for name, p in trainable(self.actor).items():
            p.copy_(before[name])

    # --- versions and state -----------------------------------------------------------------------

    def digest(self, weights: Weights) -> str:
        self._put_on_stage(weights)
        return self._stage.version.digest

    def save(self, weights: Weights, folder: Path) -> None:
        self._put_on_stage(weights)
        self._stage.save(folder)

    def read(self, folder: Path) -> dict[str, Tensor]:
        found = load_router(without_adapter(self._stage), folder).router.policy.actor
        try:
            self._put_on_stage(found.state_dict())
        except (RuntimeError, AttachError) as other:
            raise CheckpointError(
                f"{folder} holds another router than the one that learns: {other}"
            ) from None
        return {name: t.detach().clone() for name, t in found.state_dict().items()}

    def state(self) -> dict[str, Any]:
        plain, tensors = self._ewc.state()
        return {
            "actor": self.weights(),
            "accepted": dict(self._accepted),
            "ewc": plain,
            "ewc_tensors": tensors,
            "region": {} if self._region is None else self._region.tensors(),
            "baseline": [self._baseline, self._seen],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.actor.load_state_dict(dict(state["actor"]))
        self._accepted = dict(state["accepted"])
        self._ewc = OnlineEwc.from_state(state["ewc"], state["ewc_tensors"])
        near, far = self.config.kl_near, self.config.kl_far
        kept = state["region"]
        self._region = KlRegion.from_tensors(kept, near, far) if kept else None
        self._baseline, self._seen = state["baseline"]


def chance_of(option: int, mode: int, options: int, explore: float) -> float:
    """With which an option was chosen: by the router, or by chance."""
    return explore / options + (1 - explore) * (option == mode)


@torch.no_grad()
def open_options(actor: Actor) -> list[int]:
    """Options that no training row wanted become possible to learn; which they were."""
    bias = actor.expert_bias.bias
    closed = (bias < NEVER_CHOSEN).nonzero()[:, 0].tolist()
    bias.clamp_(min=FLOOR) if closed else None
    return closed


def _worth_of(policy: MacroPolicy) -> float | None:
    """Nats per unit of a logit where the critic follows the actor (`plain_policy`); None: it does not."""
    bias, critic = policy.actor.expert_bias, policy.critic.net.out
    memory = bias.in_features
    if critic.in_features < memory:
        return None
    follows = critic.weight[1:, :memory].detach() * LINEAR
    worth = float(follows.norm() / bias.weight.norm().clamp(min=1e-12))
    is_plain = worth > 0 and torch.allclose(follows, worth * bias.weight, rtol=1e-3, atol=1e-5)
    return worth if is_plain else None


@torch.no_grad()
def _let_critic_follow(policy: MacroPolicy, worth: float) -> None:
    """Hysteresis compares values that move with the logits: it never contradicts what was learned."""
    bias, out = policy.actor.expert_bias, policy.critic.net.out
    out.weight[1:, : bias.in_features] = worth / LINEAR * bias.weight
    out.bias[1:] = worth * bias.bias


def _observed(lessons: Sequence[Lesson]) -> Tensor:
    return torch.tensor([lesson["observed"] for lesson in lessons])


def _with_reference(turn: Turn) -> Any:
    assert turn.row is not None
    return turn.row if turn.row.references else replace(turn.row, references=("",))
