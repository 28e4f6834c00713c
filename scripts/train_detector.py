"""Train the violation detector that ships with the package: minutes on one core, scikit-learn.

    python scripts/train_detector.py --data DIR_OF_THE_PUBLIC_SETS --out bem/safety/violation-detector

Two logistic regressions over the same hashed tf-idf (bem/safety/features.py): `harm` from public harmful
instructions and the contrast pairs of detector_pairs.py, `abuse` from tweets that people have judged; ordinary
requests of other public sets are harmless for both. Platt's calibration on out-of-fold scores. The limit
of each category is the split-conformal one (Vovk et al. 2005): of harmless prompts exchangeable with the
calibration rows at most ALPHA / 2 lie above it. Training sides alone; safety_xstest and safety_hh_harmless
are not read.
"""

from __future__ import annotations

import argparse
import html
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from detector_pairs import beginnings, contrast_pairs, harmful, harmless
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from bem.files import json_lines
from bem.safety.detector import SHIPPED, ViolationDetector, word_digest
from bem.safety.features import BUCKETS, WORD, tf_idf
from bem.safety.views import fold
from bem.safety.weights import Category, Weights, write_weights

ORDINARY = (
    "cmd_tldr", "intent_clinc150", "intent_banking77", "math_gsm8k", "qa_nq_oracle", "qa_pubmed", "json_snips",
    "json_restaurant8k", "sql_wikisql", "gen_rnnlg", "gen_sgd", "qa_babi", "json_sgd_call",
)  # fmt: skip
ALPHA = 0.01
LEAST = 0.5
"""A limit lies nowhere below: nothing is flagged that is more probably harmless."""
PAIRS = 4000
STARTS = 5
"""How often each beginning of a request counts."""
PER_SET, CALIBRATION_PER_SET = 500, 150
LONGEST = 1200
LISTED_IN, LISTED_SHARE = 30, 0.98
"""A word enters the lexicon that stands in so many tweets, so large a share of them called abusive."""


def inputs(data: Path, name: str) -> list[dict]:
    return [row for _, row in json_lines(data / f"{name}.train.jsonl.gz")]


def ordinary(data: Path) -> tuple[list[str], list[str]]:
    """Harmless requests (for training, for calibration)."""
    rng, train, held = random.Random(0), [], []
    for name in ORDINARY:
        texts = sorted({row["input"] for row in inputs(data, name)})
        rng.shuffle(texts)
        held += texts[:CALIBRATION_PER_SET]
        train += texts[CALIBRATION_PER_SET : CALIBRATION_PER_SET + PER_SET]
    return train, held


def tweets(data: Path) -> tuple[list[str], list[str]]:
    """(abusive, neither)."""
    rows = inputs(data, "safety_tweets")
    plain = [(clean(r["input"]), r["references"][0] != "neither") for r in rows]
    return [t for t, bad in plain if bad], [t for t, bad in plain if not bad]


def clean(tweet: str) -> str:
    """Without the marks of a tweet, which would give the source away."""
    text = re.sub(r"https?://\S+|\bRT\b|@\w+:?", " ", html.unescape(html.unescape(tweet)))
    return " ".join(text.replace("#", " ").split())


def matrix(texts: Sequence[str], idf: NDArray[np.float32]) -> sp.csr_matrix:
    rows, columns, values = [], [], []
    for row, text in enumerate(texts):
        index, value = tf_idf(text, idf)
        rows.append(np.full(len(index), row))
        columns.append(index)
        values.append(value)
    where = np.concatenate(rows), np.concatenate(columns)
    return sp.csr_matrix((np.concatenate(values), where), shape=(len(texts), 2 * BUCKETS))


def rarity(texts: Sequence[str]) -> NDArray[np.float32]:
    """ln((1 + n) / (1 + df)) + 1, as scikit-learn's smooth idf."""
    counted = (matrix(texts, np.ones(2 * BUCKETS, dtype=np.float32)) != 0).sum(0)
    return (np.log((1 + len(texts)) / (1 + np.asarray(counted).ravel())) + 1).astype(np.float32)


