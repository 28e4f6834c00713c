"""How a router learns what a picture decides: `Sight`, from rows with pictures, after its reader.

    P(y) = pi(text) softmax(W picture) + (1 - pi(text)) softmax(logits by the text)

Nobody says which rows the picture decides: pi and W are fitted by expectation maximisation (a mixture of two experts,
Jacobs et al. 1991), each step on left-out folds, so that what the text says anyway is not credited to the picture.
pi is a linear classifier of what was said, like the reader's start, and takes the reader's last unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bem.errors import DataError
from bem.routing.policy import MacroPolicy
from bem.training.data import Encoded
from bem.training.linear import fit_linear, left_out
from bem.training.reader_start import NEVER, Start, Turn, unit_features, write_unit

PENALTIES = (1e-3, 1e-2, 1e-1)
"""On pi's weights, tried in the first round."""
SCALES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Of the text's logits, which turns that the picture decides have made timid."""
ROUNDS = 4
"""Of expectation maximisation."""
PENALTY = 1e-3
"""On the sum of W's squared weights, beside a mean cross-entropy; what is seen lies in [0, 1]."""
LEAST, MOST = 0.02, 0.98
"""Bounds of pi while it is fitted."""


@dataclass(frozen=True)
class Taught:
    """What the picture is learned from; see `few_rows`."""

    hidden: Sequence[Tensor]
    """(tokens, d_model) of each row, standardised."""
    numbers: Sequence[Tensor]
    """Chunk of each token, from 1."""
    turns: Sequence[Turn]
    seen: Float[Tensor, "turns features"]
    """Of each turn's picture; zeros: there is none."""
    folds: Tensor
    """Number of each turn's fold (turns,)."""


def fit_picture(
    policy: MacroPolicy, start: Start, taught: Taught
) -> Float[Tensor, "turns classes"]:
    """Write pi into the reader (which reads standardised states still) and W into `Sight`.

    Returns:
        logits of each turn, with the picture, by maps that did not see its fold.
    """
    wanted = torch.stack([turn.wanted for turn in taught.turns])[:, start.options]
    features = unit_features(taught.hidden, taught.numbers, taught.turns, start.recipe)
    has, penalty, scale = taught.seen[:, 0] > 0, None, 1.0
    pi = torch.full((len(wanted),), 0.5)
    asked = torch.stack([1 - pi, pi], -1)
    for _ in range(ROUNDS):
        scale = _scale(start.logits, wanted, asked[:, 0])
        by_text = ((scale * start.logits).softmax(-1) * wanted).sum(-1)
        votes = _votes(taught, wanted, asked[:, 1])
        by_picture = (votes.softmax(-1) * wanted).sum(-1)
        asked = pi * by_picture / (pi * by_picture + (1 - pi) * by_text)
        asked = torch.stack([1 - asked, asked], -1)
        asked[~has] = torch.tensor(
            [0.5, 0.5]
        )  # says nothing of whether a picture would have counted
        penalty = penalty or _penalty(features, asked, taught.folds)
        pi = left_out(features, asked, taught.folds, penalty).softmax(-1)[:, 1].clamp(LEAST, MOST)
    sight = policy.actor.sight
    assert sight is not None
    assert penalty is not None
    model = fit_linear(features, asked, 2, penalty)
    write_unit(
        policy.reader, sight.asked, taught.hidden, taught.numbers, taught.turns, start.recipe, model
    )
    with torch.no_grad():
        policy.actor.expert_bias.weight[start.options] *= scale
        policy.actor.expert_bias.bias[start.options] *= scale
        sight.vote.weight.zero_()
        sight.vote.weight[:, 0] = NEVER  # of options that no row wants, as the text's
        sight.vote.weight[start.options] = fit_votes(taught.seen, wanted, asked[:, 1])
    share = (taught.seen[:, 0] * pi)[:, None]
    return scale * start.logits + share * (votes - scale * start.logits)


def _scale(logits: Tensor, wanted: Tensor, weight: Tensor) -> float:
    """Of the text's logits: what fits the turns best that the text decides."""
    losses = [
        float((weight * F.cross_entropy(s * logits, wanted, reduction="none")).mean())
        for s in SCALES
    ]
    return SCALES[losses.index(min(losses))]


def _penalty(features: Tensor, asked: Tensor, folds: Tensor) -> float:
    """The one whose cross-entropy on left-out folds is least."""
    losses = [float(F.cross_entropy(left_out(features, asked, folds, p), asked)) for p in PENALTIES]
    return PENALTIES[losses.index(min(losses))]


def _votes(taught: Taught, wanted: Tensor, weight: Tensor) -> Tensor:
    """W picture of each turn, by a W that did not see its fold."""
    votes = torch.empty_like(wanted)
    for fold in taught.folds.unique().tolist():
        out = taught.folds == fold
        votes[out] = taught.seen[out] @ fit_votes(taught.seen[~out], wanted[~out], weight[~out]).T
    return votes


def fit_votes(seen: Tensor, wanted: Tensor, weight: Tensor) -> Float[Tensor, "classes features"]:
    """Multinomial logistic regression without a constant, each turn weighted.

    argmin_W mean_i weight_i * cross-entropy(W seen_i, wanted_i) + PENALTY |W|^2
    """
    w = torch.zeros(wanted.shape[1], seen.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        each = F.cross_entropy(seen @ w.T, wanted, reduction="none")
        value = (weight * each).mean() + PENALTY * w.square().sum()
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return w.detach()


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
