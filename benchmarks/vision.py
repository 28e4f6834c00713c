"""What the shipped vision tower sees, when it says that it does not know, and what pictures do for routing.

    python benchmarks/vision.py DIR_OF_THE_PUBLIC_SETS [--part claims ...]      # writes results/vision.md

Machine claims and drawn scenes are of seeds that training never used. NLVR's sentences are people's; its pictures are
drawn from the scenes. Photographs are crops of those that scikit-learn and matplotlib bring along (three in all). A
part's section is kept in results/vision.md until that part is run again.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from bem.safety.auroc import auroc  # noqa: E402
from bem.stats.bootstrap import bca_bootstrap  # noqa: E402
from bem.stats.shares import wilson  # noqa: E402
from bem.tasks.pictures import pictures_for, read_omniglot, scene_of_row, sighted  # noqa: E402
from bem.training.data import Example, read_jsonl  # noqa: E402
from bem.training.linear import PENALTIES, fit_linear  # noqa: E402
from bem.vision.claims import NUMBERS  # noqa: E402
from bem.vision.eyes import Eyes, count_probability, probability  # noqa: E402
from bem.vision.load import load_tower  # noqa: E402
from bem.vision.scenes import BOX, COLOURS, GAP, Picture, draw, draw_scene  # noqa: E402
from bem.vision.tiny import PATCH  # noqa: E402
from bem.vision.truths import KINDS, drawn_claim, is_true  # noqa: E402

SEED = 20_260
Lines = list[str]


def share(hits: Sequence[bool]) -> str:
    """Per cent with Wilson's interval."""
    n, found = len(hits), int(np.sum(hits))
    low, high = wilson(found, n)
    return f"{100 * found / n:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {n}"


def mean_of(values: Sequence[float], clusters: Sequence[str] | None = None) -> str:
    """Mean with its BCa interval."""
    x = np.asarray(values, dtype=np.float64)
    if np.ptp(x) == 0:
        return f"{x.mean():+.3f} (all of {len(x)} alike)"
    found = bca_bootstrap(x, clusters=clusters)
    return f"{found.observed:+.3f} [{found.lower:+.3f}, {found.upper:+.3f}]"


# --- claims of machines ---------------------------------------------------------------------------


def claims(eyes: Eyes, data: Path) -> Lines:
    rng = np.random.default_rng([SEED, 1])
    scores: dict[str, list[tuple[float, bool]]] = {kind: [] for kind in KINDS}
    spent = []
    for number in range(150):
        scene = draw_scene(rng, boxes=1 + number % 3)
        while not any(scene):
            scene = draw_scene(rng, boxes=1 + number % 3)
        started = time.process_time()
        seen = eyes.tower.encode([draw(scene, rng)])
        spent.append(1000 * (time.process_time() - started))
        for kind in KINDS:
            claim = drawn_claim(scene, kind, rng)
            support = eyes.tower.support(seen, claim.phrases)[0]
            of = {phrase: support[:, at] for at, phrase in enumerate(claim.phrases)}
            p = probability(claim, of, seen.grid)
            assert p is not None
            scores[kind].append((p, is_true(claim, scene)))
    every = [pair for pairs in scores.values() for pair in pairs]
    rows = [("all kinds", every), *scores.items()]
    lines = [
        "| claims | AUROC [95 % DeLong] | true / false | Brier | right at 0.5 |",
        "|---|---|---|---|---|",
    ]
    for name, pairs in rows:
        yes, no = ([p for p, true in pairs if true == side] for side in (True, False))
        found = auroc(yes, no)
        brier = np.mean([(p - true) ** 2 for p, true in pairs])
        right = share([(p > 0.5) == true for p, true in pairs])
        lines.append(f"| {name} | {found.value:.4f} [{found.ci_low:.4f}, {found.ci_high:.4f}] | {len(yes)} / {len(no)} | {brier:.3f} | {right} |")  # fmt: skip
    return [*lines, f"\nA picture takes {np.median(spent):.0f} ms (median CPU time, one thread)."]


