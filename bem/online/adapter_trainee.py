"""An adapter (static, gated, masked, ... with its controller) that learns from corrected answers.

step      AdamW on the likelihood of right answers (`Trainer`), then both penalties in closed form:
          w+ = argmin |w - w'|^2 / 2 rate + (ewc/2) |w - anchor|^2_F + (pull/2) |w - accepted|^2
bounds    the whole step is cut to a share of the weights' norm; one that leaves the ball around the
          last accepted version, or is not finite, is discarded
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bem.adapters.attach import load
from bem.adapters.attached import Attached
from bem.adapters.copies import shadow, without_adapter
from bem.adapters.version import base_digest
from bem.config import OnlineConfig, TrainingConfig
from bem.errors import AttachError, CheckpointError, DataError, Diverged
from bem.online.marks import Marks
from bem.online.penalties import Fisher, OnlineEwc, Strength, proximal_step, sampled_fisher
from bem.online.stream import Turn
from bem.online.trainee import Answer, Lesson, Step, Weights
from bem.routing.modes import mode, seeded
from bem.training.data import IGNORED, collate, encode
from bem.training.example import Example
from bem.training.losses import answer_logits, answer_targets
from bem.training.trainer import Trainer

TAUGHT = ("input", "instruction", "evidence", "history", "relevance", "system", "vision")
"""Fields of an example that a lesson holds, beside the right answer."""
FISHER_ROWS = 16
ENDLESS = 1_000_000_000
"""Steps of a schedule that never ends: its rate is constant."""


class AdapterTrainee:
    """See the module's docstring. `attached` is only copied: it may go on serving."""

    kind = "adapter"

    def __init__(self, attached: Attached, tokenizer: Any, marks: Marks, config: OnlineConfig):
        """
        Args:
            attached: the adapter with which learning begins; freshly attached it stands for the bare base.
            marks: judges answers, see `marks_by`.
        """
        self.tokenizer, self.marks, self.config = tokenizer, marks, config
        self._stage, self._shadow = shadow(attached), shadow(attached)
        self._stage.model.eval()
        for parameter in self._shadow.parameters():
            parameter.requires_grad = True
        self._born = _copied(attached.state_dict())
        self._training = TrainingConfig(
            steps=ENDLESS,
            warmup=0.0,
            learning_rate=config.learning_rate,
            batch_size=config.batch_size,
            max_length=config.max_length,
        )
        self.start_from(self._born)

    @property
    def born(self) -> Weights:
        return self._born

    def fingerprint(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "base": base_digest(self._stage.base),
            "adapter": self._stage.config.model_dump(mode="json"),
            "tokenizer": f"{type(self.tokenizer).__name__} {len(self.tokenizer)}",
        }

    # --- answering --------------------------------------------------------------------------------

    def answers(
        self, weights: Weights, turns: Sequence[Turn], draws: np.random.Generator | None
    ) -> list[Answer]:
        self._put_on_stage(weights)
        scores = self.marks(self._stage.model, turns)
        return [Answer(s, lesson_of(turn)) for s, turn in zip(scores, turns, strict=True)]

    def turn_of(self, lesson: Lesson, id: str) -> Turn:
        return Turn(row_of(lesson, id), id)

    def _put_on_stage(self, weights: Weights) -> None:
        if bad := [name for name, t in weights.items() if not torch.isfinite(t).all()]:
            raise Diverged(f"{bad[0]} of this version is not finite.")
        self._stage.load_state_dict(weights)

    # --- learning ---------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        return _copied(self._shadow.state_dict())

    def start_from(self, weights: Weights) -> None:
        self._shadow.load_state_dict(weights)
        self._accepted = {name: weights[name].clone() for name in self._named()}
        self._ewc = OnlineEwc(Strength(self.config.ewc, "sampled"))
        self._trainer = self._new_trainer()

    def _new_trainer(self) -> Trainer:
        seed, label = self.config.seed, "the learner"
        return Trainer(self._shadow, self.tokenizer, self._training, seed, label=label)

    def _named(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self._shadow.named_parameters()}

    def accept(self, weights: Weights, lessons: Sequence[Lesson]) -> None:
        self._accepted = {name: weights[name].clone() for name in self._accepted}
        if self.config.ewc and lessons:
            self._ewc.accept(self._accepted, self._fisher(weights, lessons[:FISHER_ROWS]))

    def _fisher(self, weights: Weights, lessons: Sequence[Lesson]) -> Fisher:
        """Of the version's own tokens behind the right ones before, drawn from it."""
        self._put_on_stage(weights)
        named = {n: p for n, p in self._stage.named_parameters() if n in self._accepted}
        for parameter in named.values():
            parameter.requires_grad = True
        try:
            with seeded(self.config.seed), mode(self._stage.model, training=False):
                log_probs = self._drawn_log_probs(lessons)
                return sampled_fisher(log_probs, named, at_once=8)
        finally:
            for parameter in named.values():
                parameter.requires_grad = False

    def _drawn_log_probs(self, lessons: Sequence[Lesson]) -> Tensor:
        batch = collate([self._encoded(each) for each in lessons], self.tokenizer.pad_token_id or 0)
        log_p = answer_logits(self._stage.model, batch).float().log_softmax(-1)
        counted = answer_targets(batch["labels"]) != IGNORED
        drawn = torch.multinomial(log_p.detach().exp().flatten(0, 1), 1).view(counted.shape)
        chosen = log_p.gather(-1, drawn[..., None])[..., 0]
        return chosen.masked_fill(~counted, 0.0).sum(1)

    def learn(self, lessons: Sequence[Lesson]) -> Step:
        before, kept = _copied(self._named()), self._trainer.state_dict()
        try:
            result = self._trainer.step([self._encoded(each) for each in lessons])
            named = self._named()
            nothing = {name: torch.zeros_like(p) for name, p in named.items()}
            rate, pull = self.config.learning_rate, self.config.pull
            proximal_step(named, nothing, rate, self._accepted, pull, self._ewc)
            length = shorten(named, before, self.config.largest_step)
            check_near(named, self._accepted, self.config.largest_distance)
            self._shadow.after_step()
        except (Diverged, DataError) as discarded:
            self._trainer.load_state_dict(kept)
            return Step(False, math.nan, 0.0, str(discarded))
        return Step(True, result.loss, length)

    def _encoded(self, lesson: Lesson) -> Any:
        return encode(
            row_of(lesson, "lesson"), self.tokenizer, self.config.max_length, train_history=False
        )

    # --- versions and state -----------------------------------------------------------------------

    def digest(self, weights: Weights) -> str:
        self._put_on_stage(weights)
        return self._stage.version.digest

    def save(self, weights: Weights, folder: Path) -> None:
        self._put_on_stage(weights)
        self._stage.save(folder)

    def read(self, folder: Path) -> dict[str, Tensor]:
        found = load(without_adapter(self._stage), folder)
        try:
            self._stage.load_state_dict(found.state_dict())
        except AttachError as other:
            raise CheckpointError(
                f"{folder} holds another adapter than the one that learns: {other}"
            ) from None
        return _copied(found.state_dict())

    def state(self) -> dict[str, Any]:
        plain, tensors = self._ewc.state()
        return {
            "trainer": self._trainer.state_dict(),
            "accepted": _copied(self._accepted),
            "ewc": plain,
            "ewc_tensors": tensors,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._trainer = self._new_trainer()
        self._trainer.load_state_dict(state["trainer"])
        self._accepted = dict(state["accepted"])
        self._ewc = OnlineEwc.from_state(state["ewc"], state["ewc_tensors"])


def lesson_of(turn: Turn) -> Lesson | None:
    """What a right answer teaches; None: none is known."""
    if turn.row is None or not turn.row.references:
        return None
    values = asdict(turn.row)
    asked = {name: values[name] for name in TAUGHT if values[name]}
    if "form" in turn.row.meta:  # how its answers are compared
        asked["meta"] = {"form": turn.row.meta["form"]}
    return {"asked": {"input": turn.row.input, **asked}, "answer": turn.row.references[0]}


def row_of(lesson: Lesson, id: str) -> Example:
    """The example that a lesson came from."""
    return Example(id=id, references=(lesson["answer"],), **lesson["asked"])


@torch.no_grad()
def shorten(named: Mapping[str, Tensor], before: Weights, largest: float) -> float:
    """Cut a step, in place, to a share of the weights' norm before it; its length as such a share.

    Raises:
        Diverged: it is not finite.
    """
    norm = max(_norm(before), 1e-12)
    length = _norm({n: p - before[n] for n, p in named.items()}) / norm
    if not math.isfinite(length):
        raise Diverged("the step is not finite: it was discarded.")
    if length > largest:
        for name, p in named.items():
            p.copy_(before[name] + (largest / length) * (p - before[name]))
    return min(length, largest)


def check_near(named: Weights, accepted: Weights, largest: float) -> None:
    """Raise Diverged if weights are further from the last accepted version than a share of its norm."""
    far = _norm({n: p - accepted[n] for n, p in named.items()}) / max(_norm(accepted), 1e-12)
    if not far <= largest:
        raise Diverged(
            f"the step would lead {far:.3g} of the norm away from the last accepted version, {largest:g} at most: "
            "it was discarded."
        )


def _norm(tensors: Weights) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def _copied(tensors: Weights) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
