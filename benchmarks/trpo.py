"""Our TRPO against sb3-contrib's, in one run: CartPole-v1 and a routing task with a known optimum.

    python benchmarks/trpo.py                        # writes benchmarks/results/trpo.md
    python benchmarks/trpo.py --seeds 2 --steps 4096 --task routing --out /tmp/trpo.md

Both: 64 x 64 tanh networks for policy and critic, orthogonal weights (gains sqrt 2; last layer 0.01
for the policy, 1 for the critic), delta 0.01, damping 0.1, gamma 0.99, lambda 0.95; critic: 10 epochs
of Adam at 1e-3 in minibatches of 128. One environment, one thread. Seed by seed the two take turns.
Training time is counted, evaluation is not.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import scipy.stats  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from bem.errors import MissingExtra  # noqa: E402
from bem.routing.distribution import HeadsDistribution  # noqa: E402
from bem.training.baseline import fit_value  # noqa: E402
from bem.training.gae import gae  # noqa: E402
from bem.training.trpo import Batch, PolicyStep, TRPOOptimizer  # noqa: E402

try:
    import gymnasium
    import sb3_contrib
    from gymnasium import spaces
except ImportError as error:
    raise SystemExit(
        str(MissingExtra("sb3-contrib and gymnasium", "benchmarks", "benchmarks/trpo.py"))
    ) from error
from routing_task import Act, Exact, Routing  # noqa: E402

DELTA, DAMPING, GAMMA, LAMBDA = 0.01, 0.1, 0.99, 0.95
EPOCHS, MINIBATCH, LEARNING_RATE = 10, 128, 1e-3  # of the critic


# ---- The two learners ----------------------------------------------------------------------------


class Learner(Protocol):
    """Trains in instalments."""

    @property
    def kls(self) -> list[float]: ...  # of accepted steps
    @property
    def updates(self) -> int: ...
    def learn(self, steps: int) -> None: ...
    def act(self, observations: np.ndarray) -> np.ndarray: ...


def mlp(inputs: int, outputs: int, last_gain: float) -> nn.Sequential:
    layers = [nn.Linear(inputs, 64), nn.Linear(64, 64), nn.Linear(64, outputs)]
    for layer, gain in zip(layers, (math.sqrt(2), math.sqrt(2), last_gain), strict=True):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


class HeadsPolicy(nn.Module):
    """One network, one head per component of the action."""

    def __init__(self, inputs: int, sizes: Sequence[int]):
        super().__init__()
        self.net, self.sizes = mlp(inputs, sum(sizes), 0.01), list(sizes)

    def distribution(self, obs: Tensor, masks: Sequence[Tensor]) -> HeadsDistribution:
        return HeadsDistribution(self.net(obs).split(self.sizes, -1), masks)

    def masks(self, rows: int) -> tuple[Tensor, ...]:
        return tuple(torch.ones(rows, n, dtype=torch.bool) for n in self.sizes)


class Value(nn.Module):
    def __init__(self, inputs: int):
        super().__init__()
        self.net = mlp(inputs, 1, 1.0)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs)[:, 0]


class Ours:
    """bem.training.trpo with bem.training.gae on one gymnasium environment."""

    def __init__(self, env: Any, seed: int, batch: int):
        torch.manual_seed(seed)
        inputs = env.observation_space.shape[0]
        self.single = isinstance(env.action_space, spaces.Discrete)
        sizes = [env.action_space.n] if self.single else env.action_space.nvec.tolist()
        self.env, self.policy, self.value = env, HeadsPolicy(inputs, sizes), Value(inputs)
        self.optimizer = TRPOOptimizer(self.policy, DELTA, DAMPING)
        self.generator = torch.Generator().manual_seed(seed)
        self.results: list[PolicyStep] = []
        self.batch = batch
        self.obs = env.reset(seed=seed)[0]

    @property
    def kls(self) -> list[float]:
        return [r.kl for r in self.results if r.accepted]

    @property
    def updates(self) -> int:
        return len(self.results)

    def learn(self, steps: int) -> None:
        for _ in range(steps // self.batch):
            batch, targets = self._rollout()
            self.results.append(self.optimizer.step(batch))
            fit = (EPOCHS, MINIBATCH, LEARNING_RATE, self.generator)
            fit_value(self.value, batch.obs, targets, *fit)

    @torch.no_grad()
    def act(self, observations: np.ndarray) -> np.ndarray:
        obs = torch.as_tensor(observations, dtype=torch.float32)
        chosen = self.policy.distribution(obs, self.policy.masks(len(obs))).mode().numpy()
        return chosen[:, 0] if self.single else chosen

    @torch.no_grad()
    def _rollout(self) -> tuple[Batch, Tensor]:
        seen, actions, log_probs, rewards, ended, cut, after = [], [], [], [], [], [], []
        masks = self.policy.masks(1)
        for step in range(self.batch):
            obs = torch.as_tensor(self.obs, dtype=torch.float32)[None]
            drawn = self.policy.distribution(obs, masks)
            action = drawn.sample(self.generator)
            chosen = int(action[0, 0]) if self.single else action[0].numpy()
            self.obs, reward, terminated, truncated, _ = self.env.step(chosen)
            full = step == self.batch - 1  # cut here, though the episode goes on
            seen.append(obs)
            actions.append(action)
            log_probs.append(drawn.log_prob(action))
            rewards.append(float(reward))
            ended.append(terminated)
            cut.append(truncated or full)
            after.append(torch.as_tensor(self.obs, dtype=torch.float32)[None])
            if terminated or truncated:
                self.obs = self.env.reset()[0]
        obs = torch.cat(seen)
        values, bootstrap = self.value(obs).numpy(), self.value(torch.cat(after)).numpy()
        spans = np.ones(self.batch)
        found = gae(rewards, values, spans, ended, cut, bootstrap, GAMMA, LAMBDA)
        advantages, targets = (
            torch.as_tensor(x, dtype=torch.float32) for x in (found.advantages, found.targets)
        )
        every = (torch.cat(actions), torch.cat(log_probs), advantages)
        return Batch(obs, self.policy.masks(self.batch), *every), targets


class Contrib:
    """sb3_contrib.TRPO with its defaults, which are the numbers above (and 15 CG iterations)."""

    def __init__(self, env: Any, seed: int, batch: int):
        shared = dict(n_steps=batch, gamma=GAMMA, gae_lambda=LAMBDA, cg_damping=DAMPING)
        critic = dict(learning_rate=LEARNING_RATE, batch_size=MINIBATCH, n_critic_updates=EPOCHS)
        self.model = sb3_contrib.TRPO(
            "MlpPolicy", env, target_kl=DELTA, seed=seed, device="cpu", **shared, **critic
        )
        self.kls, self.updates, self.started = [], 0, False
        inner = self.model.train

        def train():
            inner()
            logged = self.model.logger.name_to_value
            self.updates += 1
            if logged["train/is_line_search_success"] == 1:
                self.kls.append(float(logged["train/kl_divergence_loss"]))

        self.model.train = train

    def learn(self, steps: int) -> None:
        self.model.learn(steps, reset_num_timesteps=not self.started)
        self.started = True

    def act(self, observations: np.ndarray) -> np.ndarray:
        return self.model.predict(observations, deterministic=True)[0]


# ---- Measuring -----------------------------------------------------------------------------------


def cartpole_return(act: Act, episodes: int = 20) -> float:
    """Mean return of the most likely actions, over the same starts for everybody."""
    envs = [gymnasium.make("CartPole-v1") for _ in range(episodes)]
    obs = np.stack([env.reset(seed=10_000 + i)[0] for i, env in enumerate(envs)])
    running, total = np.ones(episodes, bool), np.zeros(episodes)
    while running.any():
        actions = act(obs)
        for i in np.flatnonzero(running):
            obs[i], reward, terminated, truncated, _ = envs[i].step(int(actions[i]))
            total[i] += float(reward)
            running[i] = not (terminated or truncated)
    return float(total.mean())


@dataclass
class Task:
    name: str
    make: Callable[[], Any]
    score: Callable[[Act], float]
    note: str
    steps: int
    batch: int  # steps per update


@dataclass
class Run:
    """One implementation with one seed."""

    half: float
    end: float
    largest_kl: float
    above: int
    accepted: int
    updates: int
    cpu: float
    wall: float


LEARNERS: dict[str, Callable[[Any, int, int], Learner]] = {"bem": Ours, "sb3-contrib": Contrib}


def tasks() -> dict[str, Task]:
    exact = Exact()
    best, choices = exact.solve()
    even = np.full((Routing.chunks, *exact.reward.shape), 1 / len(exact.actions))
    played = exact.play(choices, 2000)
    note = (
        f"Optimum {best:.3f} by dynamic programming (played in 2,000 real episodes: "
        f"{played.mean():.3f} ± {1.96 * played.std(ddof=1) / math.sqrt(2000):.3f}); "
        f"a uniformly random policy gets {exact.solve(even)[0]:.3f}. Returns are exact expectations "
        "of the most likely actions, by the same dynamic programming, so evaluation adds no noise."
    )
    return {
        "cartpole": Task(
            "CartPole-v1",
            lambda: gymnasium.make("CartPole-v1"),
            cartpole_return,
            "Returns: most likely actions, mean of 20 episodes from the same starts; at most 500.",
            20_480,
            2048,
        ),
        "routing": Task(
            "Routing (expert x rank x strength)",
            Routing,
            lambda act: exact.solve(exact.weights(act))[0],
            note,
            40_960,
            1024,
        ),
    }


def measure(task: Task, make: Callable[[Any, int, int], Learner], seed: int, steps: int) -> Run:
    learner, scores, cpu, wall = make(task.make(), seed, task.batch), [], 0.0, 0.0
    first = steps // 2 // task.batch * task.batch
    for instalment in (first, steps - first):
        clocks = time.process_time(), time.perf_counter()
        learner.learn(instalment)
        cpu, wall = cpu + time.process_time() - clocks[0], wall + time.perf_counter() - clocks[1]
        scores.append(task.score(learner.act))
    kls = learner.kls
    above = sum(kl > DELTA for kl in kls)
    largest = max(kls, default=math.nan)
    return Run(scores[0], scores[1], largest, above, len(kls), learner.updates, cpu, wall)


def interval(values: Sequence[float], digits: int = 1) -> str:
    """Mean and its 95 % Student interval over seeds."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return f"{mean:.{digits}f}"
    reach = scipy.stats.t.ppf(0.975, n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return f"{mean:.{digits}f} [{mean - reach:.{digits}f}, {mean + reach:.{digits}f}]"


class Section:
    """One task's runs, and their table."""

    def __init__(self, task: Task, steps: int | None):
        self.task, self.steps = task, steps or task.steps
        if self.steps < 2 * task.batch or self.steps % task.batch:
            raise SystemExit(
                f"--steps {self.steps}: {task.name} updates every {task.batch} steps; give a "
                f"multiple of that, at least {2 * task.batch}."
            )
        self.runs: dict[str, list[Run]] = {name: [] for name in LEARNERS}

    def text(self) -> str:
        digits = 1 if self.task.name.startswith("CartPole") else 2
        lines = [
            f"## {self.task.name}, {self.steps:,} steps, {self.task.batch:,} per update",
            "",
            self.task.note,
            "",
            "| | return at half | return at end | end, per seed | largest accepted KL | above delta "
            "| accepted | CPU s | wall s |",
            "|---|---:|---:|---|---:|---:|---:|---:|---:|",
            *(self._row(name, digits) for name in self.runs),
            "",
            self._difference(digits),
            "",
        ]
        return "\n".join(lines)

    def _row(self, name: str, digits: int) -> str:
        runs = self.runs[name]
        cells = [
            name,
            interval([r.half for r in runs], digits),
            interval([r.end for r in runs], digits),
            " ".join(f"{r.end:.{digits}f}" for r in runs),
            f"{max(r.largest_kl for r in runs):.5f}",
            str(sum(r.above for r in runs)),
            f"{sum(r.accepted for r in runs)} of {sum(r.updates for r in runs)}",
            interval([r.cpu for r in runs]),
            interval([r.wall for r in runs]),
        ]
        return "| " + " | ".join(cells) + " |"

    def _difference(self, digits: int) -> str:
        pairs = list(zip(self.runs["bem"], self.runs["sb3-contrib"], strict=True))
        half, end, cpu = (
            interval([getattr(a, x) - getattr(b, x) for a, b in pairs], d)
            for x, d in (("half", digits), ("end", digits), ("cpu", 1))
        )
        return f"bem minus sb3-contrib, seed by seed: at half {half}, at end {end}, CPU s {cpu}."


PREFACE = """# TRPO: ours and sb3-contrib's

`{command}`; sb3-contrib {contrib}, torch {torch}, {machine}, one thread, one process, the two taking
turns seed by seed. Both: 64 x 64 tanh, delta 0.01, damping 0.1, gamma 0.99, lambda 0.95, critic 10
epochs. Mean and 95 % Student interval over seeds. KL: ours is KL(old || new), theirs KL(new || old),
each as its own line search measured it. Time is that of training; CPU seconds are the headline on a
shared machine.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="environment steps per run; each task's own")
    parser.add_argument("--task", choices=["cartpole", "routing"], action="append")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "trpo.md")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    torch.set_num_threads(1)
    known = tasks()
    sections = [Section(known[name], options.steps) for name in options.task or known]
    for make in LEARNERS.values():
        make(gymnasium.make("CartPole-v1"), 0, 256).learn(256)  # imports and caches, not timed
    for section in sections:
        for seed, name in itertools.product(range(options.seeds), LEARNERS):
            run = measure(section.task, LEARNERS[name], seed, section.steps)
            section.runs[name].append(run)
            print(f"{section.task.name}, seed {seed}, {name}: {run}", flush=True)
    about = dict(contrib=sb3_contrib.__version__, torch=torch.__version__)
    about.update(machine=platform.processor() or platform.machine())
    about.update(command=" ".join(["python benchmarks/trpo.py", *sys.argv[1:]]))
    text = PREFACE.format(**about) + "\n".join(section.text() for section in sections)
    options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
