"""Train the tiny cross-encoder that ships with the package, on one CPU core.

    python scripts/train_reranker.py --data DIR_OF_THE_PUBLIC_SETS --out runs/reranker --steps 3000
    python scripts/train_reranker.py --data DIR_OF_THE_PUBLIC_SETS --out runs/blend --shrink 0.6 \\
        --blend runs/reranker/step-1000 runs/reranker
    python scripts/train_reranker.py --out runs/blend --export bem/evidence/tiny-reranker

Each step takes lists of one right passage and mined wrong ones (top BM25 passages without the
answer). Loss: softmax cross-entropy over the list (which is the right one?) plus binary
cross-entropy of each pair (is it right at all?), some lists without any right passage. At the end
the logits are calibrated (Platt 1999) on natural BM25 lists of training questions that were held
back. `log.jsonl` in the output folder has every number.
"""

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import reranker_pairs as rp
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bem.bases.load import find_base
from bem.evidence.pairs import Pairs, make_pairs, table_bm25
from bem.evidence.reading import BUCKETS, MAX_PIECES, Words, query_words, read_passage
from bem.evidence.tiny_reranker import Shape, TinyReranker

BASE = Path(find_base("bem-tiny"))
EMPTY_LISTS = 0.1  # share of lists without a right passage: they teach what "nothing here" is
TABLE_LEXICAL = (
    0.2  # share of lists whose BM25 comes from the shipped frequencies, as without index
)
BCE_WEIGHT = 0.5
HELD_BACK = 100  # questions per set for choosing and calibrating


# ------------------------------------------------------------------------------------ preparation


def rarity_table(sets: Sequence[rp.PairSet]) -> NDArray[np.float32]:
    """idf per hashed stem over the training pools, long pools thinned out."""
    import zlib

    rng = random.Random(0)
    texts = [t for s in sets for t in rng.sample(s.pool, min(len(s.pool), 12_000))]
    df, n = rp.document_frequencies(texts, BUCKETS, lambda t: zlib.crc32(t.encode()) % BUCKETS)
    return np.log1p((n - df + 0.5) / (df + 0.5)).astype(np.float32)


def initial_pieces(d_model: int) -> Tensor:
    """The base's embeddings, rotated to their main directions and cut to `d_model`."""
    weight = load_file(BASE / "model.safetensors")["model.embed_tokens.weight"].float()
    weight = weight - weight[5:].mean(0)
    _, _, directions = torch.linalg.svd(weight[5:], full_matrices=False)
    cut = weight @ directions[:d_model].T
    cut = cut / cut[5:].std() * 0.1
    cut[0] = 0
    return cut


# -------------------------------------------------------------------------------------------- lists


def pairs_of(
    words: Words, pool: Sequence[str], query: str, rows: Sequence[int], lexical: Sequence[float]
) -> Pairs:
    asked = query_words(words, query)
    read = [read_passage(words, asked, pool[row]) for row in rows]
    return make_pairs(words, asked, read, np.array(lexical, dtype=np.float32))


def training_list(
    words: Words, pairs: rp.PairSet, found: rp.Candidates, size: int, rng: random.Random
) -> tuple[Pairs, list[bool]]:
    """One right passage (or none) and wrong ones, the better-ranked ones more often."""
    wrong = rp.wrong(pairs, found)
    right = [place for place, ok in enumerate(found.right()) if ok]
    places = [] if rng.random() < EMPTY_LISTS else [rng.choice(right)]
    ranked = sorted(wrong, key=lambda place: rng.random() ** (1 + place / 6), reverse=True)
    places += ranked[: size - len(places)]
    asked = query_words(words, found.question.query)
    read = [read_passage(words, asked, pairs.pool[found.rows[p]]) for p in places]
    lexical = np.array([found.lexical[p] for p in places], dtype=np.float32)
    if rng.random() < TABLE_LEXICAL:
        lexical = table_bm25(words, asked, read)
    return make_pairs(words, asked, read, lexical), [p in right for p in places]


def collate(lists: Sequence[Pairs]) -> dict[str, Tensor | int]:
    """One batch of several queries: query columns padded to the longest query."""
    first = max(p.first for p in lists)
    width = first + max(p.words.shape[1] - p.first for p in lists)
    out: dict[str, Tensor | int] = {"first": first}
    offset, shifted = 0, []
    for p in lists:
        shifted.append(np.where(p.words > 0, p.words + offset, 0))
        offset += len(p.pieces)
    for name in ("words", "segments", "positions", "codes", "features"):
        columns = []
        for p, rows in zip(lists, shifted, strict=True):
            array = rows if name == "words" else getattr(p, name)
            wide = np.zeros((len(array), width, *array.shape[2:]), dtype=array.dtype)
            wide[:, : p.first] = array[:, : p.first]
            wide[:, first : first + array.shape[1] - p.first] = array[:, p.first :]
            columns.append(wide)
        out[name] = torch.from_numpy(np.concatenate(columns))
    out["pieces"] = torch.from_numpy(np.concatenate([p.pieces for p in lists]))
    out["summary"] = torch.from_numpy(np.concatenate([p.summary for p in lists]))
    return out


