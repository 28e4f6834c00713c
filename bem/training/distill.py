"""Distil a routed stack, or any adapter of ours, into a static LoRA that every server can hold.

The student learns what the teacher says at each answer token, not the answer alone (Hinton et al.,
arXiv:1503.02531, at temperature 1):

    loss = mean over the answer tokens of  KL(teacher || student) = sum_v p(v) (log p(v) - log q(v))

Teacher and student stand on the same frozen weights. The teacher reads each micro-batch once, without
gradients, and chooses its route as it would in use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bem.adapters.attach import Attached, attach
from bem.adapters.copies import without_adapter
from bem.config.adapters import StaticConfig
from bem.errors import TrainingError
from bem.routing.mounted import Mounted
from bem.training.data import IGNORED, Encoded, Example, collate, encode
from bem.training.fit import FitResult, Objective, StepMetrics, fit
from bem.training.losses import answer_logits, labelled_tokens

if TYPE_CHECKING:
    from bem.config import TrainingConfig


@dataclass(frozen=True)
class Distilled:
    """A static LoRA in its teacher's place."""

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
    on_progress: Callable[[StepMetrics], None] | None = None,
) -> Distilled:
    """Fit a static LoRA to a teacher; the teacher and the base stay as they are.

    Args:
        teacher: a routed stack (`Mounted`), or an adapter that is no static LoRA.
        examples: what both read; the first reference of each is the text of the answer.
        rank: of the student, at each site of the router layer and above.
        folder: gets the state and the metrics of `fit`; a run that was stopped is resumed from it.
        seed: of the student's start and of the order of the examples.
        on_progress: called after every step.
    Raises:
        As `fit`.
    """
    settings = StaticConfig(
        rank=rank,
        router_layer=teacher.config.router_layer,
        sites=teacher.config.sites,
        seed=seed,
    )
    student = attach(without_adapter(teacher), settings)
    with _as_in_use(teacher.model):
        result = fit(
            student,
            tokenizer,
            examples,
            config,
            folder,
            seed,
            on_progress,
            f"distilling into rank {rank}",
            Objective(f"KL to {_digest(teacher)}", lambda q, batch: _against(teacher, q, batch)),
        )
    return Distilled(student, result)


def answer_kl(teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
    """KL(teacher || student), summed over the labelled tokens, in nats.

    Args:
        teacher, student: logits [batch, length, vocabulary]; position t predicts token t + 1.
        labels: [batch, length or more], IGNORED outside answers; the logits belong to the last
            positions.
    """
    labels = labels[:, labels.shape[1] - student.shape[1] :]
    here = labels[:, 1:] != IGNORED
    log_p = teacher[:, :-1][here].float().log_softmax(-1)
    log_q = student[:, :-1][here].float().log_softmax(-1)
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
        TrainingError: no examples.
    """
    if not examples:
        raise TrainingError("The divergence of no examples is not defined: name some.")
    rows = sorted((encode(row, tokenizer, max_length) for row in examples), key=len)
    parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    with _as_in_use(teacher.model), _as_in_use(student):
        found = [_divergence(teacher, student, part, tokenizer.pad_token_id or 0) for part in parts]
    return sum(total for total, _ in found) / sum(count for _, count in found)


def _divergence(
    teacher: Attached, student: Any, rows: list[Encoded], pad_id: int
) -> tuple[float, int]:
    """(sum, answer tokens) of one batch."""
    batch = {k: v.to(teacher.base.device) for k, v in collate(rows, pad_id).items()}
    total = _against(teacher, answer_logits(student, batch), batch)
    return float(total), labelled_tokens(batch["labels"])


def _against(teacher: Attached, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        wanted = answer_logits(teacher.model, batch)
    return answer_kl(wanted, logits, batch["labels"])


@contextmanager
def _as_in_use(model: Any) -> Iterator[None]:
    """No dropout, hard rank masks; afterwards as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _digest(teacher: Attached) -> str:
    """sha256 of what the teacher is: settings and weights."""
    settings = teacher.router_config if isinstance(teacher, Mounted) else teacher.config
    digest = hashlib.sha256(settings.model_dump_json().encode())
    for name, tensor in sorted(teacher.state_dict().items()):
        data = tensor.detach().float().cpu().contiguous()
        digest.update(f"{name} {tuple(data.shape)}".encode() + data.numpy().tobytes())
    return digest.hexdigest()
