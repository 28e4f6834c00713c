"""What one answer is worth: exact match, token F1, chrF, BLEU, JSON validity; and METRICS, the
registry."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import inf, isfinite
from typing import Any, Literal

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from bem.errors import DataError


@dataclass(frozen=True)
class Metric:
    """What a metric's numbers mean.

    Raises:
        DataError: points that are not positive, or a range that is none.
    """

    higher_is_better: bool
    points_per_unit: float | None
    """Points (0-100 scale) in one unit of the score; None: the score has no such scale (a loss)."""
    kind: Literal["mean", "corpus"] = "mean"
    """mean: average of per-example scores; corpus: a function of summed sufficient statistics."""
    range: tuple[float, float] | None = None
    """Least and greatest possible score; None: not known."""

    def __post_init__(self) -> None:
        if not isinstance(self.higher_is_better, bool) or self.kind not in ("mean", "corpus"):
            raise DataError(f"A metric is (true or false, points, 'mean' or 'corpus'), got {self}.")
        points = self.points_per_unit
        if points is not None and not (_is_number(points) and 0 < points < inf):
            raise DataError(f"points_per_unit must be a positive number or None, got {points!r}.")
        if self.range is not None:
            object.__setattr__(self, "range", _checked_range(self.range))

    @property
    def core(self) -> bool:
        """Core metrics have points; they form the default family and are guarded against
        regression."""
        return self.points_per_unit is not None

    @property
    def sign(self) -> float:
        return 1.0 if self.higher_is_better else -1.0

    @property
    def limits(self) -> tuple[float, float]:
        """Least and greatest score that can be right; infinite where nothing is known.

        A hundred points are the whole scale: of a metric without a range, twice that is another unit.
        """
        if self.range is not None:
            return self.range
        reach = 200 / self.points_per_unit if self.points_per_unit else inf
        return -reach, reach


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _checked_range(ends: Any) -> tuple[float, float]:
    if len(ends) != 2 or not all(_is_number(e) and isfinite(e) for e in ends) or ends[0] >= ends[1]:
        raise DataError(f"range must be (least, greatest) score, got {ends!r}.")
    return float(ends[0]), float(ends[1])


_SHARE = Metric(True, 100.0, range=(0.0, 1.0))
_OF_100 = Metric(True, 1.0, range=(0.0, 100.0))
METRICS: dict[str, Metric] = {  # new metric: one line here, or declare it in the Measurement
    "em": _SHARE,
    "f1": _SHARE,
    "validity": _SHARE,
    "acc": _SHARE,  # lm-eval's names
    "acc_norm": _SHARE,
    "exact_match": _SHARE,
    "chrf": _OF_100,
    "bleu": _OF_100,
    "corpus_chrf": Metric(True, 1.0, "corpus"),
    "corpus_bleu": Metric(True, 1.0, "corpus"),
    "loss": Metric(False, None),
}

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case; without ASCII punctuation, the articles a, an, the, and extra white space.

    The official SQuAD rules (Rajpurkar et al. 2016, evaluate-v1.1.py and v2.0).
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals any normalised reference, else 0.0 (SQuAD).

    No references say that the right answer is empty (the unanswerable questions of SQuAD 2.0)."""
    answer = normalize_answer(prediction)
    return float(any(answer == normalize_answer(ref) for ref in _or_empty(references)))


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """Best token F1 over the references, in [0, 1] (SQuAD).

    Tokens are counted with multiplicity. If either side is empty after normalisation, F1 is 1 when
    both are and 0 otherwise; no references say that the right answer is empty (SQuAD 2.0)."""
    answer = normalize_answer(prediction).split()
    return max(_f1(answer, normalize_answer(ref).split()) for ref in _or_empty(references))


def _f1(answer: list[str], gold: list[str]) -> float:
    if not answer or not gold:
        return float(answer == gold)
    same = sum((Counter(answer) & Counter(gold)).values())
    return 2.0 * same / (len(answer) + len(gold))  # = harmonic mean of same/len and same/len


def json_validity(prediction: str) -> float:
    """1.0 if the text is one JSON object or array (RFC 8259: no NaN, no trailing text), else 0.0.

    A bare number or word would parse too, but is no structured answer.
    """
    try:
        # numbers stay text: Python refuses integers of more than 4,300 digits, JSON does not
        value = json.loads(prediction, parse_int=str, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return 0.0
    return float(isinstance(value, dict | list))


def sentence_chrf(prediction: str, references: Sequence[str]) -> float:
    """Sentence chrF in [0, 100] as sacrebleu computes it (chrF2, character order 6, no words)."""
    return float(sacrebleu_metric("chrf").sentence_score(prediction, _nonempty(references)).score)


def sentence_bleu(prediction: str, references: Sequence[str]) -> float:
    """Sentence BLEU in [0, 100] as sacrebleu computes it (13a tokens, exp smoothing, effective
    order)."""
    return float(sacrebleu_metric("bleu").sentence_score(prediction, _nonempty(references)).score)


@cache
def sacrebleu_metric(name: str) -> BLEU | CHRF:
    """One shared scorer of sacrebleu."""
    return CHRF() if name == "chrf" else BLEU(effective_order=True)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _or_empty(references: Sequence[str]) -> list[str]:
    """The references; the empty answer if there are none."""
    if isinstance(references, str):
        raise TypeError(f"references must be a list of strings, got the string {references!r:.60}")
    return list(references) or [""]


def _nonempty(references: Sequence[str]) -> list[str]:
    if not references:
        raise ValueError("references is empty: an answer can only be scored against at least one.")
    return _or_empty(references)