def fit(
    name: str, x: sp.csr_matrix, y: NDArray[np.int64], weight: NDArray[np.float64], c: float
) -> Category:
    """A calibrated classifier, its limit not set yet."""
    model = LogisticRegression(C=c, class_weight="balanced", max_iter=400)
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    scores = cross_val_predict(
        model, x, y, cv=folds, method="decision_function", params={"sample_weight": weight}
    )
    platt = LogisticRegression(C=1e6, class_weight="balanced").fit(scores[:, None], y, weight)
    model.fit(x, y, sample_weight=weight)
    return Category(
        name,
        model.coef_[0].astype(np.float32),
        float(model.intercept_[0]),
        float(platt.coef_[0, 0]),
        float(platt.intercept_[0]),
        limit=1.0,
    )


def lexicon(
    abusive: Sequence[str], harmless: Sequence[str], others: Sequence[str]
) -> dict[int, float]:
    """Digest -> share, of the words that hardly occur outside abusive tweets."""
    bad, good = (Counter(w for t in ts for w in set(WORD.findall(t))) for ts in (abusive, harmless))
    known = {w for t in others for w in WORD.findall(t)}
    shares = {w: n / (n + good[w]) for w, n in bad.items() if n + good[w] >= LISTED_IN}
    return {word_digest(w): s for w, s in shares.items() if s >= LISTED_SHARE and w not in known}


def conformal_limit(scores: Sequence[float], alpha: float) -> float:
    """The ceil((n + 1)(1 - alpha))-th smallest calibration score."""
    rank = math.ceil((len(scores) + 1) * (1 - alpha))
    return sorted(scores)[min(rank, len(scores)) - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=SHIPPED)
    args = parser.parse_args()

    usual, held = ordinary(args.data)
    alarming, harmful_pairs = contrast_pairs(PAIRS)
    starts = beginnings(harmful() + harmless()) * STARTS
    alarming += starts
    instructions = [row["input"] for row in inputs(args.data, "safety_harmful")]
    abusive, neither = tweets(args.data)
    groups = [usual, alarming, instructions, harmful_pairs, abusive, neither]
    texts = [fold(text)[:LONGEST] for group in groups for text in group]
    of = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    idf = rarity(texts).astype(np.float16).astype(np.float32)  # as it will be read
    x = matrix(texts, idf)

    heavier = len(harmful_pairs) / len(instructions) / 2  # a third of all that is harmful
    harm_weight = np.where(of == 2, max(1.0, heavier), 1.0)
    in_harm = of != 4  # of an abusive tweet nobody said whether it asks for harm
    harm_y = np.isin(of, (2, 3)).astype(np.int64)
    harm = fit("harm", x[in_harm], harm_y[in_harm], harm_weight[in_harm], c=4.0)
    in_abuse = ~np.isin(of, (2, 3))
    abuse_y = (of == 4).astype(np.int64)
    abuse = fit("abuse", x[in_abuse], abuse_y[in_abuse], np.ones(int(in_abuse.sum())), c=4.0)

    by_group = [[t for t, g in zip(texts, of, strict=True) if g == k] for k in range(len(groups))]
    words = lexicon(by_group[4], by_group[5], by_group[0] + by_group[1])
    about = {"alpha": ALPHA, "rows": {n: len(g) for n, g in zip(
        ("ordinary", "contrast harmless", "harmful", "contrast harmful", "abusive", "neither"), groups, strict=True
    )}, "calibration": len(held), "lexicon": len(words)}  # fmt: skip
    write_weights(args.out, Weights((harm, abuse), idf, words, about))

    detector = ViolationDetector(args.out)
    checked = [detector.check(text) for text in held]
    limited = tuple(
        replace(
            c, limit=max(LEAST, conformal_limit([k.scores[c.name] for k in checked], ALPHA / 2))
        )
        for c in detector.weights.categories
    )
    write_weights(args.out, replace(detector.weights, categories=limited))
    print(about, {c.name: c.limit for c in limited})


if __name__ == "__main__":
    main()
