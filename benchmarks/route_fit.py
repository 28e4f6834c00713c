"""A router for three LoRAs made with plain PEFT: time, accuracy, regret and flip rate, beside plain baselines.

    python benchmarks/route_fit.py DATA --base smollm2-135m --work work   # writes benchmarks/results/route_fit.md
    python benchmarks/route_fit.py --out x.md                             # bem-tiny, the embedded suite

DATA holds the public sets as JSONL. Of each skill one LoRA is made (q_proj, v_proj, o_proj and down_proj of
all layers, rank 8, a few dozen short steps) and kept in --work; without instructions in the prompts, which
would give the skill away. Then routers are fitted from 20, 50 and 200 rows of a skill, by labels, and for the
sizes of --answers by what the oracle says of their answers, for those of --conversations by two labels
each, and judged on the same held-out rows.

Seconds are CPU seconds of this process, one thread: other programs on the machine hardly disturb them.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402

import bem  # noqa: E402
from bem.tasks.load import load_task  # noqa: E402
from bem.training.data import collate, encode  # noqa: E402
from bem.training.example import Example  # noqa: E402
from bem.training.fit_router import RouterFit  # noqa: E402
from bem.training.losses import answer_logits, answer_nll, answer_targets  # noqa: E402
from bem.training.router_scores import Estimate, Score  # noqa: E402

PUBLIC = "json_snips,intent_clinc150,intent_banking77"  # short utterances, hard to tell apart
EMBEDDED = "doc2name,sig2json,continue"
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
RANK, BATCH, RATE, WARMUP = 8, 4, 2e-3, 10
LONGEST = 256  # tokens


@dataclass(frozen=True)
class Result:
    """One fit."""

    size: int
    by: str
    seed: int
    seconds: float
    fit: RouterFit


def main() -> None:
    """Make the LoRAs, fit the routers, write the page."""
    options = _options()
    torch.set_num_threads(1)
    names = (options.skills or (PUBLIC if options.data else EMBEDDED)).split(",")
    model, tokenizer = bem.load_base(options.base, dtype=options.dtype)
    tasks = {
        name: load_task(name, options.data, 2000, options.test, seed=1, longest=600)
        for name in names
    }
    loras = {
        name: made_lora(
            model, tokenizer, task.train, options.work / options.base / name, options.steps
        )
        for name, task in tasks.items()
    }
    kept, results = options.work / options.base / "losses", []
    jobs = [(n, "labels") for n in options.sizes] + [(n, "answers") for n in options.answers]
    jobs += [(n, "labels of conversations") for n in options.conversations]
    for size, by in jobs:
        for seed in range(options.seeds):
            train = {name: shown(tasks[name].train, size, seed) for name in names}
            dev = {name: tasks[name].dev for name in names}
            if by == "labels of conversations":
                rows, test = conversations(train), conversations(dev)
            else:
                rows, test = rows_of(train, by), rows_of(dev, "both" if by == "labels" else by)
            results.append(fitted(model, tokenizer, loras, rows, test, kept, (size, by, seed)))
            options.out.write_text(page(options, names, results), encoding="utf-8")
    print(options.out.read_text(encoding="utf-8"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "data", nargs="?", help="folder of the public sets; default: the embedded suite"
    )
    parser.add_argument("--base", default="bem-tiny")
    parser.add_argument("--dtype", default="float32", help="of the base")
    parser.add_argument("--skills", help=f"three tasks; default: {PUBLIC}, or {EMBEDDED}")
    parser.add_argument(
        "--work", type=Path, help="folder that keeps the LoRAs; default: a temporary one"
    )
    parser.add_argument("--steps", type=int, default=60, help="of each LoRA")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[20, 50, 200], help="rows of a skill"
    )
    parser.add_argument(
        "--answers", type=int, nargs="*", default=[20, 50, 200], help="sizes for the oracle too"
    )
    parser.add_argument(
        "--conversations",
        type=int,
        nargs="*",
        default=[50],
        help="sizes for conversations of two turns",
    )
    parser.add_argument("--test", type=int, default=100, help="held-out rows of a skill")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "route_fit.md"
    )
    options = parser.parse_args()
    options.work = options.work or Path(tempfile.mkdtemp())
    return options


# --- LoRAs and rows -------------------------------------------------------------------------------


def made_lora(model: Any, tokenizer: Any, rows: list[Example], folder: Path, steps: int) -> Path:
    """A LoRA as anybody would make one; kept in `folder`."""
    if folder.is_dir():
        return folder
    encoded = [encode(bare(row), tokenizer, LONGEST) for row in rows]
    order, rng = sorted(range(len(rows)), key=lambda i: len(encoded[i])), np.random.default_rng(0)
    torch.manual_seed(0)
    peft = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS))
    weights = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
        at = int(rng.integers(0, len(rows) - BATCH))
        batch = collate([encoded[i] for i in order[at : at + BATCH]], tokenizer.pad_token_id)
        del batch["turn_starts"]  # PEFT's LoRA has no control
        nll, tokens = answer_nll(answer_logits(peft, batch), answer_targets(batch["labels"]))
        (nll.sum() / tokens.sum()).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    peft.save_pretrained(folder)
    peft.unload()
    return folder


def bare(row: Example) -> Example:
    """Without the instruction, which would give the skill away."""
    return replace(row, instruction="")


def shown(rows: list[Example], size: int, seed: int) -> list[Example]:
    """A seeded choice."""
    chosen = np.random.default_rng([seed, size]).permutation(len(rows))[:size]
    return [rows[i] for i in chosen]


def rows_of(rows: dict[str, list[Example]], by: str) -> list[dict[str, Any]]:
    """All rows of all skills."""
    return [row_of(row, skill, by) for skill, own in rows.items() for row in own]


def conversations(rows: dict[str, list[Example]]) -> list[dict[str, Any]]:
    """Two turns of different skills, a label for each; every row stands in two of them."""
    names, found = list(rows), []
    for first, second in zip(names, [*names[1:], names[0]], strict=True):
        for one, two in zip(rows[first], rows[second], strict=True):
            turns = [
                ("user", bare(one).prompt),
                ("assistant", one.answer),
                ("user", bare(two).prompt),
            ]
            messages = [{"role": role, "content": text} for role, text in turns]
            name = f"{first}/{one.id} {second}/{two.id}"
            found.append({"id": name, "messages": messages, "label": [first, second]})
    return found


def row_of(row: Example, skill: str, by: str) -> dict[str, Any]:
    """A row as users give it."""
    found: dict[str, Any] = {"id": f"{skill}/{row.id}", "input": bare(row).prompt}
    if by != "answers":
        found["label"] = skill
    if by != "labels":
        found["references"] = list(row.references)
    return found


def fitted(
    model: Any,
    tokenizer: Any,
    loras: dict[str, Path],
    rows: list,
    test: list,
    cache: Path,
    what: tuple[int, str, int],
) -> Result:
    """One fit; what the experts lose on the held-out rows is read once for all."""
    started = time.process_time()
    fit = bem.fit_router(
        model, tokenizer, loras, rows, test, seed=what[2], cache=cache,
        on_progress=lambda stage, done, of: print(what, stage, done, of, file=sys.stderr),
    )  # fmt: skip
    seconds = time.process_time() - started
    fit.mounted.detach()
    return Result(*what, seconds, fit)


# --- the page -------------------------------------------------------------------------------------


def page(options: Any, names: list[str], results: list[Result]) -> str:
    """The results as Markdown."""
    given = [f"--base {options.base}"] if options.base != "bem-tiny" else []
    given += [f"--dtype {options.dtype}"] if options.dtype != "float32" else []
    given += [f"--steps {options.steps}", f"--sizes {' '.join(map(str, options.sizes))}"]
    given += [f"--skills {','.join(names)}"] if options.skills else []
    given += [
        f"--answers {' '.join(map(str, options.answers))}",
        f"--conversations {' '.join(map(str, options.conversations))}",
        f"--test {options.test}",
        f"--seeds {options.seeds}",
    ]
    command = " ".join(
        ["python benchmarks/route_fit.py", *(["DATA"] if options.data else []), *given]
    )
    n = len(next(iter(results)).fit.held_out)
    lines = [
        "# A router for LoRAs that exist",
        "",
        f"`{command}` on {platform.machine()}, one thread of a shared machine; times are CPU seconds.",
        "",
        f"Base {options.base} ({options.dtype}). Three LoRAs made with plain PEFT ({', '.join(TARGETS)} of all layers, rank "
        f"{RANK}, {options.steps} steps of {BATCH} rows): {', '.join(names)}, without instructions in the prompts. As they "
        f"adapt the lowest layer, the router reads the embeddings (layer 0); the last layer is known only after a forward "
        f"pass of its own. {n} held-out rows, the same for all; 95 % intervals. Regret: nats per answer token beyond the "
        "best of the experts and the bare base, whoever is chosen answering throughout. Flip rate: changes of expert per "
        "chunk boundary behind the first answer's start; in conversations the skill changes in every second turn.",
    ]
    for result in results:
        lines += ["", *_table(result)]
    return "\n".join(lines) + "\n"


def _table(result: Result) -> list[str]:
    fit, learned = result.fit, result.fit.learned
    title = f"## {result.size} rows of a skill, {result.by}"
    title += f", seed {result.seed}" if result.seed else ""
    facts = [
        f"{result.seconds:.0f} CPU seconds in all, the held-out rows' measuring and the baselines included. The start: "
        f"{learned.recipe.form} of what was read; trained on for {learned.epochs} epochs."
    ]
    if fit.as_it_acts:
        facts.append(f"Regret of the router's real forward passes: {_nats(fit.as_it_acts)}.")
    head = "| | reads | accuracy | regret | flip rate | router minus this | regret: this minus router |"
    rows = [_line(score) for score in fit.scores]
    notes = [f"- {note}" for note in fit.notes]
    return [
        title,
        "",
        " ".join(facts),
        "",
        head,
        "|---|---|---|---|---|---|---|",
        *rows,
        *([""] if notes else []),
        *notes,
    ]


def _line(score: Score) -> str:
    cells = [
        score.name,
        score.reads,
        _share(score.accuracy),
        "" if score.regret is None else _nats(score.regret),
        "-" if score.flip_rate is None else f"{score.flip_rate:.2f}",
        "" if score.lead is None else _share(score.lead, "+"),
        "" if score.regret_lead is None else _nats(score.regret_lead, "+"),
    ]
    return f"| {' | '.join(cells)} |"


def _share(found: Estimate, sign: str = "") -> str:
    return f"{100 * found.value:{sign}.1f} % [{100 * found.low:{sign}.1f}, {100 * found.high:{sign}.1f}]"


def _nats(found: Estimate, sign: str = "") -> str:
    return f"{found.value:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


if __name__ == "__main__":
    main()
