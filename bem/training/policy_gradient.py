"""AR1: the router improves its policy on real generations, one trust-region step at a time.

    roll out episodes -> advantages (GAE) -> one TRPO step of the actor -> fit of the value

Every conversation is answered several times, and what the other answers to it got is taken from an
episode's last reward: some questions are hard whoever speaks, and that is most of the variance. The
others' draws do not depend on this episode's, so the gradient stays unbiased (leave-one-out baseline,
arXiv:1906.08312 for sequences).
The value that advantages are measured against is a network of its own, which serving does not need.
The critic inside the router stays as cloning left it: its value is part of what the actor sees and
its Q is what hysteresis compares, and neither the state nor the rules may move under a policy whose
steps are bounded. A step that fails leaves the weights as they were and
says so. Everything that an iteration draws comes from (seed, iteration), so that a resumed run gives
the same bits.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bem.errors import TrainingError
from bem.routing.policy import Net
from bem.routing.router import AgenticRouter
from bem.training.data import Encoded, Example
from bem.training.environment import Environment, Rollout
from bem.training.fit import write_atomically
from bem.training.gae import gae
from bem.training.trpo import Batch, StepResult, TRPOOptimizer, fit_value

if TYPE_CHECKING:
    from bem.config import PolicyGradientConfig

STATE, METRICS = "state.pt", "metrics.jsonl"


@dataclass(frozen=True)
class Iteration:
    """What one iteration did."""

    iteration: int
    """From 1."""
    reward: float
    """Mean return of the episodes."""
    reward_se: float
    """Its standard error; answers to one conversation count as one."""
    scores: dict[str, float]
    accepted: bool
    kl: float
    surrogate: float
    entropy: float
    """Mean over decisions, nats, after the step."""
    reason: str
    """Why the step was refused; "" if it was not."""
    explained_variance: float
    """Of the returns, less what other answers got, by the value before it was fitted to them."""
    flip_rate: float
    plan_length: float
    longest_plan: int
    expert_use: list[float]
    """Share of the chunks under each option; 0 is the base."""
    alarm: str
    """Why the policy seems to have collapsed; "" if it has not."""
    episodes: int
    seconds: float


def improve(
    environment: Environment,
    examples: Sequence[Example],
    prompts: Sequence[Encoded],
    config: PolicyGradientConfig,
    folder: Path,
    seed: int,
    on_progress: Callable[[Iteration], None] | None = None,
) -> list[Iteration]:
    """Train the mounted router; resumable from `folder` with the same bits.

    Args:
        examples, prompts: the conversations to draw episodes from, and their encodings without the
            last answer.
        folder: gets state.pt and metrics.jsonl.
        on_progress: called after every iteration.
    Raises:
        TrainingError: the folder belongs to a run with other settings.
        KeyboardInterrupt: passed on; the last finished iteration is kept.
    """
    run = _Run(environment, config, folder, seed)
    run.restore()
    with environment.mounted.training("router"):
        while len(run.done) < config.iterations:
            found = run.iterate(examples, prompts)
            run.done.append(found)
            run.save()
            if on_progress:
                on_progress(found)
    return run.done


class _Run:
    """What is saved, restored and advanced together."""

    def __init__(
        self, environment: Environment, config: PolicyGradientConfig, folder: Path, seed: int
    ):
        self.environment, self.config, self.folder, self.seed = environment, config, folder, seed
        self.router = environment.mounted.router
        self.policy = self.router.policy
        self.value = _value_like(self.router, seed)
        self.done: list[Iteration] = []
        settings = config.model_dump(mode="json", exclude={"iterations"})
        self.fingerprint = json.dumps([settings, seed, list(self.router.space.sizes)])
        self.optimizer = TRPOOptimizer(
            self.policy.actor,
            config.delta,
            config.damping,
            config.cg_iterations,
            config.backtracks,
        )

    def iterate(self, examples: Sequence[Example], prompts: Sequence[Encoded]) -> Iteration:
        started, number = time.perf_counter(), len(self.done)
        rng = np.random.default_rng([self.seed, number])
        samples = self.config.samples
        count = self.config.episodes // samples
        drawn = rng.choice(len(examples), count, len(examples) < count)
        rows = drawn.repeat(samples).tolist()
        device = self.environment.mounted.base.device
        draws = torch.Generator(device).manual_seed(int(rng.integers(1 << 62)))
        self.environment.mounted.model.eval()
        rollout = self.environment.rollout(
            [examples[i] for i in rows], [prompts[i] for i in rows], draws
        )
        step, explained = self._learn(rollout, int(rng.integers(1 << 62)))
        use = rollout.expert_chunks / max(1, rollout.expert_chunks.sum())
        means = rollout.returns.reshape(-1, samples).mean(1)
        error = means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else float("nan")
        return Iteration(
            iteration=number + 1,
            reward=float(rollout.returns.mean()),
            reward_se=float(error),
            scores=rollout.scores,
            accepted=step.accepted,
            kl=step.kl,
            surrogate=step.surrogate,
            entropy=step.entropy,
            reason=step.reason,
            explained_variance=explained,
            flip_rate=rollout.flip_rate,
            plan_length=rollout.plan_length,
            longest_plan=rollout.longest_plan,
            expert_use=[round(float(u), 4) for u in use],
            alarm=_alarm(use, step, self.router.space.experts, self.config),
            episodes=len(rollout.returns),
            seconds=time.perf_counter() - started,
        )

    def _learn(self, rollout: Rollout, seed: int) -> tuple[StepResult, float]:
        none = np.zeros(len(rollout.rewards))
        rewards = rollout.rewards.copy()
        rewards[rollout.ends] -= leave_one_out(rollout.returns, self.config.samples)
        found = gae(
            rewards,
            self._values(rollout),
            rollout.durations,
            rollout.ends,
            none.astype(bool),
            none,
            self.config.gamma,
            self.config.lam,
        )
        like = rollout.log_probs
        step = self.optimizer.step(
            Batch(
                rollout.observations,
                rollout.masks,
                rollout.actions,
                rollout.log_probs,
                torch.from_numpy(found.advantages).to(like),
            )
        )
        seen, targets = rollout.observations, torch.from_numpy(found.targets).to(like)
        fitted = fit_value(
            self.value,
            seen,
            targets,
            self.config.value_epochs,
            64,
            self.config.value_rate,
            torch.Generator().manual_seed(seed),
        )
        return step, fitted.before

    @torch.no_grad()
    def _values(self, rollout: Rollout) -> Any:
        return self.value(rollout.observations).double().cpu().numpy()

    def save(self) -> None:
        state = {
            "fingerprint": self.fingerprint,
            "policy": {k: v.detach().cpu() for k, v in self.policy.state_dict().items()},
            "value": {k: v.detach().cpu() for k, v in self.value.state_dict().items()},
            "done": json.dumps([asdict(i) for i in self.done]),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        lines = "".join(json.dumps(asdict(i)) + "\n" for i in self.done)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / STATE, buffer.getbuffer())
            write_atomically(self.folder / METRICS, lines.encode())
        except OSError as error:
            raise TrainingError(
                f"the router's state could not be written to {self.folder}: {error}. Free some space and "
                "start again: it goes on from the last finished iteration."
            ) from error

    def restore(self) -> None:
        path = self.folder / STATE
        if not path.is_file():
            return
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if state["fingerprint"] != self.fingerprint:
            raise TrainingError(
                f"{path} belongs to a run with other settings. Set them back, or delete {self.folder}."
            )
        self.policy.load_state_dict(state["policy"])
        self.value.load_state_dict(state["value"])
        self.done = [Iteration(**i) for i in json.loads(state["done"])][: self.config.iterations]


def leave_one_out(returns: NDArray[np.float64], samples: int) -> NDArray[np.float64]:
    """What the other episodes of the same conversation returned on average (episodes,); 0 if there are none.

    Args:
        returns: (episodes,), `samples` in a row of each conversation.
    """
    if samples == 1:
        return np.zeros_like(returns)
    groups = returns.reshape(-1, samples)
    return ((groups.sum(1, keepdims=True) - groups) / (samples - 1)).reshape(-1)


def _alarm(use: Any, step: StepResult, experts: Sequence[str], config: PolicyGradientConfig) -> str:
    """Why the policy seems to have collapsed, or ""."""
    most = int(np.argmax(use))
    if use[most] > config.collapse_share:
        name = experts[most - 1] if most else "base"
        return f"{name} governs {use[most]:.0%} of the chunks"
    if step.entropy < config.collapse_entropy:
        return f"mean entropy {step.entropy:.3f} nats: the policy no longer explores"
    return ""


class _Value(nn.Module):
    """Value of an observation, (n, width) -> (n,); starts near zero."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.net = Net(width, 0, hidden, 1, 0.01)

    def forward(self, observation: Tensor) -> Tensor:
        return self.net(observation)[:, 0]


def _value_like(router: AgenticRouter, seed: int) -> _Value:
    """A value network of the actor's size: the critic stays as it is, hysteresis rests on it."""
    read = router.policy.actor.net.read
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _Value(router.observed.width, read.out_features).to(read.weight.device)
