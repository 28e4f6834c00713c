"""AR1: the router improves its policy on real generations, one trust-region step at a time.

    roll out episodes -> advantages (GAE) -> one TRPO step of the actor -> fit of the value

Every conversation is answered several times, and what the other answers to it got is taken from an
episode's last reward: some questions are hard whoever answers, and that is most of the variance. The
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

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bem.adapters.version import base_digest
from bem.config import PolicyGradientConfig
from bem.errors import TrainingError
from bem.files import sha256_json, write_text
from bem.routing.modes import mode
from bem.training.baseline import fit_value, leave_one_out, value_like
from bem.training.data import Encoded, Example, data_hash
from bem.training.environment import Environment, Rollout
from bem.training.gae import gae, span_rewards
from bem.training.state import (
    METRICS,
    STATE,
    check_same_run,
    check_same_start,
    disk,
    read_state,
    write_state,
)
from bem.training.trpo import Batch, PolicyStep, TRPOOptimizer
from bem.variants.digest import weights_digest

LABEL = "policy gradient"


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
        TrainingError: the folder belongs to another run, holds a damaged state or one that is further
            than `config.iterations`, or the disk is full.
        Diverged: advantages or values were not finite.
        Whatever is raised, the router is as the last finished iteration left it.
    """
    run = _Run(environment, examples, prompts, config, folder, seed)
    run.resume()
    with environment.mounted.training("router"):
        while len(run.done) < config.iterations:
            try:
                iteration = run.iterate()
            except BaseException:
                run.rewind()
                raise
            run.finish(iteration)
            if on_progress:
                on_progress(iteration)
    return run.done


