"""Episodes of the router: conversations that the real model really answers.

One episode is one conversation. Its earlier turns are given; the router acts at every chunk boundary
of them, of the question and of the answer, which the model generates; the answer is scored.

    reward of a decision = - flip_cost * (the expert changed) - rank_cost * (share of ranks) * chunks
    reward of the last   + sum of weights * scores of the answer
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bem.routing.action import EXPERT, FLIPS, PLAN, RANK
from bem.routing.router import Step
from bem.training.answers import greedy_answers
from bem.training.data import Encoded, Example

if TYPE_CHECKING:
    from bem.config import RewardConfig
    from bem.routing.distribution import HeadsDistribution
    from bem.routing.mounted import Mounted

Score = Callable[[Example, str], Mapping[str, float]]
"""(row, answer) -> quality, em, f1, validity in [0, 1], and tool where the row has one."""


@dataclass(frozen=True)
class Rollout:
    """Decisions of many episodes, episode after episode."""

    observations: Tensor  # (decisions, Observed.width)
    masks: tuple[Tensor, ...]  # bool (decisions, n_h) of each head
    actions: Tensor  # int (decisions, 4)
    log_probs: Tensor  # (decisions,)
    rewards: NDArray[np.float64]
    durations: NDArray[np.int64]  # chunks that each decision governed
    ends: NDArray[np.bool_]  # the last decision of its episode
    scores: dict[str, float]  # mean of each score over the episodes
    returns: NDArray[np.float64]  # (episodes,): sum of rewards
    expert_chunks: NDArray[np.int64]  # (experts + 1,): chunks under each option
    flip_rate: float
    """Changes of expert / (chunks - 1), over all episodes."""
    plan_length: float
    """Mean number of different actions in a turn."""
    longest_plan: int
    answers: list[str]


@dataclass(frozen=True)
class _Chunk:
    """One chunk of one episode."""

    step: Step
    row: int


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

        Args:
            prompts: the conversations, encoded without their last answer.
            generator: draws the actions; same generator state, same rollout.
            on_progress: called with the episodes done.
        """
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        episodes: dict[int, tuple[list[_Chunk], str]] = {}
        for at in range(0, len(order), self.batch_size):
            chosen = order[at : at + self.batch_size]
            found = self._answer([prompts[i] for i in chosen], generator)
            episodes.update(zip(chosen, found, strict=True))
            if on_progress:
                on_progress(len(episodes))
        return self._assembled(examples, [episodes[i] for i in range(len(examples))])

    def _answer(
        self, prompts: list[Encoded], generator: torch.Generator
    ) -> Iterator[tuple[list[_Chunk], str]]:
        def draw(distribution: HeadsDistribution) -> Tensor:
            return distribution.sample(generator)

        router = self.mounted.router
        with router.watched(draw) as tape:
            said = greedy_answers(self.mounted.model, self.tokenizer, prompts, self.max_new_tokens)
        for row, ids in enumerate(said):
            chunks = [_Chunk(step, row) for step in tape if bool(step.real[row])]
            answer = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
            yield _until(chunks, len(ids), router.chunk_size), answer

    def _assembled(
        self, examples: Sequence[Example], episodes: Sequence[tuple[list[_Chunk], str]]
    ) -> Rollout:
        parts: list[dict[str, Any]] = []
        scored = [self.score(e, a) for e, (_, a) in zip(examples, episodes, strict=True)]
        for (chunks, _), scores in zip(episodes, scored, strict=True):
            mine = self._decisions(chunks)
            mine[-1]["reward"] += self._worth(scores)
            mine[-1]["end"] = True
            parts.append({"decisions": mine, "return": sum(d["reward"] for d in mine)})
        decisions = [d for part in parts for d in part["decisions"]]
        stacked = {k: torch.stack([d[k] for d in decisions]) for k in ("obs", "action")}
        log_probs = torch.stack([d["log_prob"] for d in decisions])
        everything = [c for chunks, _ in episodes for c in chunks]
        heads = range(len(decisions[0]["masks"]))
        return Rollout(
            stacked["obs"],
            tuple(torch.stack([d["masks"][h] for d in decisions]) for h in heads),
            stacked["action"],
            log_probs,
            np.array([d["reward"] for d in decisions]),
            np.array([d["duration"] for d in decisions]),
            np.array([d.get("end", False) for d in decisions]),
            {k: float(np.mean([s[k] for s in scored if k in s])) for k in _names(scored)},
            np.array([part["return"] for part in parts]),
            self._use(everything),
            *_flips_and_plans([chunks for chunks, _ in episodes]),
            [answer for _, answer in episodes],
        )

    def _decisions(self, chunks: list[_Chunk]) -> list[dict[str, Any]]:
        """One entry per decision: chunks that only go on lengthen the decision before."""
        found: list[dict[str, Any]] = []
        for chunk in chunks:
            step, row = chunk.step, chunk.row
            cost = -self.reward.rank_cost * self._ranks(step.record[row])
            if found and bool(step.allowed.hold[row]):
                found[-1]["reward"] += cost
                found[-1]["duration"] += 1
                continue
            changed = step.record[row, FLIPS] > step.boundary.record[row, FLIPS]
            found.append(
                {
                    "obs": step.observation[row],
                    "masks": [mask[row] for mask in step.allowed.masks],
                    "action": step.action[row],
                    "log_prob": step.distribution.log_prob(step.action)[row].detach(),
                    "reward": cost - self.reward.flip_cost * float(changed),
                    "duration": 1,
                }
            )
        return found

    def _ranks(self, record: Tensor) -> float:
        """Share of all ranks that are in use; none for the bare base."""
        ranks = self.mounted.router.space.ranks
        return ranks[int(record[RANK])] / ranks[-1] if record[EXPERT] > 0 else 0.0

    def _worth(self, scores: Mapping[str, float]) -> float:
        names = ("quality", "em", "f1", "validity", "tool")
        return sum(getattr(self.reward, name) * scores.get(name, 0.0) for name in names)

    def _use(self, chunks: list[_Chunk]) -> NDArray[np.int64]:
        experts = [int(c.step.record[c.row, EXPERT]) for c in chunks]
        return np.bincount(experts, minlength=self.mounted.router.space.sizes[0])


def _until(chunks: list[_Chunk], answer: int, chunk_size: int) -> list[_Chunk]:
    """Chunks that had a part in the answer: none that began behind its end.

    The answer's first chunk begins at the last token of the prompt, with the last turn.
    """
    begins = max(i for i, c in enumerate(chunks) if bool(c.step.boundary.turn[c.row]))
    within = [i for i in range(len(chunks)) if (i - begins) * chunk_size <= answer]
    return [chunks[i] for i in within]


def _flips_and_plans(episodes: list[list[_Chunk]]) -> tuple[float, float, int]:
    """(flip rate, mean and largest number of different actions in a turn)."""
    flips = sum(float(chunks[-1].step.record[chunks[-1].row, FLIPS]) for chunks in episodes)
    plans: list[float] = []
    for chunks in episodes:
        for here, after in zip(chunks, [*chunks[1:], None], strict=True):
            if after is None or bool(after.step.boundary.turn[after.row]):
                plans.append(float(here.step.record[here.row, PLAN]))
    boundaries = sum(len(chunks) - 1 for chunks in episodes)
    return flips / max(1, boundaries), float(np.mean(plans)), int(max(plans))


def _names(scored: Sequence[Mapping[str, float]]) -> list[str]:
    return sorted({name for scores in scored for name in scores})
