"""Train a linear probe on a base's hidden states for the violation detector.

    python scripts/train_probe.py --data DIR_OF_THE_PUBLIC_SETS --base smollm2-135m --out bem/safety/violation-probe

Harmful: public harmful instructions and the contrast pairs of detector_pairs.py; harmless: the alarming half of
the pairs, and ordinary requests. Block, pooling and strength are chosen by AUROC on what a fold left out: whole
verbs of the pairs, whole sets of ordinary requests. Training sides alone; safety_xstest and safety_hh_harmless
are not read. States are kept in --states, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import random
from hashlib import sha256
from itertools import product
from pathlib import Path

import numpy as np
from detector_pairs import HARMLESS, VERBS_ON_PEOPLE, contrast_pairs
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from bem.adapters.sites import find_sites
from bem.adapters.version import base_digest
from bem.bases.load import load_base
from bem.files import json_lines
from bem.safety.auroc import auroc
from bem.safety.fit import DEPTHS, Reader
from bem.safety.probe import LONGEST, Probe, write_probe

ORDINARY = (
    "cmd_tldr", "intent_clinc150", "intent_banking77", "math_gsm8k", "qa_nq_oracle", "json_snips", "sql_wikisql",
    "qa_babi",
)  # fmt: skip
POOLS = ("last", "mean")
STRENGTHS = (0.001, 0.01, 0.1)
FOLDS = 5


def sampled(data: Path, name: str, count: int) -> list[str]:
    found = sorted({row["input"] for _, row in json_lines(data / f"{name}.train.jsonl.gz")})
    return random.Random(3).sample(found, min(count, len(found)))


def rows(data: Path, each: int) -> list[tuple[str, int, str]]:
    """(text, harmful or not, what goes into one fold together)."""
    alarming, meant = contrast_pairs(each, seed=2)
    found = [(t, 0, _verb(t)) for t in alarming] + [(t, 1, _verb(t)) for t in meant]
    instructions = sampled(data, "safety_harmful", each // 2)
    found += [(t, 1, f"instructions {i % FOLDS}") for i, t in enumerate(instructions)]
    for name in ORDINARY:
        found += [(t, 0, name) for t in sampled(data, name, each // 2 // len(ORDINARY))]
    return found


def _verb(text: str) -> str:
    return next((v for v in (*HARMLESS, *VERBS_ON_PEOPLE) if v in text.lower()), "other")


def states(reader: Reader, texts: list[str], kept: Path) -> NDArray[np.float32]:
    """(texts, pools, blocks, d), read once each."""
    known: dict[str, NDArray[np.float16]] = {}
    if kept.is_file():
        with np.load(kept) as held:
            known = {name: held[name] for name in held.files}
    for number, text in enumerate(texts):
        name = sha256(text.encode()).hexdigest()
        if name not in known:
            pooled = reader.pooled(text[-LONGEST:])
            known[name] = np.stack([pooled[p].numpy() for p in POOLS]).astype(np.float16)
        if number % 100 == 99 or number == len(texts) - 1:
            np.savez(kept, **known)
            print(f"{number + 1} of {len(texts)}", flush=True)
    return np.stack([known[sha256(t.encode()).hexdigest()] for t in texts]).astype(np.float32)


def out_of_fold(x: NDArray, y: NDArray, groups: list[str], c: float) -> NDArray[np.float64]:
    scores = np.zeros(len(y))
    for train, held in GroupKFold(FOLDS, shuffle=True, random_state=0).split(x, y, groups):
        scale = StandardScaler().fit(x[train])
        model = LogisticRegression(C=c, class_weight="balanced", max_iter=2000)
        model.fit(scale.transform(x[train]), y[train])
        scores[held] = model.decision_function(scale.transform(x[held]))
    return scores


def worth(scores: NDArray, y: NDArray, pairs: NDArray) -> float:
    """Mean AUROC of the pairs among themselves, and of instructions against ordinary requests."""
    areas = [auroc(scores[m & (y == 1)], scores[m & (y == 0)]).value for m in (pairs, ~pairs)]
    return float(np.mean(areas))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--each", type=int, default=250, help="contrast texts of each kind")
    parser.add_argument("--states", type=Path, default=Path("states.npz"))
    args = parser.parse_args()

    base, tokenizer = load_base(args.base)
    names = find_sites(base).blocks
    blocks = sorted({int(len(names) * share) for share in DEPTHS})
    made = rows(args.data, args.each)
    y, groups = np.array([label for _, label, _ in made]), [group for _, _, group in made]
    pairs = np.arange(len(made)) < 2 * args.each
    reader = Reader(base, tokenizer, [names[b] for b in blocks])
    x = states(reader, [text for text, _, _ in made], args.states)

    tried = []
    for (p, pool), (b, block), c in product(enumerate(POOLS), enumerate(blocks), STRENGTHS):
        scores = out_of_fold(x[:, p, b], y, groups, c)
        tried.append((worth(scores, y, pairs), pool, block, c, p, b, scores))
        print(f"{pool} block {block} C {c}: {tried[-1][0]:.4f}", flush=True)
    value, pool, block, c, p, b, scores = max(tried, key=lambda each: each[0])
    platt = LogisticRegression(C=1e6, class_weight="balanced").fit(scores[:, None], y)
    scale = StandardScaler().fit(x[:, p, b])
    model = LogisticRegression(C=c, class_weight="balanced", max_iter=2000)
    model.fit(scale.transform(x[:, p, b]), y)
    about = {"base": args.base, "rows": len(made), "harmful": int(y.sum()), "strength": c, "left_out_auroc": value, "tried": len(tried)}  # fmt: skip
    weights = model.coef_[0], scale.mean_, scale.scale_
    probe = Probe(
        base_digest(base), block, pool, *(w.astype(np.float32) for w in weights),
        float(model.intercept_[0]), float(platt.coef_[0, 0]), float(platt.intercept_[0]), about,
    )  # fmt: skip
    write_probe(args.out, probe)
    print(block, pool, about)


if __name__ == "__main__":
    main()
