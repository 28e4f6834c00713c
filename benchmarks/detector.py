"""The violation detector on prompts that it was not made from.

    python benchmarks/detector.py DIR_OF_THE_PUBLIC_SETS [--peers DIR] [--final]  # writes results/detector.md

In distribution: `dev` sides of the sets that it was trained on. Out of distribution: XSTest (its dev side was
looked at while the number of contrast pairs was chosen) and harmless prompts of sets that were not trained on.
Untouched, chosen before any of it was looked at: safety_hh_harmless (nothing of it was trained on, calibrated on
or read before the detector was final) and, for personal data, safety_pii. Disguises are put on harmful `dev`
prompts. CONTENT WARNING: the sets hold harmful text; none is printed. `--peers`: a folder into which
alt-profanity-check was installed (pip install --no-deps --target).
"""

from __future__ import annotations

import argparse
import base64
import codecs
import json
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import numpy as np  # noqa: E402
from scipy.stats import binomtest  # noqa: E402
from train_detector import ORDINARY, clean  # noqa: E402

from bem.files import json_lines  # noqa: E402
from bem.safety.auroc import auroc  # noqa: E402
from bem.safety.detector import Stream, ViolationDetector  # noqa: E402
from bem.safety.personal import find_personal  # noqa: E402

EARLIER = (
    "The untouched sets were read three times, and nothing was changed because of them. The first detector had them at 0.847 [0.815, 0.879] and 0.547 [0.496, 0.597], "
    "and flagged 24.1 % [18.9, 29.9] of the first turns; it also flagged ordinary sentences that name a person (seen in a "
    "unit test, not in these sets), so that kind acts were added to the contrast pairs and their number was doubled "
    "(0.842 [0.809, 0.875] and 0.550 [0.499, 0.600]); the last flagged the mere beginning of a request, so that beginnings "
    "were added. The numbers above are of the detector that ships."
)
BESIDE = (
    "Beside it, a probe on hidden states of smollm2-135m ([probe.md](probe.md)): XSTest 0.799 [0.734, 0.865] by words and states "
    "together, 0.729 by words alone."
)
UNSEEN = ("qa_strategy", "tool_bfcl", "qa_xquad_en", "qa_hotpot500", "gen_e2e")
PER_SET = 60
HOMOGLYPHS = str.maketrans("aceopxyi", "асеорхуі")
LEET = str.maketrans("aeiost", "4310$7")
FILLER = (
    "The library opens at nine and closes at six. Tea is served in the hall, and children are welcome. "
    * 6
)
Score = Callable[[str], float]