class _Run:
    """What is saved, restored and advanced together."""

    def __init__(
        self,
        environment: Environment,
        examples: Sequence[Example],
        prompts: Sequence[Encoded],
        config: PolicyGradientConfig,
        folder: Path,
        seed: int,
    ):
        if not examples or len(examples) != len(prompts):
            raise TrainingError(
                f"{len(examples)} conversations and {len(prompts)} prompts: one prompt for each, and at least one."
            )
        self.environment, self.config = environment, config
        self.examples, self.prompts = examples, prompts
        self.folder, self.seed = folder, seed
        self.router = environment.mounted.router
        self.policy = self.router.policy
        self.value = value_like(self.router, seed)
        self.done: list[Iteration] = []
        self.start = weights_digest(self.policy.state_dict())
        self.fingerprint = self._fingerprint()
        self.optimizer = TRPOOptimizer(
            self.policy.actor,
            config.delta,
            config.damping,
            config.cg_iterations,
            config.backtracks,
        )
        self.finished = self._weights()

    def _fingerprint(self) -> dict[str, Any]:
        """Everything but the start that the weights depend on."""
        environment, router = self.environment, self.router
        tokens = [
            [p.input_ids, p.turn_starts, p.relevance, *([p.vision] if p.vision else [])]
            for p in self.prompts
        ]
        return {
            "policy_gradient": self.config.model_dump(mode="json", exclude={"iterations"}),
            "environment": {
                "reward": environment.reward.model_dump(mode="json"),
                "max_new_tokens": environment.max_new_tokens,
                "batch_size": environment.batch_size,
            },
            "seed": self.seed,
            "base": base_digest(environment.mounted.base),
            "experts": [expert.digest for expert in environment.mounted.experts],
            "rules": repr((router.rules, router.limits, router.available.tolist())),
            "data": data_hash(self.examples),
            "prompts": sha256_json(tokens),
        }

    # --- one iteration ----------------------------------------------------------------------------

    def iterate(self) -> Iteration:
        """Roll out, step, fit; what is drawn depends on (seed, iteration) alone."""
        started, number = time.perf_counter(), len(self.done)
        rng = np.random.default_rng([self.seed, number])
        samples = self.config.samples
        count = self.config.episodes // samples
        drawn = rng.choice(len(self.examples), count, len(self.examples) < count)
        rows = drawn.repeat(samples).tolist()
        device = self.environment.mounted.base.device
        draws = torch.Generator(device).manual_seed(int(rng.integers(1 << 62)))
        with mode(self.environment.mounted.model, training=False):
            rollout = self.environment.rollout(
                [self.examples[i] for i in rows], [self.prompts[i] for i in rows], draws
            )
            step, explained = self._learn(rollout, int(rng.integers(1 << 62)))
        return self._described(rollout, step, explained, time.perf_counter() - started)

    def _learn(self, rollout: Rollout, seed: int) -> tuple[PolicyStep, float]:
        """One step of the actor and a fit of the value; (the step, variance explained before it)."""
        config, like = self.config, rollout.log_probs
        nothing = np.zeros(len(rollout.durations))
        advantages = gae(
            _decision_rewards(rollout, config),
            self._values(rollout),
            rollout.durations,
            rollout.ends,
            nothing.astype(bool),
            nothing,
            config.gamma,
            config.lam,
        )
        step = self.optimizer.step(
            Batch(
                rollout.observations,
                rollout.masks,
                rollout.actions,
                rollout.log_probs,
                torch.from_numpy(advantages.advantages).to(like),
            )
        )
        fitted = fit_value(
            self.value,
            rollout.observations,
            torch.from_numpy(advantages.targets).to(like),
            config.value_epochs,
            64,
            config.value_rate,
            torch.Generator().manual_seed(seed),
        )
        return step, fitted.before

    @torch.no_grad()
    def _values(self, rollout: Rollout) -> NDArray[np.float64]:
        return self.value(rollout.observations).double().cpu().numpy()

    def _described(
        self, rollout: Rollout, step: PolicyStep, explained: float, seconds: float
    ) -> Iteration:
        use = rollout.expert_chunks / max(1, rollout.expert_chunks.sum())
        means = rollout.returns.reshape(-1, self.config.samples).mean(1)
        error = means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else float("nan")
        return Iteration(
            iteration=len(self.done) + 1,
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
            seconds=seconds,
        )

    # --- state ------------------------------------------------------------------------------------

    def finish(self, iteration: Iteration) -> None:
        """Count an iteration as done, in memory and on disk."""
        self.finished = self._weights()
        self.done.append(iteration)
        saved = f"The state after iteration {len(self.done) - 1} is whole. "
        with disk(LABEL, "the router's state", self.folder, saved):
            policy, value = self.finished
            write_state(
                self.folder / STATE,
                {
                    "fingerprint": json.dumps(self.fingerprint),
                    "start": self.start,
                    "policy": policy,
                    "value": value,
                    "done": json.dumps([asdict(i) for i in self.done]),
                },
            )
            self._write_metrics()

    def resume(self) -> None:
        """Go on where the folder's state ends, if it holds one."""
        path = self.folder / STATE
        if not path.is_file():
            return
        state = read_state(path, self.environment.mounted.base.device, LABEL)
        check_same_run(path, json.loads(state["fingerprint"]), self.fingerprint, LABEL)
        start, policy = state["start"], state["policy"]
        check_same_start(path, start, [policy], self.policy.state_dict(), LABEL)
        done = [Iteration(**i) for i in json.loads(state["done"])]
        if len(done) > self.config.iterations:
            raise TrainingError(
                f"{path} holds the weights after {len(done)} iterations, {self.config.iterations} are asked "
                f"for: they cannot be taken back. Ask for {len(done)}, or delete {self.folder} to begin anew."
            )
        self.start, self.done = start, done
        self.finished = policy, state["value"]
        self.rewind()
        with disk(LABEL, "the metrics", self.folder, ""):
            self._write_metrics()  # a kill may have come between state and metrics

    def rewind(self) -> None:
        """Back to the weights of the last finished iteration."""
        policy, value = self.finished
        self.policy.load_state_dict(policy)
        self.value.load_state_dict(value)

    def _weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(policy, value), copied."""
        policy, value = (
            {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
            for module in (self.policy, self.value)
        )
        return policy, value

    def _write_metrics(self) -> None:
        lines = "".join(json.dumps(asdict(i)) + "\n" for i in self.done)
        write_text(self.folder / METRICS, lines)


def _decision_rewards(rollout: Rollout, config: PolicyGradientConfig) -> NDArray[np.float64]:
    """Reward of each decision, discounted to it, less what other answers to the conversation got."""
    rewards = rollout.rewards.copy()
    rewards[rollout.last_chunks] -= leave_one_out(rollout.returns, config.samples)
    return span_rewards(rewards, rollout.durations, config.gamma)


def _alarm(
    use: NDArray[np.float64],
    step: PolicyStep,
    experts: Sequence[str],
    config: PolicyGradientConfig,
) -> str:
    """Why the policy seems to have collapsed, or ""."""
    most = int(np.argmax(use))
    if use[most] > config.collapse_share:
        name = experts[most - 1] if most else "base"
        return f"{name} governs {use[most]:.0%} of the chunks"
    if step.entropy < config.collapse_entropy:
        return f"mean entropy {step.entropy:.3f} nats: the policy no longer explores"
    return ""
