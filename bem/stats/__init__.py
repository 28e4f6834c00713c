"""Scores, intervals, tests and gates: the one verdict on whether a candidate is better.

verdicts = judge(baseline, {"v1": measurement}, GatesConfig())
print(verdicts["v1"].summary())
"""

from bem.stats.bootstrap import Bca, bca_bootstrap, joint_bca
from bem.stats.corpus import (
    CORPUS,
    bleu_statistics,
    chrf_statistics,
    corpus_bleu,
    corpus_chrf,
)
from bem.stats.effects import default_family
from bem.stats.fdr import Discoveries, benjamini_hochberg_correction
from bem.stats.files import load, save
from bem.stats.gates import judge
from bem.stats.latency import RatioLimits, paired_ratio
from bem.stats.measurement import Measurement, RouterFacts
from bem.stats.paired import SignFlip, sign_flip_test, swap_test, variance_components
from bem.stats.pairing import with_shared_groups
from bem.stats.power import minimal_detectable_effect, more_examples
from bem.stats.scores import (
    METRICS,
    Metric,
    exact_match,
    json_validity,
    normalize_answer,
    sentence_bleu,
    sentence_chrf,
    token_f1,
)
from bem.stats.verdict import Check, Effect, Verdict
from bem.stats.weights import Statistic

__all__ = [
    "CORPUS",
    "METRICS",
    "Bca",
    "Check",
    "Discoveries",
    "Effect",
    "Measurement",
    "Metric",
    "RatioLimits",
    "RouterFacts",
    "SignFlip",
    "Statistic",
    "Verdict",
    "bca_bootstrap",
    "benjamini_hochberg_correction",
    "bleu_statistics",
    "chrf_statistics",
    "corpus_bleu",
    "corpus_chrf",
    "default_family",
    "exact_match",
    "joint_bca",
    "json_validity",
    "judge",
    "load",
    "minimal_detectable_effect",
    "more_examples",
    "normalize_answer",
    "paired_ratio",
    "save",
    "sentence_bleu",
    "sentence_chrf",
    "sign_flip_test",
    "swap_test",
    "token_f1",
    "variance_components",
    "with_shared_groups",
]