def list_loss(logits: Tensor, right: Tensor, sizes: Sequence[int]) -> tuple[Tensor, dict]:
    """Listwise cross-entropy plus BCE_WEIGHT times the pairs' binary cross-entropy."""
    listwise, at = [], 0
    for size in sizes:
        if right[at : at + size].any():
            target = right[at : at + size].float()
            logp = F.log_softmax(logits[at : at + size], 0)
            listwise.append(-(logp * target).sum() / target.sum())
        at += size
    ce = torch.stack(listwise).mean()
    bce = F.binary_cross_entropy_with_logits(logits, right.float())
    return ce + BCE_WEIGHT * bce, {"ce": ce.item(), "bce": bce.item()}


# ---------------------------------------------------------------------------------------- measuring


@torch.inference_mode()
def scored(model: TinyReranker, words: Words, pairs: rp.PairSet, found: rp.Candidates) -> NDArray:
    batch = collate([pairs_of(words, pairs.pool, found.question.query, found.rows, found.lexical)])
    return model(**batch).numpy()


def reciprocal_rank(logits: NDArray, right: Sequence[bool], k: int = 10) -> float:
    order = np.argsort(-logits, kind="stable")[:k]
    return next((1 / (1 + i) for i, row in enumerate(order) if right[row]), 0.0)


def evaluate(
    model: TinyReranker, words: Words, held: dict[str, tuple[rp.PairSet, list[rp.Candidates]]]
) -> tuple[dict[str, list[float]], dict[str, tuple[NDArray, NDArray]]]:
    """MRR@10 of BM25 and of the model per set, and the model's logits with their labels."""
    model.eval()
    table, outcomes = {}, {}
    for name, (pairs, lists) in held.items():
        before, after, logits, labels = [], [], [], []
        for found in lists:
            right = found.right()
            if not found.rows:
                continue
            values = scored(model, words, pairs, found)
            before.append(reciprocal_rank(-np.arange(len(right)), right))
            after.append(reciprocal_rank(values, right))
            logits.append(values)
            labels.append(np.array(right))
        table[name] = [float(np.mean(before)), float(np.mean(after)), len(before)]
        outcomes[name] = (np.concatenate(logits), np.concatenate(labels))
    return table, outcomes


