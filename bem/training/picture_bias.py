"""What a picture adds to the choice of an expert: a linear map from what a vision tower sees to expert logits.

    logits = scale * (logits by the text) + W picture

W has no constant: without a picture, or at gate 0, the text decides as it did. Scale, W and the penalty on W are
those of multinomial logistic regression with the text's logits on left-out folds beside the picture, so that W only
learns what the text leaves open.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bem.errors import DataError
from bem.routing.policy import Actor
from bem.training.data import Encoded
from bem.training.reader_start import Start

PENALTIES = (1e-4, 1e-3, 1e-2)
"""On the sum of the squared weights, beside a mean cross-entropy; what is seen lies in [0, 1]."""


def fit_picture(
    actor: Actor,
    start: Start,
    seen: Float[Tensor, "turns features"],
    wanted: Float[Tensor, "turns options"],
    folds: Tensor,
) -> Float[Tensor, "turns classes"]:
    """Write the map into the actor's `picture_bias`, and the scale into its `expert_bias`.

    Args:
        seen: of each turn's picture; zeros: there is none.
        wanted: probability that each option should have.
        folds: number of each turn's fold (turns,).
    Returns:
        logits of each turn by a map that did not see its fold.
    """
    target = wanted[:, start.options]
    tried = [_left_out(start.logits, seen, target, folds, p) for p in PENALTIES]
    losses = [float(F.cross_entropy(logits, target)) for logits in tried]
    best = losses.index(min(losses))
    scale, weight = _fitted(start.logits, seen, target, PENALTIES[best])
    assert actor.picture_bias is not None
    with torch.no_grad():
        actor.picture_bias.weight.zero_()
        actor.picture_bias.weight[start.options] = weight
        actor.expert_bias.weight[start.options] *= scale
        actor.expert_bias.bias[start.options] *= scale
    return tried[best]


def check_pictures(prompts: Sequence[Encoded], reads: bool) -> None:
    """Refuse pictures that would not be looked at, and a router that would look at none.

    Raises:
        DataError: rows with pictures and a router that reads none, or the other way round.
    """
    shown = sum(bool(prompt.vision) for prompt in prompts)
    if shown and not reads:
        raise DataError(
            f"{shown} of {len(prompts)} rows have a picture and the router reads none: give vision=ENCODER_ID "
            "(`bem.vision.eyes.Eyes.encoder_id`), or leave the pictures out."
        )
    if reads and not shown:
        raise DataError("vision names a tower, and no row has a picture: see `bem.tasks.pictures`.")


def _left_out(text: Tensor, seen: Tensor, wanted: Tensor, folds: Tensor, penalty: float) -> Tensor:
    logits = torch.empty_like(text)
    for fold in folds.unique().tolist():
        out = folds == fold
        scale, weight = _fitted(text[~out], seen[~out], wanted[~out], penalty)
        logits[out] = scale * text[out] + seen[out] @ weight.T
    return logits


def _fitted(text: Tensor, seen: Tensor, wanted: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """(scale, W)."""
    scale = torch.ones((), requires_grad=True)
    weight = torch.zeros(text.shape[1], seen.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [scale, weight], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = scale * text + seen @ weight.T
        value = F.cross_entropy(logits, wanted) + penalty * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return scale.detach().clamp(min=0), weight.detach()
