"""A reader that begins as a linear classifier of what was said, instead of at random.

From twenty examples of a skill a linear map of pooled hidden states learns more than a gated recurrent
reader from random weights. So the map is fitted first, on sums of the hidden states of all chunks,

    M_k = decay * M_(k-1) + sum of the chunk's (h - centre) / spread        N_k = its number of tokens, alike
    logits = (A M + b N) / mean N      ("mean")      or      A M / mean N + b      ("sum")

by multinomial logistic regression; decay, form and penalty are chosen on left-out folds of the training
rows. Then it is written into the reader: a unit of the token's embedding per class holds its row of A, the
recurrent cell adds up with that decay, and `expert_bias` reads the classes off the memory. All maps are
kept small enough to be nearly linear; the other units stay as they were drawn, and nobody listens to them
until they are trained.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bem.routing.reader import Reader
from bem.training.linear import PENALTIES, Linear, fit_linear, left_out

DECAYS, UNTAUGHT = (0.9, 0.5, 0.0), 0.5
"""What is tried; and what is taken where no row has several chunks to read, so that rows cannot tell: in a
conversation the newest words then count most, and a sentence that two chunks share is not lost."""
FORMS = ("mean", "sum")
TOKEN, CHUNK = 0.3, 0.5
"""Largest input of the tanh of a token and of a chunk, but for the one in a hundred that is larger."""
TEMPERATURES = tuple(2.0**p for p in range(-2, 7))
NEVER = -30.0
"""Logit of an option that no training row wants."""


@dataclass(frozen=True)
class Turn:
    """One decision that a row teaches."""

    row: int
    chunk: int
    """The chunk that begins it, from 1; the text is in those before."""
    wanted: Tensor
    """Probability that each option should have (options,)."""


@dataclass(frozen=True)
class Recipe:
    """How the classifier is fitted."""

    decay: float
    form: str
    penalty: float
    temperature: float
    """Divides its logits: what fits those of left-out folds best."""


@dataclass(frozen=True)
class Start:
    """The classifier that the reader begins as."""

    recipe: Recipe
    options: list[int]
    """Expert option of each class."""
    logits: Float[Tensor, "turns classes"]
    """Of each turn by a classifier that did not see its fold, divided by the temperature."""


def start_reader(
    reader: Reader,
    expert_bias: nn.Linear,
    hidden: Sequence[Tensor],
    numbers: Sequence[Tensor],
    turns: Sequence[Turn],
    folds: Tensor,
    recipe: Recipe | None = None,
) -> Start:
    """Fit the classifier and write it into the reader and the `expert_bias` on top of it.

    Args:
        hidden: (tokens, d_model) of each row, standardised.
        numbers: chunk of each token, from 1.
        turns: what to learn from.
        folds: number of each turn's fold (turns,).
        recipe: None: the one that is best on left-out folds.
    """
    sums = [_chunk_sums(states, number) for states, number in zip(hidden, numbers, strict=True)]
    wanted = torch.stack([turn.wanted for turn in turns])
    options = [int(o) for o in (wanted.sum(0) > 0).nonzero()[:, 0]]
    wanted = wanted[:, options]
    logits = wanted.new_empty(0)
    if recipe is None:
        recipe, logits = _best_recipe(sums, turns, wanted, folds)
    features, length = _features(sums, turns, recipe.decay, recipe.form)
    model = fit_linear(features, wanted, len(options), recipe.penalty)
    tokens = torch.cat([states.float() for states in hidden])
    _write(reader, expert_bias, tokens, sums, recipe, model, options, float(length.mean()))
    return Start(recipe, options, logits)


def _chunk_sums(hidden: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of the hidden states of each chunk (chunks, d_model), tokens of each (chunks,))."""
    n = int(number.max())
    sums = torch.zeros(n, hidden.shape[1]).index_add_(0, number - 1, hidden.float())
    return sums, number.bincount(minlength=n + 1)[1:].float()


def _best_recipe(
    sums: Sequence[tuple[Tensor, Tensor]], turns: Sequence[Turn], wanted: Tensor, folds: Tensor
) -> tuple[Recipe, Tensor]:
    """The recipe with the least cross-entropy on left-out folds, and their logits."""
    several = any(turn.chunk > 2 for turn in turns)
    best, found = math.inf, None
    for decay, form in itertools.product(DECAYS if several else (UNTAUGHT,), FORMS):
        features, length = _features(sums, turns, decay, form)
        share = length / length.mean() if form == "mean" else torch.ones(())
        for penalty in PENALTIES:
            logits = left_out(features, wanted, folds, penalty) * share
            for temperature in TEMPERATURES:
                loss = float(F.cross_entropy(logits / temperature, wanted))
                if loss < best:
                    recipe = Recipe(decay, form, penalty, temperature)
                    best, found = loss, (recipe, logits / temperature)
    assert found is not None
    return found