def platt(outcomes: dict[str, tuple[NDArray, NDArray]]) -> tuple[float, float]:
    """scale, shift of logit' = scale * logit + shift by logistic regression, sets weighing alike."""
    x = torch.tensor(np.concatenate([o[0] for o in outcomes.values()]), dtype=torch.float64)
    y = torch.tensor(np.concatenate([o[1] for o in outcomes.values()]), dtype=torch.float64)
    w = torch.cat([torch.full((len(o[0]),), 1 / len(o[0])) for o in outcomes.values()])
    free = torch.tensor([0.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = free[0].exp() * x + free[1]  # exp: the order is never turned round
        loss = (F.binary_cross_entropy_with_logits(logits, y, reduction="none") * w).sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore
    scale, shift = free.detach()
    return float(scale.exp()), float(shift)


# --------------------------------------------------------------------------------------------- run


def batches(
    words: Words,
    sets: Sequence[tuple[rp.PairSet, list[rp.Candidates]]],
    per_step: int,
    size: int,
    seed: int,
) -> Iterator[tuple[list[dict[str, Tensor | int]], Tensor, list[int]]]:
    """Batches in two halves, short passages apart from long ones: less padding."""
    rng = random.Random(seed)
    weights = [pairs.lists for pairs, _ in sets]
    orders: list[list[int]] = [[] for _ in sets]
    while True:
        lists = []
        for which in rng.choices(range(len(sets)), weights, k=per_step):
            pairs, candidates = sets[which]
            if not orders[which]:
                orders[which] = rng.sample(range(len(candidates)), len(candidates))
            found = candidates[orders[which].pop()]
            made, right = training_list(words, pairs, found, size, rng)
            lists.append((made, torch.tensor(right)))
        lists.sort(key=lambda one: one[0].words.shape[1])
        halves = [[p for p, _ in part] for part in (lists[: per_step // 2], lists[per_step // 2 :])]
        labels = [right for _, right in lists]
        yield [collate(h) for h in halves if h], torch.cat(labels), [len(x) for x in labels]


def learning_rate(share: float, peak: float) -> float:
    """Linear warm-up over 3 %, then linear to zero."""
    return peak * min(share / 0.03, (1 - share) / 0.97, 1.0)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    sets = rp.training_sets(args.data, random.Random(args.seed))
    idf = rarity_table(sets)
    words = Words(Tokenizer.from_file(str(BASE / "tokenizer.json")), idf)
    learn, held = split(sets, args.seed)
    shape = Shape()
    model = TinyReranker(shape, args.dropout)
    with torch.no_grad():
        model.pieces.weight.copy_(initial_pieces(shape.d_model))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    log = (args.out / "log.jsonl").open("a")
    started, recent = time.monotonic(), []
    stream = batches(words, learn, args.lists, args.size, args.seed)
    for step in range(args.steps + 1):
        minutes = (time.monotonic() - started) / 60
        share = min(1.0, max((step + 1) / args.steps, minutes / args.minutes))
        last = step == args.steps or minutes >= args.minutes
        if (step and step % args.measure_every == 0) or last:
            table, outcomes = evaluate(averaged.module, words, held)
            row = {"step": step, "seconds": round(time.monotonic() - started), "mrr": table}
            print(json.dumps(row), file=log, flush=True)
            for folder in (args.out, args.out / f"step-{step}"):
                folder.mkdir(exist_ok=True)
                save(folder, averaged.module, idf, platt(outcomes), step)
        if last:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(share, args.peak)
        halves, right, sizes = next(stream)
        logits = torch.cat([model(**half) for half in halves])
        loss, parts = list_loss(logits, right, sizes)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        averaged.update_parameters(model)
        recent.append(parts)
        if step % 50 == 49:
            means = {k: round(float(np.mean([r[k] for r in recent])), 4) for k in parts}
            row = {"step": step + 1, "seconds": round(time.monotonic() - started), **means}
            print(json.dumps(row), file=log, flush=True)
            recent.clear()


def split(sets: Sequence[rp.PairSet], seed: int, learning: bool = True) -> tuple[list, dict]:
    """Candidate lists to learn from (with right passages added), and held-back natural lists."""
    rng = random.Random(seed)
    learn, held = [], {}
    for pairs in sets:
        back = [q for q in pairs.questions if rp.held_back(q)]
        rest = [q for q in pairs.questions if not rp.held_back(q)]
        back = rng.sample(back, min(len(back), HELD_BACK))
        rest = rng.sample(rest, min(len(rest), 2 * pairs.lists if learning else 0))
        parts = {}
        for name, questions in (("rest", rest), ("back", back)):
            part = rp.PairSet(pairs.name, pairs.pool, questions, pairs.lists)
            parts[name] = (part, list(rp.first_stage(part, 20, with_right=name == "rest")))
        usable = [
            c
            for c in parts["rest"][1]
            if any(c.right())
            and len(rp.wrong(pairs, c)) >= 3
            # an extract that BM25 finds at once teaches little
            and (pairs.name != "openstax" or not c.right()[0] or rng.random() < 0.25)
        ]
        learn.append((parts["rest"][0], usable))
        held[pairs.name] = parts["back"]
        print(pairs.name, len(pairs.pool), "passages", len(usable), "lists", flush=True)
    return learn, held


def save(
    folder: Path, model: TinyReranker, idf: NDArray, calibration: tuple[float, float], step: int
) -> None:
    """Half-precision weights with the rarity table, and config.json."""
    tensors = {k: v.detach().half().contiguous() for k, v in model.state_dict().items()}
    tensors["idf"] = torch.from_numpy(idf).half()
    save_file(tensors, folder / "model.safetensors")
    shape = {f.name: getattr(model.shape, f.name) for f in fields(model.shape)}
    config = {
        "format": 1,
        "base": "bem-tiny",
        "shape": shape,
        "max_pieces": MAX_PIECES,
        "calibration": {"scale": calibration[0], "shift": calibration[1]},
        "steps": step,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def blend(args: argparse.Namespace) -> None:
    """Mean of several checkpoints, its learned part shrunk towards BM25, calibrated anew.

    (Weight averaging: Izmailov et al. 2018; interpolation towards the start: Wortsman et al. 2022.)
    """
    torch.set_num_threads(args.threads)
    loaded = [load_file(folder / "model.safetensors") for folder in args.blend]
    mean = {k: torch.stack([one[k].float() for one in loaded]).mean(0) for k in loaded[0]}
    for name in ("head.2.weight", "head.2.bias"):
        mean[name] *= args.shrink
    idf = mean.pop("idf").numpy()
    config = json.loads((args.blend[-1] / "config.json").read_text())
    model = TinyReranker(Shape(**config["shape"]))
    model.load_state_dict(mean)
    words = Words(Tokenizer.from_file(str(BASE / "tokenizer.json")), idf)
    _, held = split(rp.training_sets(args.data, random.Random(args.seed)), args.seed, False)
    table, outcomes = evaluate(model, words, held)
    print(json.dumps(table))
    args.out.mkdir(parents=True, exist_ok=True)
    save(args.out, model, idf, platt(outcomes), config["steps"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="folder of the public sets")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--export", type=Path, help="copy the run's weights here and stop")
    parser.add_argument("--blend", type=Path, nargs="+", help="average these runs into --out")
    parser.add_argument("--shrink", type=float, default=1.0, help="factor on the learned part")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop here if earlier")
    parser.add_argument("--lists", type=int, default=7, help="candidate lists per step")
    parser.add_argument("--size", type=int, default=10, help="passages per list")
    parser.add_argument("--peak", type=float, default=2e-3, help="largest learning rate")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--measure-every", type=int, default=500, help="steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.export:
        args.export.mkdir(parents=True, exist_ok=True)
        for name in ("model.safetensors", "config.json"):
            shutil.copy(args.out / name, args.export / name)
        return
    (blend if args.blend else train)(args)


if __name__ == "__main__":
    main()
