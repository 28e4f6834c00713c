"""Early stopping: the step to keep is chosen on rows that are neither trained on nor reported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from bem.routing.modes import mode
from bem.training.data import Encoded, Example, check_fits, encode
from bem.training.row_losses import answer_losses
from bem.training.trainer import Trainable, Trainer

ROWS_AT_ONCE = 16


def validation_loss(
    attached: Trainable, tokenizer: Any, rows: Sequence[Encoded], batch_size: int = ROWS_AT_ONCE
) -> float:
    """Mean over the rows of their last answer's negative log-likelihood, in nats per token.

    Args:
        rows: encoded with their answers.
        batch_size: rows per forward pass; rows of like length are read together.
    """
    ordered, losses = sorted(rows, key=len), []
    pad_id = tokenizer.pad_token_id or 0
    with mode(attached.model, training=False):
        for at in range(0, len(ordered), batch_size):
            losses += answer_losses(attached, ordered[at : at + batch_size], pad_id)[0]
    return math.fsum(losses) / len(losses)


class EarlyStopping:
    """Looks at the validation rows every `evaluate_every` steps and after the last one; remembers the
    weights of the lowest loss; over after `patience` looks in a row without a lower one."""

    def __init__(self, trainer: Trainer, validation: Sequence[Example]):
        """Raises TrainingError or DataError: rows that the model cannot take."""
        config, tokenizer = trainer.config, trainer.tokenizer
        self.trainer = trainer
        self.rows = [encode(row, tokenizer, config.max_length) for row in validation]
        check_fits(trainer.attached.model, tokenizer, self.rows)
        self.looks: list[tuple[int, float]] = []
        self._best: dict[str, Tensor] = {}

    @property
    def best_step(self) -> int | None:
        """Step of the lowest loss, the first of equal ones; None before the first look."""
        return min(self.looks, key=_comparable)[0] if self.looks else None

    @property
    def is_over(self) -> bool:
        """Nothing has become better for too long."""
        after_best = [step for step, _ in self.looks if step > (self.best_step or 0)]
        return len(after_best) >= (self.trainer.config.patience or 0)

    def look(self, step: int) -> bool:
        """Measure the loss if it is time to and was not done at this step; whether it was measured."""
        config = self.trainer.config
        is_time = step > 0 and (step % config.evaluate_every == 0 or step == config.steps)
        if not is_time or (self.looks and self.looks[-1][0] == step):
            return False
        loss = validation_loss(self.trainer.attached, self.trainer.tokenizer, self.rows)
        now = self.trainer.attached.state_dict()
        copied = {name: tensor.detach().cpu().clone() for name, tensor in now.items()}
        looks = [*self.looks, (step, loss)]
        best = copied if min(looks, key=_comparable)[0] == step else self._best
        self.looks, self._best = looks, best  # together: an interrupt leaves neither half
        return True

    @property
    def best(self) -> Mapping[str, Tensor]:
        """Weights of the lowest loss so far; empty before the first look."""
        return self._best

    def restore_best(self) -> None:
        """Put the weights of the lowest loss back onto the adapter."""
        self.trainer.attached.load_state_dict(dict(self._best))

    def state_dict(self) -> dict[str, Any]:
        """The looks, and the best weights."""
        return {"looks": [list(look) for look in self.looks], "best": self._best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.looks = [(int(step), float(loss)) for step, loss in state["looks"]]
        self._best = {name: tensor.cpu() for name, tensor in state["best"].items()}


def _comparable(look: tuple[int, float]) -> float:
    """A loss that is no number is the worst of all."""
    return math.inf if math.isnan(look[1]) else look[1]