def _features(
    sums: Sequence[tuple[Tensor, Tensor]], turns: Sequence[Turn], decay: float, form: str
) -> tuple[Tensor, Tensor]:
    """What the classifier reads of the text before each turn (turns, d_model), and N (turns, 1)."""
    seen, length = _accumulated(sums, turns, decay)
    return seen / (length if form == "mean" else length.mean()), length


def _accumulated(
    sums: Sequence[tuple[Tensor, Tensor]], turns: Sequence[Turn], decay: float
) -> tuple[Tensor, Tensor]:
    """M (turns, d_model) and N (turns, 1) of the text before each turn."""
    seen, counts = [], []
    for turn in turns:
        of_chunk, tokens = sums[turn.row]
        before = turn.chunk - 1
        weight = decay ** torch.arange(before - 1, -1, -1, dtype=torch.float32)  # 0 ** 0 is 1
        seen.append(weight @ of_chunk[:before])
        counts.append((weight @ tokens[:before])[None])
    return torch.stack(seen), torch.stack(counts).clamp(min=1)


def unit_features(
    hidden: Sequence[Tensor], numbers: Sequence[Tensor], turns: Sequence[Turn], recipe: Recipe
) -> Tensor:
    """What a classifier of this recipe reads of the text before each turn (turns, d_model)."""
    sums = [_chunk_sums(states, number) for states, number in zip(hidden, numbers, strict=True)]
    return _features(sums, turns, recipe.decay, recipe.form)[0]


@torch.no_grad()
def write_unit(
    reader: Reader,
    out: nn.Linear,
    hidden: Sequence[Tensor],
    numbers: Sequence[Tensor],
    turns: Sequence[Turn],
    recipe: Recipe,
    model: Linear,
) -> None:
    """Put one more logit, of a classifier with two classes, into the reader's last unit, and `out` on top of it:
    that of the second class."""
    sums = [_chunk_sums(states, number) for states, number in zip(hidden, numbers, strict=True)]
    _, length = _features(sums, turns, recipe.decay, recipe.form)
    one = Linear(
        model.mean,
        model.scale,
        model.weight[1:] - model.weight[:1],
        model.bias[1:] - model.bias[:1],
    )
    tokens = torch.cat([states.float() for states in hidden])
    plain = replace(recipe, temperature=1.0)
    last = min(reader.d_read, reader.width) - 1
    out.weight.zero_()
    _write(reader, out, tokens, sums, plain, one, [0], float(length.mean()), last)


@torch.no_grad()
def _write(
    reader: Reader,
    expert_bias: nn.Linear,
    tokens: Tensor,
    sums: Sequence[tuple[Tensor, Tensor]],
    recipe: Recipe,
    model: Linear,
    options: list[int],
    mean_n: float,
    first: int = 0,
) -> None:
    """first: unit of the first class."""
    classes, decay = len(options), max(0.02, recipe.decay)
    units = slice(first, first + classes)
    weight = model.weight / model.scale
    bias = model.bias - weight @ model.mean
    per_token = bias if recipe.form == "mean" else torch.zeros_like(bias)
    of_chunk = [s @ weight.T + n[:, None] * per_token for s, n in sums]
    small = TOKEN / _large(tokens @ weight.T + per_token)
    d, m = reader.d_read, reader.width
    reader.token.weight[units], reader.token.bias[units] = small * weight, small * per_token
    gates = slice(d + first, d + first + classes)
    reader.token.weight[gates], reader.token.bias[gates] = 0.0, 0.0
    gain = CHUNK / (_large(torch.cat(of_chunk)) * small / 2)  # an open gate lets one half through
    own = first + torch.arange(classes)
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        update, new = (reader.gru.get_parameter(name)[at * m : (at + 1) * m] for at in (1, 2))
        update[units], new[units] = 0.0, 0.0
        if name == "weight_ih_l0":
            new[own, own] = gain
        if name == "bias_ih_l0":
            update[units] = torch.logit(torch.tensor(decay))
    heard = mean_n * recipe.temperature * (1 - decay) * gain * small / 2
    expert_bias.weight.zero_()
    expert_bias.bias.fill_(NEVER)
    expert_bias.weight[options, own] = 1 / heard
    base = bias / recipe.temperature if recipe.form == "sum" else torch.zeros_like(bias)
    expert_bias.bias[options] = base


def _large(values: Tensor) -> float:
    """A size that one value in a hundred is above."""
    return max(
        1e-6, float(values.abs().flatten().kthvalue(max(1, int(0.99 * values.numel()))).values)
    )
