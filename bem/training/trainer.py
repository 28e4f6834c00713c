"""One optimiser step at a time on an adapter, with the same bits whoever drives it.

    trainer = Trainer(attached, tokenizer, config, seed)
    result = trainer.step(batch)            # forward, backward, clip, AdamW, after_step
    trainer.load_state_dict(state)          # goes on exactly where `state_dict` was taken

`fit` is a loop around it; so is anything that learns from a stream, also on a shadow copy of what
serves. Every step draws its randomness (dropout, Gumbel noise) from (seed, step) and gives the global
generators back, so that a resumed run repeats what the killed one would have done.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from bem.config import TrainingConfig
from bem.errors import Diverged, TrainingError
from bem.routing.modes import mode, seeded
from bem.training.batches import micro_batches
from bem.training.data import Encoded, check_fits, check_routes, collate
from bem.training.losses import answer_logits, answer_targets, labelled_tokens, token_nll
from bem.training.optimizer import adamw, learning_rate, trained


@runtime_checkable
class Trainable(Protocol):
    """What can be trained: `Attached`, `Mounted` while it trains, X-LoRA, a shadow copy.

    Buffers of its `modules()`, if it has that method, belong to the training state too.
    """

    @property
    def model(self) -> Any:
        """Called with a batch as `answer_logits` does."""
        ...

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The adapter's own parameters; those that require a gradient are trained."""
        ...

    def penalty(self) -> Tensor:
        """Regularisers of the last forward pass, already weighted; added to every loss."""
        ...

    def after_step(self) -> None:
        """Called after every step: keeps the weights inside their bounds."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors that belong to the adapter."""
        ...

    def load_state_dict(self, tensors: dict[str, Tensor], /) -> None:
        """Take over what `state_dict` gave."""
        ...


@dataclass(frozen=True)
class Objective:
    """What the training brings down, beside the regularisers."""

    name: str
    """What it depends on beside the examples; a resumed run must agree."""
    loss: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    """(logits as `answer_logits` gives them, batch as `collate` makes it) -> sum over the answer tokens,
    in nats."""


