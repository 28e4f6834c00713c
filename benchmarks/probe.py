"""A probe on hidden states beside the violation detector, on prompts that neither was made from.

    python benchmarks/probe.py DIR_OF_THE_PUBLIC_SETS [--probe DIR] [--base smollm2-135m]   # writes results/probe.md

Three scorers: words (the detector's `harm`), states (the probe of scripts/train_probe.py), and both (the mean of their
log odds, weights not fitted). The probe's block, pooling and strength were chosen on what folds of other sets left
out; XSTest and hh were read once, by this script, after that. CONTENT WARNING: the sets hold harmful text; none is
printed.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
from detector import ORDINARY_DEV, UNSEEN, first_turn, texts  # noqa: E402
from scipy.stats import norm, rankdata  # noqa: E402

from bem.bases.load import load_base  # noqa: E402
from bem.safety.auroc import auroc  # noqa: E402
from bem.safety.detector import ViolationDetector  # noqa: E402
from bem.safety.probe import SHIPPED, HiddenProbe, log_odds_of, read_probe  # noqa: E402

Scores = dict[str, list[float]]


def sampled(data: Path, names: Sequence[str], count: int) -> list[str]:
    found = sorted({row["input"] for name in names for row in texts(data, name)})
    return random.Random(5).sample(found, min(count, len(found)))


def sets(data: Path, most: int) -> dict[str, tuple[list[str], list[str]]]:
    """Name -> (bad, good)."""
    xstest = [(r["input"], r["references"][0]) for r in texts(data, "safety_xstest")]
    hh = [t for t in (first_turn(r["input"]) for r in texts(data, "safety_hh_harmless")) if t]
    return {
        "XSTest, unsafe against safe": tuple([t for t, k in xstest if k == kind] for kind in ("unsafe", "safe")),
        "harmful instructions, dev, against ordinary requests, dev": (
            [r["input"] for r in texts(data, "safety_harmful")],
            sampled(data, ORDINARY_DEV, most),
        ),
        "hh first turns against requests of sets never trained on": (
            random.Random(6).sample(hh, min(most, len(hh))),
            sampled(data, UNSEEN, most),
        ),
    }  # fmt: skip


def scored(probe: HiddenProbe, words: ViolationDetector, prompts: Sequence[str]) -> Scores:
    by_words = [log_odds_of(words.check(t).scores["harm"]) for t in prompts]
    by_states = [probe.log_odds(t) for t in prompts]
    both = [(a + b) / 2 for a, b in zip(by_words, by_states, strict=True)]
    return {"words": by_words, "states": by_states, "both": both}


def placements(bad: Sequence[float], good: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    m, n = len(bad), len(good)
    together = rankdata(np.concatenate([bad, good]))
    return (together[:m] - rankdata(bad)) / n, 1 - (together[m:] - rankdata(good)) / m


def gain(bad: Scores, good: Scores, name: str, over: str) -> str:
    """AUROC of one scorer minus that of another on the same prompts (DeLong's paired interval)."""
    ours, theirs = (placements(bad[s], good[s]) for s in (name, over))
    x, y = ours[0] - theirs[0], ours[1] - theirs[1]
    reach = norm.ppf(0.975) * np.sqrt(x.var(ddof=1) / len(x) + y.var(ddof=1) / len(y))
    return f"{x.mean():+.3f} [{x.mean() - reach:+.3f}, {x.mean() + reach:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--probe", type=Path, default=SHIPPED)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--most", type=int, default=100, help="of each kind, but XSTest: all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "probe.md")
    args = parser.parse_args()
    started, words = time.process_time(), ViolationDetector()
    model, tokenizer = load_base(args.base)
    probe = HiddenProbe(model, tokenizer, read_probe(args.probe))
    about = ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in probe.probe.about.items())  # fmt: skip
    page = [
        f"# A probe on the hidden states of {args.base}, beside the violation detector\n",
        f"`python benchmarks/probe.py DIR_OF_THE_PUBLIC_SETS --base {args.base} --most {args.most}`; what the scorers are: its docstring.\n",
        f"Probe: block {probe.probe.block}, state of {probe.probe.pool}; {about}.\n",
        "| AUROC [95 % DeLong] (bad / good) | words | states | both | both - words, paired |",
        "|---|---|---|---|---|",
    ]
    for name, (bad, good) in sets(args.data, args.most).items():
        b, g = scored(probe, words, bad), scored(probe, words, good)
        areas = [auroc(b[s], g[s]) for s in ("words", "states", "both")]
        cells = [f"{a.value:.3f} [{a.ci_low:.3f}, {a.ci_high:.3f}]" for a in areas]
        page.append(f"| {name} ({len(bad)} / {len(good)}) | {' | '.join(cells)} | {gain(b, g, 'both', 'words')} |")  # fmt: skip
        print(page[-1], flush=True)
        spent = f"\n{time.process_time() - started:.0f} CPU seconds, one thread."
        args.out.write_text("\n".join([*page, spent]) + "\n")


if __name__ == "__main__":
    main()
