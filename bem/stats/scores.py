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
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """What a metric's numbers mean."""

    higher_is_better: bool
    points_per_unit: float | None
    """Points (0-100 scale) in one unit of the score; None: the score has no such scale (a loss)."""
    kind: Literal["mean", "corpus"] = "mean"
    """mean: average of per-example scores; corpus: a function of summed sufficient statistics."""

    @property
    def core(self) -> bool:
        """Core metrics have points; they form the default family and are guarded against
        regression."""
        return self.points_per_unit is not None

    @property
    def sign(self) -> float:
        return 1.0 if self.higher_is_better else -1.0


METRICS: dict[str, Metric] = {  # new metric: one line here, or declare it in the Measurement
    "em": Metric(True, 100.0),
    "f1": Metric(True, 100.0),
    "validity": Metric(True, 100.0),
    "chrf": Metric(True, 1.0),
    "bleu": Metric(True, 1.0),
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
def sacrebleu_metric(name: str) -> Any:
    """One shared sacrebleu scorer; the library is loaded only when a score needs it."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return {"chrf": CHRF, "bleu": lambda: BLEU(effective_order=True)}[name]()


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
