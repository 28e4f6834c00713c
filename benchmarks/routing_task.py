"""A routing task whose optimum is known: the environment, and dynamic programming over it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

Act = Callable[[np.ndarray], np.ndarray]  # observations (n, d) -> most likely actions (n, ...)


class Routing(gymnasium.Env):
    """A conversation of 32 chunks: choose expert, rank and strength for a topic that is hidden.

    With probability 0.12 a chunk begins a new turn with a new topic (uniform). A new turn shows a
    cue that names the topic with probability 0.6, else another; with probability 0.3 a later chunk
    makes the topic plain until the turn ends. Per chunk, with strength s:

        right expert: s if the rank suffices for the topic, else 0.4 s      wrong expert: -0.8 s^2
        minus 0.1 per rank level, minus 0.3 if the expert changes

    So the best expert follows the cue, the best rank depends on the topic, and the best strength on
    how sure one can be. What is seen (cue or topic, whether plain, last expert, progress) is a
    Markov process, and the expected reward depends on it alone: dynamic programming is exact. (The
    reward itself would tell more about the topic; neither learner's policy sees it.)
    """

    chunks, topics, turn, right, plain = 32, 4, 0.12, 0.6, 0.3
    strengths, needed_rank = np.array([0.5, 1.0, 1.5]), np.array([0, 1, 2, 2])

    def __init__(self):
        self.action_space = spaces.MultiDiscrete([self.topics, 3, 3])
        self.observation_space = spaces.Box(0.0, 1.0, (2 * self.topics + 2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.t, self.last = 0, self.topics  # no expert yet
        self._new_turn()
        return self._seen(), {}

    def step(self, action):
        reward = self.reward(self.topic, self.last, action)
        self.t, self.last = self.t + 1, int(action[0])
        if self.np_random.random() < self.turn:
            self._new_turn()
        elif not self.certain and self.np_random.random() < self.plain:
            self.cue, self.certain = self.topic, 1
        return self._seen(), reward, self.t == self.chunks, False, {}

    @classmethod
    def reward(cls, topic: int, last: int, action: Any) -> float:
        expert, rank, strength = action
        s = float(cls.strengths[strength])
        gain = -0.8 * s * s
        if expert == topic:
            gain = s if rank >= cls.needed_rank[topic] else 0.4 * s
        return gain - 0.1 * rank - 0.3 * (last not in (expert, cls.topics))

    @classmethod
    def observation(cls, t: int, cue: int, certain: int, last: int) -> np.ndarray:
        seen = np.zeros(2 * cls.topics + 2, np.float32)
        seen[cue], seen[cls.topics], seen[-1] = 1, certain, t / cls.chunks
        if last < cls.topics:
            seen[cls.topics + 1 + last] = 1
        return seen

    def _new_turn(self):
        self.topic = int(self.np_random.integers(self.topics))
        others = [k for k in range(self.topics) if k != self.topic]
        honest = self.np_random.random() < self.right
        self.cue = self.topic if honest else int(self.np_random.choice(others))
        self.certain = 0

    def _seen(self) -> np.ndarray:
        return self.observation(self.t, self.cue, self.certain, self.last)


class Exact:
    """Dynamic programming over what `Routing` shows: states (cue, certain, last expert), chunk t."""

    def __init__(self):
        n = Routing.topics
        self.actions = list(itertools.product(range(n), range(3), range(3)))
        wrong = (1 - Routing.right) / (n - 1)
        noisy = np.full((n, n), wrong) + (Routing.right - wrong) * np.eye(n)
        self.belief = np.stack([noisy, np.eye(n)], 1)  # P(topic | cue, certain)
        paid = [
            [[Routing.reward(k, last, a) for a in self.actions] for last in range(n + 1)]
            for k in range(n)
        ]
        self.reward = np.einsum("cik,kla->cila", self.belief, np.array(paid))
        grid = itertools.product(range(Routing.chunks), *map(range, (n, 2, n + 1)))
        self.observations = np.stack([Routing.observation(*state) for state in grid])

    def _future(self, after: np.ndarray) -> np.ndarray:
        """Expected value of the next state (cue, certain, action's expert) from V(t+1)."""
        fresh = after[:, 0].mean(0)  # a new turn: every cue alike
        told = np.einsum("cik,ke->cie", self.belief, after[:, 1])
        same = np.stack([(1 - Routing.plain) * after[:, 0], after[:, 1]], 1)
        same[:, 0] += Routing.plain * told[:, 0]
        future = Routing.turn * fresh + (1 - Routing.turn) * same
        return future[:, :, None, [a[0] for a in self.actions]]

    def solve(self, weights: np.ndarray | None = None) -> tuple[float, np.ndarray]:
        """Return of a policy, P(action | t, cue, certain, last); None: of the best one. And it."""
        value = np.zeros(self.reward.shape[:-1])
        choices = np.zeros((Routing.chunks, *self.reward.shape))
        for t in reversed(range(Routing.chunks)):
            q = self.reward + self._future(value)
            choices[t] = np.eye(len(self.actions))[q.argmax(-1)] if weights is None else weights[t]
            value = (choices[t] * q).sum(-1)
        return float(value[:, 0, -1].mean()), choices  # any cue, not certain, no expert yet

    def weights(self, act: Act) -> np.ndarray:
        """A deterministic policy as a table."""
        chosen = np.ravel_multi_index(act(self.observations).T, (Routing.topics, 3, 3))
        return np.eye(len(self.actions))[chosen].reshape(Routing.chunks, *self.reward.shape)

    def play(self, choices: np.ndarray, episodes: int) -> np.ndarray:
        """Returns of a table played in the real environment: a check of this class."""
        env, returns = Routing(), np.zeros(episodes)
        for i in range(episodes):
            env.reset(seed=1_000_000 + i)
            for t in range(Routing.chunks):
                best = choices[t, env.cue, env.certain, env.last].argmax()
                returns[i] += env.step(self.actions[best])[1]
        return returns