# --- swapped pictures -----------------------------------------------------------------------------


def swaps(eyes: Eyes, data: Path) -> Lines:
    rng = np.random.default_rng([SEED, 2])
    shown, texts = [], []
    while len(shown) < 100:
        scene = draw_scene(rng, boxes=1)
        drawn = [drawn_claim(scene, kind, rng) for kind in ("present", "count", "present")]
        true = [claim.text for claim in drawn if is_true(claim, scene)]
        if len(true) >= 2 and any(scene):
            shown.append(draw(scene, rng))
            texts.append(". ".join(true) + ".")
    swapped = [shown[at ^ 1] for at in range(len(shown))]
    own, other = eyes.look_at(shown, texts), eyes.look_at(swapped, texts)
    raised = [o.conflict - r.conflict for r, o in zip(own, other, strict=True)]
    return [
        f"- conflict with the own picture: {np.mean([r.conflict for r in own]):.3f}; with that of another scene: "
        f"{np.mean([o.conflict for o in other]):.3f}; difference {mean_of(raised)} of {len(raised)} texts",
        f"- gate shut by conflict: own {share([r.why.startswith('conflict') for r in own])}, swapped "
        f"{share([r.why.startswith('conflict') for r in other])} (a text may be true of the other scene too)",
    ]


# --- abstention -----------------------------------------------------------------------------------


def abstention(eyes: Eyes, data: Path) -> Lines:
    rng = np.random.default_rng([SEED, 3])
    n = 100
    kinds: dict[str, list[Picture]] = {
        "blank: one colour": [np.full((100, 100 + 150 * (i % 3), 3), rng.integers(0, 256, 3)).astype(np.uint8) for i in range(n)],
        "noise: uniform, every pixel": [rng.integers(0, 256, (100, 100 + 150 * (i % 3), 3)).astype(np.uint8) for i in range(n)],
        "noise: Gaussian around grey": [np.clip(rng.normal(128, rng.uniform(20, 80), (100, 100, 3)), 0, 255).astype(np.uint8) for _ in range(n)],
        "noise: salt and pepper": [np.repeat(255 * (rng.random((100, 100, 1)) < 0.5), 3, -1).astype(np.uint8) for _ in range(n)],
        "photographs (crops of three)": crops(rng, n),
        "hand-drawn characters (omniglot)": [d.picture for d in read_omniglot(data / "vision_omniglot.train.npz")[::36]],
    }  # fmt: skip
    lines = ["| pictures | abstains [95 %] |", "|---|---|"]
    for name, pictures in kinds.items():
        lines.append(f"| {name} | {share([eyes.look(p).gate == 0 for p in pictures])} |")
    scenes = [draw_scene(rng, 1 + i % 3) for i in range(n)]
    known = [draw(s, rng) for s in scenes if any(s)]
    nlvr = [draw(scene_of_row(row)) for row in nlvr_rows(data, "dev")]
    for name, pictures in (("fresh scenes", known), ("NLVR's scenes (dev)", nlvr)):
        lines.append(f"| *known*: {name} | {share([eyes.look(p).gate == 0 for p in pictures])} |")
    return lines