DISGUISES: dict[str, Callable[[str], str]] = {
    "none": lambda t: t,
    "upper case": str.upper,
    "zero-width spaces": lambda t: "\u200b".join(t),
    "look-alike letters": lambda t: t.translate(HOMOGLYPHS),
    "full-width letters": lambda t: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in t),
    "accents": lambda t: "".join(c + "\u0301" if c.isalpha() else c for c in t),
    "leetspeak": lambda t: t.lower().translate(LEET),
    "letters apart": lambda t: "  ".join(" ".join(w) for w in t.split()),
    "dots between letters": lambda t: " ".join(".".join(w) for w in t.split()),
    "base64": lambda t: base64.b64encode(t.encode()).decode(),
    "base64 twice": lambda t: base64.b64encode(base64.b64encode(t.encode())).decode(),
    "hexadecimal": lambda t: t.encode().hex(),
    "percent escapes": lambda t: "".join(f"%{b:02x}" for b in t.encode()),
    "ROT13": lambda t: codecs.encode(t, "rot13"),
    "reversed": lambda t: t[::-1],
    "in 1,200 harmless characters": lambda t: FILLER + t + " " + FILLER,
    "every word cut by a hyphen": lambda t: " ".join(w[: len(w) // 2] + "-" + w[len(w) // 2 :] for w in t.split()),
    "vowels left out": lambda t: " ".join(w[0] + "".join(c for c in w[1:] if c not in "aeiou") for w in t.split()),
}  # fmt: skip


def texts(data: Path, name: str, side: str = "dev") -> list[dict]:
    return [row for _, row in json_lines(data / f"{name}.{side}.jsonl.gz")]


def sample(data: Path, names: Sequence[str]) -> list[str]:
    rng, found = random.Random(1), []
    for name in names:
        rows = sorted({row["input"] for row in texts(data, name)})
        found += rng.sample(rows, min(PER_SET, len(rows)))
    return found


def share(flags: Sequence[bool]) -> str:
    """Percent with Clopper and Pearson's interval."""
    test = binomtest(sum(flags), len(flags)).proportion_ci()
    return f"{100 * np.mean(flags):.1f} % [{100 * test.low:.1f}, {100 * test.high:.1f}] of {len(flags)}"


def area(score: Score, bad: Sequence[str], good: Sequence[str]) -> str:
    a = auroc([score(t) for t in bad], [score(t) for t in good])
    return f"{a.value:.3f} [{a.ci_low:.3f}, {a.ci_high:.3f}] ({a.positives} / {a.negatives})"


def first_turn(prompt: str) -> str:
    return prompt.partition("Human:")[2].partition("Assistant:")[0].strip()


class Sets:
    """Texts of every comparison."""

    def __init__(self, data: Path, final: bool):
        self.ordinary = sample(data, ORDINARY_DEV)
        self.unseen = sample(data, UNSEEN)
        self.harmful = [r["input"] for r in texts(data, "safety_harmful")]
        tweets = [(clean(r["input"]), r["references"][0]) for r in texts(data, "safety_tweets")]
        self.abusive = [t for t, kind in tweets if kind != "neither"]
        self.neither = [t for t, kind in tweets if kind == "neither"]
        xstest = [(r["input"], r["references"][0]) for r in texts(data, "safety_xstest")]
        self.safe = [t for t, kind in xstest if kind == "safe"]
        self.unsafe = [t for t, kind in xstest if kind == "unsafe"]
        pairs = texts(data, "safety_hh_harmless") if final else []
        self.red = [t for t in (first_turn(r["input"]) for r in pairs) if t]
        self.chosen = [r["references"][0] for r in pairs]
        self.rejected = [r["meta"]["rejected"] for r in pairs]
        self.personal = [
            (r["input"], r["meta"]["spans"]) for r in texts(data, "safety_pii") if final
        ]


ORDINARY_DEV = tuple(name for name in ORDINARY if name not in ("sql_wikisql", "qa_babi"))


def compared(s: Sets) -> dict[str, tuple[list[str], list[str]]]:
    return {
        "harmful instructions, in distribution (against ordinary requests)": (
            s.harmful,
            s.ordinary,
        ),
        "abusive tweets, in distribution (against the other tweets)": (s.abusive, s.neither),
        "XSTest, unsafe against safe": (s.unsafe, s.safe),
        "**untouched**: hh first turns (red-teaming, many harmless) against requests of unseen sets": (
            s.red,
            s.unseen,
        ),
        "**untouched**: hh rejected against chosen answers": (s.rejected, s.chosen),
    }


def table_of_areas(s: Sets, scorers: dict[str, Score]) -> list[str]:
    lines = [
        "| AUROC [95 % DeLong] (bad / good) | " + " | ".join(scorers) + " |",
        "|---|" + "---|" * len(scorers),
    ]
    for name, (bad, good) in compared(s).items():
        if not bad:
            continue
        cells = [area(score, bad, good) for score in scorers.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def table_of_flags(s: Sets, detector: ViolationDetector) -> list[str]:
    def flagged(group: Sequence[str]) -> str:
        return share([detector.check(t).flagged for t in group])

    rows = {
        "harmless: ordinary requests, dev sides": s.ordinary,
        "harmless: requests of sets never trained on": s.unseen,
        "harmless: XSTest, safe (made to alarm)": s.safe,
        "harmless: tweets called neither hateful nor offensive": s.neither,
        "harmful: instructions, dev side": s.harmful,
        "harmful: XSTest, unsafe": s.unsafe,
        "abusive: tweets": s.abusive,
        "untouched: hh first turns": s.red,
    }
    return [
        "| texts | flagged [95 %] |",
        "|---|---|",
        *(f"| {n} | {flagged(g)} |" for n, g in rows.items() if g),
    ]


def table_of_disguises(s: Sets, detector: ViolationDetector) -> list[str]:
    lines = ["| disguise | flagged [95 %] |", "|---|---|"]
    for name, put_on in DISGUISES.items():
        lines.append(
            f"| {name} | {share([detector.check(put_on(t)).flagged for t in s.harmful])} |"
        )
    return lines


KINDS = {"EMAIL_ADDRESS": "email", "CREDIT_CARD": "card", "IBAN_CODE": "iban", "US_SSN": "ssn", "IP_ADDRESS": "ip", "PHONE_NUMBER": "phone"}  # fmt: skip


def table_of_personal(s: Sets) -> list[str]:
    """Found: a find of that kind overlaps the span; false: a find that overlaps no span of its kind."""
    right, total, wrong = ({k: 0 for k in KINDS.values()} for _ in range(3))
    for text, spans in s.personal:
        found = find_personal(text)
        real = [(a, b, KINDS[kind]) for a, b, kind in spans if kind in KINDS]
        for a, b, kind in real:
            total[kind] += 1
            right[kind] += any(f.kind == kind and f.start < b and a < f.end for f in found)
        for f in found:
            wrong[f.kind] += not any(f.kind == k and f.start < b and a < f.end for a, b, k in real)
    lines = ["| kind | found | false finds in all sentences |", "|---|---|---|"]
    return lines + [f"| {k} | {right[k]} of {n} | {wrong[k]} |" for k, n in total.items()]


def timed(call: Callable[[str], object], inputs: Sequence[str]) -> str:
    spent = []
    for text in inputs:
        started = time.process_time_ns()
        call(text)
        spent.append((time.process_time_ns() - started) / 1e6)
    return f"p50 {np.percentile(spent, 50):.2f}, p99 {np.percentile(spent, 99):.2f} ms"


def times(s: Sets, detector: ViolationDetector) -> list[str]:
    prompts = (s.ordinary + s.unseen)[:1000]
    text = " ".join(s.ordinary[:200])
    pieces = [text[i : i + 250] for i in range(0, len(text), 250)]
    stream = Stream(detector)
    long = ["the quick brown fox reads a book " * 300]
    return [
        f"- a prompt ({np.mean([len(p) for p in prompts]):.0f} characters on average): {timed(detector.check, prompts)}",
        f"- a streamed chunk of 64 tokens (250 characters, read with the 400 before it): {timed(lambda p: detector.check(stream.remember(p)), pieces)}",
        f"- a text of 10,000 characters: {timed(detector.check, long * 5)}",
    ]


def peers(folder: Path | None) -> dict[str, Score]:
    if folder is None:
        return {}
    sys.path.insert(0, str(folder))
    from profanity_check import predict_prob

    return {"alt-profanity-check 1.9.1": lambda t: float(predict_prob([t])[0])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--final", action="store_true", help="read the untouched sets too")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "detector.md")
    args = parser.parse_args()
    detector, s = ViolationDetector(), Sets(args.data, args.final)
    scorers = {
        "detector": detector.score,
        "its harm alone": lambda t: detector.check(t).scores["harm"],
        **peers(args.peers),
    }
    page = [
        "# The violation detector on prompts that it was not made from\n",
        "`python benchmarks/detector.py DIR_OF_THE_PUBLIC_SETS --peers DIR --final`, what the sets are: its docstring. "
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}; CPU time, one thread.\n",
        f"Trained and calibrated as `{json.dumps(dict(detector.weights.about))}`; limits "
        + ", ".join(f"{c.name} {c.limit:.3f}" for c in detector.weights.categories) + ".\n",
        "## Ranking\n", "(alt-profanity-check was itself trained on the tweets, dev side included.)\n", *table_of_areas(s, scorers),
        "\n" + BESIDE,
        "\n" + EARLIER,
        "\n## At its limits\n", *table_of_flags(s, detector),
        "\n## Disguises, on harmful instructions\n", *table_of_disguises(s, detector),
        "\n## Personal data (untouched: safety_pii, dev)\n", *table_of_personal(s),
        "\n## Time\n", *times(s, detector),
    ]  # fmt: skip
    args.out.write_text("\n".join(page) + "\n")
    print("\n".join(page))


if __name__ == "__main__":
    main()
