"""Corpus BLEU and chrF from per-example sufficient statistics, vectorised over resamples.

Both scores are functions of sums over examples. Keeping the summands makes a resample one matrix
product and a jackknife one subtraction, where sacrebleu counts n-grams again or loops over
resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from bem.errors import DataError
from bem.stats.scores import sacrebleu_metric

Floats = NDArray[np.float64]

_ORDERS = 4  # BLEU: word n-grams up to 4
_CHARS = 6  # chrF: character n-grams up to 6
_BETA_SQUARED = 4.0  # chrF2


def bleu_statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    """[n, 10]: system length, closest reference length, matches and totals of orders 1 to 4."""
    return _statistics("bleu", predictions, references)


def chrf_statistics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    """[n, 18]: n-grams of the answer, of its best reference, and matches, for orders 1 to 6."""
    return _statistics("chrf", predictions, references)


def corpus_bleu(sums: Floats) -> Floats:
    """BLEU in [0, 100] from summed statistics [..., 10] (Papineni 2002; sacrebleu's exp smoothing).

    BP * exp(mean_n log p_n); an order without a match gets p_n = 1 / (2^k total_n), k = 1, 2, ...
    """
    length, reference = sums[..., 0], sums[..., 1]
    correct, total = sums[..., 2 : 2 + _ORDERS], sums[..., 2 + _ORDERS :]
    missed = correct < 0.5  # counts are integers, up to the rounding of a float32 product
    smoothing = 2.0 ** np.cumsum(missed, axis=-1)
    matches = np.where(missed, 1.0 / smoothing, correct)
    defined = (total > 0.5).all(-1) & ~missed.all(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_precision = np.log(matches / total).mean(-1)
        brevity = np.where(length < reference, 1.0 - reference / length, 0.0)
        return np.where(defined, 100.0 * np.exp(log_precision + brevity), 0.0)


def corpus_chrf(sums: Floats) -> Floats:
    """chrF2 in [0, 100] from summed statistics [..., 18] (Popovic 2015; effective order).

    F_beta of the precision and the recall, each averaged over the orders that both sides have.
    """
    answer, gold, match = sums[..., 0::3], sums[..., 1::3], sums[..., 2::3]
    both = (answer > 0.5) & (gold > 0.5)
    orders = np.maximum(both.sum(-1), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(both, match / answer, 0.0).sum(-1) / orders
        recall = np.where(both, match / gold, 0.0).sum(-1) / orders
        f = (1 + _BETA_SQUARED) * precision * recall / (_BETA_SQUARED * precision + recall)
    return np.where(precision + recall > 0, 100.0 * f, 0.0)


CORPUS: dict[str, tuple[int, Callable[[Floats], Floats]]] = {  # metric: (columns, score from sums)
    "corpus_bleu": (2 + 2 * _ORDERS, corpus_bleu),
    "corpus_chrf": (3 * _CHARS, corpus_chrf),
}


def _statistics(
    name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> Floats:
    if len(predictions) != len(references):
        raise DataError(
            f"{len(predictions)} predictions but {len(references)} lists of references."
        )
    if any(isinstance(refs, str) or not refs for refs in references):
        raise DataError("Every prediction needs a non-empty list of reference strings.")
    metric = sacrebleu_metric(name)
    rows = []
    for prediction, refs in zip(predictions, references, strict=True):
        # sacrebleu's own per-segment extractor: the only way to its counts short of copying it
        streams = [[ref] for ref in refs]
        rows.append(metric._extract_corpus_statistics([prediction], streams)[0])
    width = CORPUS[f"corpus_{name}"][0]
    return np.array(rows, dtype=np.float64).reshape(len(rows), width)