def crops(rng: np.random.Generator, n: int) -> list[Picture]:
    import matplotlib
    import sklearn
    from PIL import Image

    folder = Path(sklearn.__file__).parent / "datasets" / "images"
    paths = [folder / "china.jpg", folder / "flower.jpg", Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"]  # fmt: skip
    photos = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    found = []
    for number in range(n):
        photo = photos[number % 3]
        side = int(rng.integers(100, min(photo.shape[:2])))
        y, x = (int(rng.integers(0, photo.shape[a] - side + 1)) for a in (0, 1))
        found.append(photo[y : y + side, x : x + side])
    return found


# --- people's sentences ---------------------------------------------------------------------------

NOUNS = {"circle", "square", "triangle", "block", "item", "object", "thing", "shape", "box"}
WORDS = [
    "exactly",
    "at least",
    "only",
    "all",
    "no ",
    "not",
    "touch",
    "tower",
    "box",
    "same",
    "top",
    "two",
    "one",
    "three",
]
PHRASE = re.compile(
    rf"(?:(?P<n>\d|{'|'.join(NUMBERS)}|a|an|no) )?(?:(?P<c>{'|'.join(COLOURS)}) )?(?P<s>{'|'.join(sorted(NOUNS - {'box'}))})s?\b"
)


def nlvr_rows(data: Path, side: str) -> list[Example]:
    return read_jsonl(data / f"vision_nlvr.{side}.jsonl.gz")


def sentence_numbers(eyes: Eyes, row: Example, picture: Picture) -> tuple[list[float], list[float]]:
    """(what the words alone say, what the picture says of the phrases that are read)."""
    text = row.input.lower()
    seen = eyes.tower.encode([picture])
    flags = [float(word in text) for word in WORDS]
    found = []
    columns = torch.arange(seen.grid[1]).repeat(seen.grid[0])
    for match in PHRASE.finditer(text):
        noun = match["s"]
        noun = "thing" if noun in ("item", "object", "shape", "thing") else noun
        phrase = " ".join(filter(None, (match["c"], noun)))
        said = match["n"] or ""
        n = int(said) if said.isdigit() else NUMBERS.get(said, 1)
        support = eyes.tower.support(seen, [phrase])[0, :, 0]
        boxes = []
        for box in range(3):
            left = box * (BOX + GAP) // PATCH
            boxes.append(support * ((columns >= left) & (columns <= left + BOX // PATCH)))
        asked = [(n, 1 << 20), (n, n)]
        whole = [count_probability(support, *a) for a in asked]
        per_box = [[count_probability(s, *a) for a in asked] for s in boxes]
        found.append(
            [*whole, *np.max(per_box, 0), *np.min(per_box, 0), min(9.0, float(support.sum())) / 9]
        )
    if not found:
        return [*flags, 0.0], [0.0] * 14
    return [*flags, min(len(found), 4) / 4], [*np.min(found, 0), *np.mean(found, 0)]


def people(eyes: Eyes, data: Path) -> Lines:
    rows = {side: nlvr_rows(data, side) for side in ("train", "dev")}
    numbers = {
        side: [sentence_numbers(eyes, r, draw(scene_of_row(r))) for r in of]
        for side, of in rows.items()
    }
    truth = {
        side: np.array([r.references[0].lower() == "true" for r in of]) for side, of in rows.items()
    }
    group = [row.id.rsplit("-", 1)[0] for row in rows["dev"]]
    rng = np.random.default_rng([SEED, 4])
    order = rng.permutation(len(rows["dev"]))
    shuffled = [
        sentence_numbers(eyes, r, draw(scene_of_row(rows["dev"][at])))[1]
        for r, at in zip(rows["dev"], order, strict=True)
    ]
    majority = truth["train"].mean() > 0.5
    base = truth["dev"] == majority
    w, p = ({side: [pair[i] for pair in numbers[side]] for side in rows} for i in (0, 1))
    both = {
        side: [
            [*a, *b, *np.outer(a[:5], b[:7]).ravel()] for a, b in zip(w[side], p[side], strict=True)
        ]
        for side in rows
    }
    mixed = [
        [*a, *b, *np.outer(a[:5], b[:7]).ravel()] for a, b in zip(w["dev"], shuffled, strict=True)
    ]
    model, alone = chosen(both["train"], truth["train"]), chosen(w["train"], truth["train"])
    tried = {
        "words and picture": model(torch.tensor(both["dev"]).float()).numpy().astype(bool),
        "words and another row's picture": model(torch.tensor(mixed).float()).numpy().astype(bool),
        "words alone": alone(torch.tensor(w["dev"]).float()).numpy().astype(bool),
    }
    lines = [
        f"Logistic regression on {len(rows['train'])} sentences of `train` (penalty chosen on five folds); "
        f"{len(rows['dev'])} of `dev`, {len(set(group))} scenes; the majority ({'true' if majority else 'false'}) is right for {100 * base.mean():.1f} %.\n",
        "| reads | right [95 %] | minus the majority [95 % BCa, scenes as units] |",
        "|---|---|---|",
    ]
    for name, said in tried.items():
        right = said == truth["dev"]
        lines.append(
            f"| {name} | {share(list(right))} | {mean_of(right.astype(float) - base, group)} |"
        )
    return lines


def chosen(features: Sequence[Sequence[float]], truth: np.ndarray):
    """Logistic regression under the penalty that is best on five folds."""
    x, y = torch.tensor(features).float(), torch.tensor(truth).long()
    folds = torch.arange(len(x)) % 5
    losses = []
    for penalty in PENALTIES:
        parts = []
        for fold in range(5):
            out = folds == fold
            fitted = fit_linear(x[~out], y[~out], 2, penalty)
            parts.append(torch.nn.functional.cross_entropy(fitted.scores(x[out]), y[out]))
        losses.append(float(torch.stack(parts).mean()))
    return fit_linear(x, y, 2, PENALTIES[int(np.argmin(losses))])


# --- omniglot -------------------------------------------------------------------------------------


def omniglot(eyes: Eyes, data: Path) -> Lines:
    drawings = read_omniglot(data / "vision_omniglot.train.npz")
    drawers = sorted({d.drawer for d in drawings})
    kept = {drawers[0], drawers[-1]}
    drawings = [d for d in drawings if d.drawer in kept]
    seen = torch.cat([eyes.tower.encode([d.picture]).summary for d in drawings])
    seen = (seen - seen.mean(0)) / seen.std(0).clamp(min=1e-3)
    first = torch.tensor([d.drawer == drawers[0] for d in drawings])
    nearest = torch.cdist(seen[~first], seen[first]).argmin(1)
    gallery = [d for d in drawings if d.drawer == drawers[0]]
    asked = [d for d in drawings if d.drawer != drawers[0]]
    same = [
        (gallery[int(at)].alphabet, gallery[int(at)].character) == (d.alphabet, d.character)
        for at, d in zip(nearest, asked, strict=True)
    ]
    alphabet = [
        gallery[int(at)].alphabet == d.alphabet for at, d in zip(nearest, asked, strict=True)
    ]
    return [
        f"One drawing of each of {len(gallery)} characters by one person, asked for by another person's; nearest `summary`. "
        "The tower was not made for it.\n",
        f"- the character: {share(same)}; chance {100 / len(gallery):.1f} %",
        f"- its alphabet: {share(alphabet)}; chance about {100 / len({d.alphabet for d in gallery}):.1f} %",
    ]


# --- routing --------------------------------------------------------------------------------------

SKILLS = ("json", "intent", "slots")
CUES = ("Answer in JSON.", "Name the intent only.", "List the slots.")
ASKED = "Do what the picture stands for."


def conversations(
    data: Path, side: str, n: int, by_picture: bool
) -> tuple[list[Example], list[int]]:
    """Two turns each: another skill first, then one that the picture stands for, or that the text names."""
    rng = np.random.default_rng([SEED, 5, side == "dev", by_picture])
    said = [row.input for row in read_jsonl(data / f"json_snips.{side}.jsonl.gz")]
    rows, skills = [], []
    for number in range(3 * n):
        skill = number % 3
        before = int((skill + rng.integers(1, 3)) % 3)
        one, two = (said[int(rng.integers(len(said)))] for _ in range(2))
        cue = ASKED if by_picture else CUES[skill]
        kind = "picture" if by_picture else "text"
        history = ((f"{CUES[before]} {one}", "Done."),)
        meta = {"label": SKILLS[skill]}
        rows.append(
            Example(f"{kind}-{side}-{number}", f"{cue} {two}", (), history=history, meta=meta)
        )
        skills.append(skill)
    return rows, skills


def routing(eyes: Eyes, data: Path) -> Lines:
    from bem.bases.load import load_base
    from bem.routing.mount import blank_expert
    from bem.training.fit_router import fit_router
    from bem.training.router_scores import at_turns, router_path
    from bem.training.router_targets import prompts_of
    from bem.training.routing_rows import read_routing_rows

    rng = np.random.default_rng([SEED, 6])
    taught: list[Example] = []
    for by_picture in (True, False):
        rows, skills = conversations(data, "train", 50, by_picture)
        shown = skills if by_picture else [int(s) for s in rng.integers(0, 3, len(rows))]
        taught += sighted(rows, pictures_for(shown, "shown", SEED), eyes)
    model, tokenizer = load_base("bem-tiny")
    experts = [blank_expert(model, name, 2) for name in SKILLS]
    fit = fit_router(
        model, tokenizer, experts, taught, vision=eyes.encoder_id, seed=1, baselines=False
    )

    def choices(rows: Sequence[Example]) -> np.ndarray:
        prompts = prompts_of(read_routing_rows(rows, SKILLS), tokenizer, 512)
        paths = router_path(fit.mounted, prompts, tokenizer.pad_token_id or 0, 16)
        return at_turns(paths, np.array([[len(path)] for path in paths]))[:, 0] - 1

    lines = [
        f"bem-tiny, three skills of `json_snips`; every conversation begins with another skill; {len(taught)} rows teach, half of them by "
        "pictures, half by their text beside a picture of anything. The experts are blank: what is counted is who is chosen.\n",
        "| decides | picture | right [95 %] | minus text alone [95 % BCa] | another choice than by text alone |",
        "|---|---|---|---|---|",
    ]
    for by_picture in (True, False):
        rows, skills = conversations(data, "dev", 40, by_picture)
        shown = skills if by_picture else [int(s) for s in rng.integers(0, 3, len(rows))]
        alone = choices(rows)
        for condition in ("none", "shown", "shuffled", "blank", "noise"):
            chosen_ = choices(sighted(rows, pictures_for(shown, condition, SEED + 1), eyes))
            right = (chosen_ == skills).astype(float)
            lead = mean_of(right - (alone == skills))
            name = "any" if condition == "shown" and not by_picture else condition
            lines.append(f"| the {'picture' if by_picture else 'text'} | {name} | {share(list(right > 0))} | {lead} | {share(list(chosen_ != alone))} |")  # fmt: skip
    return lines


PARTS = {
    "claims": ("Machine claims of fresh scenes", claims),
    "swaps": ("Two pictures swapped", swaps),
    "abstention": ("Pictures that it does not know", abstention),
    "omniglot": ("Hand-drawn characters (vision_omniglot)", omniglot),
    "routing": ("Conversations whose picture decides the skill", routing),
    "people": ("People's sentences (vision_nlvr)", people),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--tower", default="tiny")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "vision.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tower = load_tower(args.tower)
    eyes = Eyes(tower)
    kept = (
        dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", args.out.read_text(), re.M | re.S))
        if args.out.is_file()
        else {}
    )
    about = json.dumps(tower.config["about"] | {"limit": round(tower.config["limit"], 3)})  # pyright: ignore
    head = (
        "# The shipped vision tower\n\n`python benchmarks/vision.py DIR_OF_THE_PUBLIC_SETS`, what is measured: its docstring. "
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}; CPU time, one thread.\n\n"
        f"Tower `{eyes.encoder_id}`, trained as `{about}`.\n"
    )
    for name in args.part or PARTS:
        title, part = PARTS[name]
        started = time.process_time()
        kept[title] = "\n" + "\n".join(part(eyes, args.data)) + "\n\n"
        print(f"## {title} ({time.process_time() - started:.0f} CPU s)\n{kept[title]}", flush=True)
        sections = [f"## {title}\n{kept[title]}" for title, _ in PARTS.values() if title in kept]
        args.out.write_text(head + "\n" + "".join(sections).rstrip() + "\n")


if __name__ == "__main__":
    main()