def _nll(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    return token_nll(logits, answer_targets(batch["labels"])).sum()


LIKELIHOOD = Objective("nll", _nll)


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did."""

    step: int
    """Steps done, counting this one."""
    loss: float
    """Mean of the objective over the answer tokens, in nats."""
    penalty: float
    """Regularisers of the variant."""
    grad_norm: float
    """Global gradient norm before clipping."""
    learning_rate: float
    tokens: int
    """Tokens of the step that were not padding."""
    padding: float
    """Share of the step's computed tokens that were."""
    seconds: float


class Trainer:
    """Takes optimiser steps on an adapter; the base stays as it is.

    loss = mean of the objective over all answer tokens of the step + attached.penalty()
    """

    def __init__(
        self,
        attached: Trainable,
        tokenizer: Any,
        config: TrainingConfig,
        seed: int,
        objective: Objective = LIKELIHOOD,
        label: str = "adapter",
    ):
        """
        Args:
            seed: of all noise.
            objective: negative log-likelihood, or what `distill` hands over.
            label: what messages call the adapter.
        Raises:
            TrainingError: nothing can be trained: there are no parameters, or all are frozen.
        """
        self.attached, self.tokenizer, self.config, self.seed = attached, tokenizer, config, seed
        self.objective, self.label = objective, label
        self.parameters = trained(dict(attached.named_parameters()), label)
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = adamw(self.parameters.values(), config)
        self.steps = 0
        """Steps done."""
        self.is_whole = True
        """False only while a step writes to the weights: a state taken then would be half of each."""

    def step(self, batch: Sequence[Encoded]) -> StepResult:
        """One optimiser step over `batch`.

        The examples are cut into micro-batches of like length, see `micro_batches`: the gradient is the
        same, the padding less. Beyond `config.steps` the learning rate stays at its last value.

        Raises:
            Diverged: the loss or the gradient was not finite; the step was not taken.
            TrainingError: rows that the model cannot take, no answer token among them, or no gradient
                that reaches a trained parameter.
            DataError: some rows have a route and some have none.
        """
        started = time.perf_counter()
        check_fits(self.attached.model, self.tokenizer, batch)
        check_routes(batch)
        lengths = [len(encoded) for encoded in batch]
        groups = micro_batches(lengths, self.config.accumulation, self.config.padding)
        rate = learning_rate(self.steps, self.config)
        noise = np.random.SeedSequence([self.seed, self.steps]).generate_state(1, np.uint64)[0]
        self.optimizer.zero_grad(set_to_none=True)  # of whoever called backward before
        try:
            with seeded(int(noise), self.device), mode(self.attached.model, training=True):
                loss, penalty = self._backward([[batch[i] for i in group] for group in groups])
                norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip)
                self._check_finite("gradient norm", float(norm))
                self._update(rate)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        tokens = sum(lengths)
        padding = 1 - tokens / sum(len(group) * lengths[group[-1]] for group in groups)
        seconds = time.perf_counter() - started
        return StepResult(self.steps, loss, penalty, float(norm), rate, tokens, padding, seconds)

    def _backward(self, micros: Sequence[Sequence[Encoded]]) -> tuple[float, float]:
        """Gradients of all micro-batches; (loss, penalty)."""
        pad_id, rows = self.tokenizer.pad_token_id or 0, sum(map(len, micros))
        batches = [collate(micro, pad_id) for micro in micros]
        count = sum(labelled_tokens(b["labels"]) for b in batches)
        if not count:
            raise TrainingError(
                f"{self.label}: step {self.steps + 1} has {rows} rows without a single answer token: "
                "encode them with their answers."
            )
        total_loss = total_penalty = 0.0
        for micro in batches:
            loss, penalty = self._losses(micro, count, len(micro["labels"]) / rows)
            total = loss + penalty
            self._check_finite("loss", float(total.detach()))
            self._check_reaches(total)
            total.backward()
            total_loss += float(loss.detach())
            total_penalty += float(penalty.detach())
        return total_loss, total_penalty

    def _losses(self, batch: dict[str, Tensor], count: int, share: float) -> tuple[Tensor, Tensor]:
        """This micro-batch's part of the step's mean loss and of its penalty."""
        inputs = {key: tensor.to(self.device) for key, tensor in batch.items()}
        autocast = self.config.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            logits = answer_logits(self.attached.model, inputs)
            # Divided by the answer tokens of the whole step: the sum over micro-batches is then the
            # mean over the step, however it was cut.
            loss = self.objective.loss(logits, inputs) / count
        return loss, self.attached.penalty() * share

    def _update(self, rate: float) -> None:
        self.is_whole = False
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.attached.after_step()
        self.steps += 1
        self.is_whole = True

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise Diverged(
                f"{self.label}: the {what} was {value} in step {self.steps + 1}, which was not taken. "
                f"Lower training.learning_rate (now {self.config.learning_rate:g})."
            )

    def _check_reaches(self, loss: Tensor) -> None:
        if loss.requires_grad:
            return
        if not torch.is_grad_enabled():
            raise TrainingError(
                f"{self.label}: gradients are switched off: train outside torch.no_grad()."
            )
        raise TrainingError(
            f"{self.label}: the loss depends on none of its {len(self.parameters)} trained tensors "
            f"({next(iter(self.parameters))}, ...). A router learns from its own methods (clone, improve), not "
            "from the likelihood of answers."
        )

    # --- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on beside its batch: copies, safe from later steps.

        Raises:
            TrainingError: a step was cut short while it wrote to the weights.
        """
        if not self.is_whole:
            raise TrainingError(
                f"{self.label}: step {self.steps + 1} was cut short while it wrote to the weights: load the "
                "last saved state."
            )
        return {
            "adapter": _copied(self.attached.state_dict()),
            "buffers": _copied(self._buffers()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "trained": list(self.parameters),
            "seed": self.seed,
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, with the same bits.

        Raises:
            TrainingError: it belongs to other parameters or another seed.
        """
        if state["trained"] != list(self.parameters):
            odd = set(state["trained"]).symmetric_difference(self.parameters) or {"their order"}
            raise TrainingError(
                f"{self.label}: the state is that of {len(state['trained'])} trained tensors, here are "
                f"{len(self.parameters)}; they differ in {sorted(odd)[0]}."
            )
        if state["seed"] != self.seed:
            raise TrainingError(
                f"{self.label}: the state was made with seed {state['seed']}, this is seed {self.seed}."
            )
        self.attached.load_state_dict(dict(state["adapter"]))
        for name, buffer in self._buffers().items():
            buffer.copy_(state["buffers"][name])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.steps, self.is_whole = state["steps"], True

    def _buffers(self) -> dict[str, Tensor]:
        """All buffers of the adapter's modules, also those that no checkpoint holds: what a power
        iteration starts from decides the bits of the next one."""
        modules = getattr(self.attached, "modules", list)()
        return {f"{i}.{n}": b for i, m in enumerate(modules) for n, b in m.named_buffers()}


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
