"""Episodes of the router: conversations that the real model really answers.

One episode is one conversation. Its earlier turns are given; the router acts at every chunk boundary
of them, of the question and of the answer, which the model generates; the answer is scored.

    reward of a chunk = - flip_cost * (the expert changed) - rank_cost * (share of ranks)
    of the last chunk   + sum of weights * scores of the answer
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from bem.config import RewardConfig
from bem.routing.action import EXPERT, FLIPS, PLAN, RANK
from bem.routing.distribution import HeadsDistribution
from bem.routing.mounted import Mounted
from bem.routing.router import Step
from bem.training.answers import greedy_answers
from bem.training.data import Encoded, Example

Score = Callable[[Example, str], Mapping[str, float]]
"""(row, answer) -> quality, em, f1, validity in [0, 1], and tool where the row has one."""
SCORES = ("quality", "em", "f1", "validity", "tool")


@dataclass(frozen=True)
class Rollout:
    """Decisions of many episodes, episode after episode."""

    observations: Float[Tensor, "decisions width"]
    masks: tuple[Bool[Tensor, "decisions _"], ...]
    """Of each head."""
    actions: Int[Tensor, "decisions heads"]
    log_probs: Float[Tensor, " decisions"]
    durations: NDArray[np.int64]
    """Chunks that each decision governed (decisions,)."""
    ends: NDArray[np.bool_]
    """The last decision of its episode (decisions,)."""
    rewards: NDArray[np.float64]
    """Of every chunk (chunks,), not discounted."""
    returns: NDArray[np.float64]
    """(episodes,): sum of its rewards, not discounted."""
    scores: dict[str, float]
    """Mean of each score over the episodes."""
    expert_chunks: NDArray[np.int64]
    """Chunks under each expert option."""
    flip_rate: float
    """Changes of expert / (chunks - 1), over all episodes."""
    plan_length: float
    """Mean number of different actions in a turn."""
    longest_plan: int
    answers: list[str]

    @property
    def last_chunks(self) -> NDArray[np.int64]:
        """Number of the last chunk of each episode (episodes,)."""
        return np.cumsum(self.durations)[self.ends] - 1


@dataclass(frozen=True)
class Chunk:
    """One chunk of one episode: a row of what the router noted."""

    step: Step
    row: int

    @property
    def record(self) -> Tensor:
        """After its decision (RECORD,)."""
        return self.step.record[self.row]

    @property
    def begins_turn(self) -> bool:
        return bool(self.step.boundary.turn[self.row])

    @property
    def changed_expert(self) -> bool:
        return bool(self.record[FLIPS] > self.step.boundary.record[self.row, FLIPS])


@dataclass(frozen=True)
class Episode:
    """One conversation, answered."""

    chunks: list[Chunk]
    answer: str

    @property
    def decisions(self) -> list[int]:
        """Chunks at which something was decided; the others only went on."""
        held = [bool(c.step.allowed.hold[c.row]) for c in self.chunks]
        return [i for i, hold in enumerate(held) if i == 0 or not hold]

    @property
    def durations(self) -> list[int]:
        """Chunks that each decision governed."""
        return np.diff([*self.decisions, len(self.chunks)]).tolist()


class Environment:
    """Lets a mounted model answer conversations and pays its router for it."""

    def __init__(
        self,
        mounted: Mounted,
        tokenizer: Any,
        score: Score,
        reward: RewardConfig,
        max_new_tokens: int,
        batch_size: int,
    ):
        self.mounted, self.tokenizer, self.score = mounted, tokenizer, score
        self.reward, self.max_new_tokens, self.batch_size = reward, max_new_tokens, batch_size

    def rollout(
        self,
        examples: Sequence[Example],
        prompts: Sequence[Encoded],
        generator: torch.Generator,
        on_progress: Callable[[int], None] | None = None,
    ) -> Rollout:
        """Answer every conversation once with actions drawn from the policy.

        The tokens of an answer are the most likely ones; only the router's actions are drawn.

        Args:
            prompts: the conversations, encoded without their last answer.
            generator: draws the actions; same generator state, same rollout.
            on_progress: called with the episodes done.
        """
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        episodes: dict[int, Episode] = {}
        for at in range(0, len(order), self.batch_size):
            chosen = order[at : at + self.batch_size]
            answered = self._answer([prompts[i] for i in chosen], generator)
            episodes.update(zip(chosen, answered, strict=True))
            if on_progress:
                on_progress(len(episodes))
        return self._assembled(examples, [episodes[i] for i in range(len(examples))])

    def _answer(self, prompts: list[Encoded], generator: torch.Generator) -> Iterator[Episode]:
        def draw(distribution: HeadsDistribution) -> Tensor:
            return distribution.sample(generator)

        router = self.mounted.router
        with router.watched(draw) as tape:
            answers = greedy_answers(
                self.mounted.model, self.tokenizer, prompts, self.max_new_tokens
            )
        for row, ids in enumerate(answers):
            chunks = [Chunk(step, row) for step in tape if bool(step.real[row])]
            text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
            yield Episode(_until(chunks, len(ids), router.chunk_size), text)

    def _assembled(self, examples: Sequence[Example], episodes: Sequence[Episode]) -> Rollout:
        scored = [self.score(e, done.answer) for e, done in zip(examples, episodes, strict=True)]
        rewards = [self._rewards(*each) for each in zip(episodes, scored, strict=True)]
        deciding = [e.chunks[i] for e in episodes for i in e.decisions]
        durations = [e.durations for e in episodes]
        heads = range(len(deciding[0].step.allowed.masks))
        return Rollout(
            observations=torch.stack([c.step.observation[c.row] for c in deciding]),
            masks=tuple(
                torch.stack([c.step.allowed.masks[h][c.row] for c in deciding]) for h in heads
            ),
            actions=torch.stack([c.step.action[c.row] for c in deciding]),
            log_probs=_log_probs(deciding),
            durations=np.array([d for each in durations for d in each]),
            ends=np.array([i + 1 == len(each) for each in durations for i in range(len(each))]),
            rewards=np.concatenate(rewards),
            returns=np.array([each.sum() for each in rewards]),
            scores={k: float(np.mean([s[k] for s in scored if k in s])) for k in _names(scored)},
            expert_chunks=self._expert_chunks(episodes),
            **_flips_and_plans(episodes),
            answers=[e.answer for e in episodes],
        )

    def _rewards(self, episode: Episode, scores: Mapping[str, float]) -> NDArray[np.float64]:
        """Of every chunk of an episode."""
        costs = [
            self.reward.rank_cost * self._rank_share(c.record)
            + self.reward.flip_cost * c.changed_expert
            for c in episode.chunks
        ]
        rewards = -np.array(costs, dtype=np.float64)
        rewards[-1] += sum(getattr(self.reward, name) * scores.get(name, 0.0) for name in SCORES)
        return rewards

    def _rank_share(self, record: Tensor) -> float:
        """Share of all ranks that are in use; none for the bare base."""
        ranks = self.mounted.router.space.ranks
        return ranks[int(record[RANK])] / ranks[-1] if record[EXPERT] > 0 else 0.0

    def _expert_chunks(self, episodes: Sequence[Episode]) -> NDArray[np.int64]:
        options = [int(chunk.record[EXPERT]) for e in episodes for chunk in e.chunks]
        return np.bincount(options, minlength=self.mounted.router.space.sizes[0])


def _log_probs(deciding: Sequence[Chunk]) -> Tensor:
    """Of the executed actions; once per boundary of a batch, not once per row."""
    of_step: dict[int, Tensor] = {}
    for chunk in deciding:
        if id(chunk.step) not in of_step:
            step = chunk.step
            of_step[id(step)] = step.distribution.log_prob(step.action).detach()
    return torch.stack([of_step[id(c.step)][c.row] for c in deciding])


def _until(chunks: list[Chunk], answer: int, chunk_size: int) -> list[Chunk]:
    """Chunks that had a part in an answer of so many tokens: none that began behind its end.

    The answer's first chunk begins at the last token of the prompt, with the last turn.
    """
    begins = max(i for i, chunk in enumerate(chunks) if chunk.begins_turn)
    within = [i for i in range(len(chunks)) if (i - begins) * chunk_size <= answer]
    return [chunks[i] for i in within]


def _flips_and_plans(episodes: Sequence[Episode]) -> dict[str, Any]:
    """flip_rate, plan_length and longest_plan of a `Rollout`."""
    flips = sum(float(e.chunks[-1].record[FLIPS]) for e in episodes)
    plans: list[float] = []
    for episode in episodes:
        for chunk, after in zip(episode.chunks, [*episode.chunks[1:], None], strict=True):
            if after is None or after.begins_turn:
                plans.append(float(chunk.record[PLAN]))
    boundaries = sum(len(e.chunks) - 1 for e in episodes)
    return {
        "flip_rate": flips / max(1, boundaries),
        "plan_length": float(np.mean(plans)),
        "longest_plan": int(max(plans)),
    }


def _names(scored: Sequence[Mapping[str, float]]) -> list[str]:
    return sorted({name for scores in scored for name in scores})
