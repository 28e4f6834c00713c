"""How good an answer is, in [0, 1]: what is handed to a trainee to judge answers by.

exact     the most likely tokens are the reference's, to its end. One forward pass says so: what `generate`
          gives token by token is then the reference, because past control is never revised.
tokens    share of the reference's tokens that are the most likely ones behind the right ones before
em, f1, chrf   of the answer that the model really gives, against all references (`bem.tasks.scoring`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bem.online.stream import Turn
from bem.tasks.scoring import score
from bem.training.answers import greedy_answers
from bem.training.data import IGNORED, collate, encode
from bem.training.losses import answer_logits, answer_targets

AT_ONCE = 64
"""Rows of one forward pass."""
FOLLOWED = ("exact", "tokens")
GIVEN = ("em", "f1", "chrf")
METRICS = (*FOLLOWED, *GIVEN)

Marks = Callable[[Any, Sequence[Turn]], list[float | None]]
"""(model, turns) -> score of its answer to each; None: nothing is known by which to judge it."""


def marks_by(
    metric: str,
    tokenizer: Any,
    max_length: int,
    max_new_tokens: int = 64,
    form: str = "text",
) -> Marks:
    """The function that scores answers by one of `METRICS`.

    Args:
        max_new_tokens: of an answer that is generated.
        form: key of `scoring.FORMS`: how such an answer is compared.
    Raises:
        ValueError: no such metric.
    """
    if metric not in METRICS:
        raise ValueError(f"no metric {metric!r}: {', '.join(METRICS)}.")
    if metric in FOLLOWED:
        return lambda model, turns: followed(model, turns, tokenizer, max_length, metric == "exact")

    def given(model: Any, turns: Sequence[Turn]) -> list[float | None]:
        answers = _answers(model, turns, tokenizer, max_length, max_new_tokens)
        return [_given(metric, form, turn, a) for turn, a in zip(turns, answers, strict=True)]

    return given


@torch.no_grad()
def followed(
    model: Any, turns: Sequence[Turn], tokenizer: Any, max_length: int, exact: bool
) -> list[float | None]:
    """`exact` or `tokens`, against the first reference of each turn; None where there is none."""
    rows = {i: turn.row for i, turn in enumerate(turns) if turn.row and turn.row.references}
    encoded = {
        i: encode(row, tokenizer, max_length, train_history=False) for i, row in rows.items()
    }
    order = sorted(encoded, key=lambda i: len(encoded[i]))
    found: list[float | None] = [None] * len(turns)
    for at in range(0, len(order), AT_ONCE):
        some = order[at : at + AT_ONCE]
        batch = collate([encoded[i] for i in some], tokenizer.pad_token_id or 0)
        targets = answer_targets(batch["labels"])
        right = (answer_logits(model, batch).argmax(-1) == targets) & (targets != IGNORED)
        for i, value in zip(some, _shares(right, targets, exact), strict=True):
            found[i] = value
    return found


def _shares(right: Tensor, targets: Tensor, exact: bool) -> list[float]:
    hit, all_of = right.sum(1), (targets != IGNORED).sum(1)
    return ((hit == all_of).double() if exact else hit.double() / all_of.clamp(min=1)).tolist()


def _answers(
    model: Any, turns: Sequence[Turn], tokenizer: Any, max_length: int, max_new_tokens: int
) -> list[str]:
    prompts = [encode(t.row, tokenizer, max_length, with_answer=False) for t in turns if t.row]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    for at in range(0, len(order), AT_ONCE):
        some = order[at : at + AT_ONCE]
        answers = greedy_answers(model, tokenizer, [prompts[i] for i in some], max_new_tokens)
        for i, ids in zip(some, answers, strict=True):
            texts[i] = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return texts


def _given(metric: str, form: str, turn: Turn, answer: str) -> float | None:
    assert turn.row is not None
    if answer in turn.scores:
        return turn.scores[answer]
    if not turn.row.references:
        return None
    value = score(metric, turn.row.meta.get("form", form), answer, turn.row.references)
    return value / 100 if metric == "chrf" else value
