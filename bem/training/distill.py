"""Distil a routed stack, or any adapter of ours, into a static LoRA that every server can hold.

The student learns the teacher's distribution at each answer token, not the answer alone (Hinton et al.,
arXiv:1503.02531, at temperature 1):

    loss = mean over the answer tokens of  KL(teacher || student) = sum_v p(v) (log p(v) - log q(v))

Teacher and student stand on the same frozen weights. The teacher reads each micro-batch once, without
gradients, and chooses its route as it would in use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bem.adapters.attach import Attached, attach
from bem.adapters.copies import without_adapter
from bem.config import TrainingConfig
from bem.config.adapters import StaticConfig
from bem.errors import TrainingError
from bem.files import sha256_json
from bem.routing.modes import mode
from bem.routing.mounted import Mounted
from bem.training.data import IGNORED, Encoded, Example, check_fits, collate, encode
from bem.training.fit import FitResult, fit
from bem.training.losses import answer_logits, answer_targets, labelled_tokens
from bem.training.trainer import Objective, StepResult
from bem.variants.digest import weights_digest


@dataclass(frozen=True)
class Distilled:
    """The distilled student."""

    student: Attached
    """s0 on a copy of the base that shares its weights: `save` it, or `save_lora`."""
    training: FitResult
    """Losses are KL(teacher || student), in nats per answer token."""


def distill(
    teacher: Attached,
    tokenizer: Any,
    examples: Sequence[Example],
    rank: int,
    config: TrainingConfig,
    folder: str | Path,
    seed: int,
    on_progress: Callable[[StepResult], None] | None = None,
    validation: Sequence[Example] = (),
) -> Distilled:
    """Fit a static LoRA to a teacher; the teacher and the base stay as they are.

    Args:
        teacher: a routed stack (`Mounted`), or an adapter that is no static LoRA.
        examples: what both read; the first reference of each is the text of the answer.
        rank: of the student, at each site of the router layer and above.
        folder: gets the state and the metrics of `fit`; a run that was stopped is resumed from it.
        seed: of the student's start and of the order of the examples.
        on_progress: called after every step.
        validation: rows on whose answers `config.patience` decides when to stop.
    Raises:
        As `fit`.
    """
    layer, sites = teacher.config.router_layer, teacher.config.sites
    settings = StaticConfig(rank=rank, router_layer=layer, sites=sites, seed=seed)
    student = attach(without_adapter(teacher), settings)
    with mode(teacher.model, training=False):
        result = fit(
            student,
            tokenizer,
            examples,
            config,
            folder,
            seed,
            on_progress,
            f"distilling into rank {rank}",
            Objective(f"KL to {_digest(teacher)}", lambda q, batch: _kl_to(teacher, q, batch)),
            validation,
        )
    return Distilled(student, result)


def answer_kl(
    teacher: Float[Tensor, "batch columns vocabulary"],
    student: Float[Tensor, "batch columns vocabulary"],
    targets: Int[Tensor, "batch columns"],
) -> Float[Tensor, ""]:
    """KL(teacher || student), summed over the answer tokens, in nats.

    Args:
        teacher, student: as `answer_logits` gives them.
        targets: IGNORED where a column predicts no answer, see `answer_targets`.
    """
    answers = targets != IGNORED
    log_p = teacher[answers].float().log_softmax(-1)
    log_q = student[answers].float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


@torch.no_grad()
def divergence(
    teacher: Attached,
    student: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    max_length: int = 512,
    batch_size: int = 16,
) -> float:
    """Mean KL(teacher || student) over the answer tokens of examples, in nats.

    Args:
        student: a model, such as `Distilled.student.model`.
    Raises:
        TrainingError: no examples, or one that the model cannot take.
    """
    if not examples:
        raise TrainingError("The divergence of no examples is not defined: name some.")
    rows = sorted((encode(row, tokenizer, max_length) for row in examples), key=len)
    check_fits(student, tokenizer, rows)
    parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    pad_id = tokenizer.pad_token_id or 0
    with mode(teacher.model, training=False), mode(student, training=False):
        sums = [_divergence(teacher, student, part, pad_id) for part in parts]
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


def _divergence(
    teacher: Attached, student: Any, rows: list[Encoded], pad_id: int
) -> tuple[float, int]:
    """(sum, answer tokens) of one batch."""
    batch = {k: v.to(teacher.base.device) for k, v in collate(rows, pad_id).items()}
    total = _kl_to(teacher, answer_logits(student, batch), batch)
    return float(total), labelled_tokens(batch["labels"])


def _kl_to(teacher: Attached, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        said = answer_logits(teacher.model, batch)
    return answer_kl(said, logits, answer_targets(batch["labels"]))


def _digest(teacher: Attached) -> str:
    """sha256 of what the teacher is: settings and weights."""
    settings = teacher.router_config if isinstance(teacher, Mounted) else teacher.config
    return sha256_json([settings.model_dump(mode="json"), weights_digest(teacher.state_dict())])
