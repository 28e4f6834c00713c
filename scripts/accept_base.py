"""Is a base good enough to put adapters on? Three checks, a table, a JSON file.

    python scripts/accept_base.py --base bem/bases/bem-tiny --data DIR_OF_THE_PUBLIC_SETS --out accept.json

1. Copy test: a 20-token span of random ids is much cheaper the second time (under a third).
2. Full fine-tuning reaches exact match above 0 on each of `--tasks` (rows it was not trained on).
3. Loss on prose of the dev split, reported.

Exit code 1 if check 1 or 2 fails. A base of 3 million parameters takes about two CPU seconds per
update; 80 updates (`--steps 80`) already show whether exact match leaves zero.
"""

import argparse
import copy
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pretrain_base
import pretraining_mixture as mix
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

COPY_RATIO = 1 / 3  # second occurrence over first


@dataclass(frozen=True)
class TaskScore:
    task: str
    steps: int
    loss_before: float  # nats per answer token on the dev rows, before tuning
    loss_after: float
    exact_match: float  # share of dev rows
    valid: (
        float  # share of answers that are JSON, or start as the reference does if that is not JSON
    )
    rows: int
    minutes: float


@dataclass(frozen=True)
class Example:
    prompt: list[int]
    answer: list[int]
    references: list[str]


# ---------------------------------------------------------------------------------------- examples


def read_examples(
    path: Path, tokenizer: PreTrainedTokenizerFast, limit: int, longest: int, rng
) -> list[Example]:
    """Up to `limit` random rows whose prompt and answer fit into `longest` tokens."""
    rows = list(mix.read_rows(path))
    examples: list[Example] = []
    for i in rng.permutation(len(rows)):
        text = mix.chat(mix.prompt_of(rows[i]), "")
        prompt = tokenizer.encode(text.removesuffix("<|eos|>"), add_special_tokens=False)
        answer = tokenizer.encode(rows[i]["references"][0], add_special_tokens=False)
        if len(prompt) + len(answer) < longest:
            examples.append(Example(prompt, [*answer, mix.EOS], rows[i]["references"]))
        if len(examples) == limit:
            break
    return examples


def answer_loss(model: LlamaForCausalLM, batch: list[Example]) -> tuple[Tensor, int]:
    """Summed loss of the answers in nats, and the number of their tokens."""
    longest = max(len(e.prompt) + len(e.answer) for e in batch)
    ids = torch.full((len(batch), longest), mix.PAD)
    counted = torch.zeros((len(batch), longest), dtype=torch.bool)
    for row, e in enumerate(batch):  # padded on the right: causal attention never looks at it
        end = len(e.prompt) + len(e.answer)
        ids[row, :end] = torch.tensor(e.prompt + e.answer)
        counted[row, len(e.prompt) : end] = True
    ids, counted = ids.to(model.device), counted[:, 1:].to(model.device)
    with pretrain_base.autocast(model.device):
        hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state[counted]
        logits = model.lm_head(hidden).float()
    loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:][counted], reduction="sum")
    return loss, int(counted.sum())


@torch.no_grad()
def mean_answer_loss(model: LlamaForCausalLM, examples: list[Example]) -> float:
    sums = [answer_loss(model, examples[i : i + 32]) for i in range(0, len(examples), 32)]
    return sum(loss.item() for loss, _ in sums) / sum(count for _, count in sums)


# -------------------------------------------------------------------------------- tuning, decoding


def fine_tune(
    model: LlamaForCausalLM, train: list[Example], steps: int, batch_size: int, lr: float, rng
) -> None:
    """AdamW on all parameters, loss on the answers only; warm-up, then linear to zero."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = lr * min((step + 1) / 20, 1 - step / steps)
        batch = [train[i] for i in rng.integers(len(train), size=batch_size)]
        loss, count = answer_loss(model, batch)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if (step + 1) % 50 == 0:
            print(f"  step {step + 1}/{steps}  loss {loss.item() / count:.3f}", flush=True)


@torch.no_grad()
def decode(model: LlamaForCausalLM, tokenizer, examples: list[Example], longest: int) -> list[str]:
    """Greedy answers."""
    texts: list[str] = []
    for start in range(0, len(examples), 32):
        batch = examples[start : start + 32]
        width = max(len(e.prompt) for e in batch)
        ids = torch.tensor([[mix.PAD] * (width - len(e.prompt)) + e.prompt for e in batch])
        output = model.generate(
            ids.to(model.device),
            attention_mask=(ids != mix.PAD).long().to(model.device),
            max_new_tokens=longest,
            do_sample=False,
        )
        texts += tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return texts


def is_valid(text: str, reference: str) -> bool:
    if not reference.startswith("{"):
        return text.split(" ")[0] == reference.split(" ")[0]
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def try_task(base: LlamaForCausalLM, tokenizer, task: str, args: argparse.Namespace) -> TaskScore:
    """Fine-tune a copy of `base` on a task and score it on dev rows."""
    begin, rng = time.monotonic(), np.random.default_rng(args.seed)
    files = [args.data / f"{task}.{part}.jsonl.gz" for part in ("train", "dev")]
    train = read_examples(files[0], tokenizer, args.train_rows, args.longest, rng)
    dev = read_examples(files[1], tokenizer, args.dev_rows, args.longest, rng)
    model = copy.deepcopy(base).train()
    before = mean_answer_loss(model, dev)
    print(f"{task}: {len(train)} training rows, {args.steps} steps", flush=True)
    fine_tune(model, train, args.steps, args.batch_size, args.lr, rng)
    model.eval()
    texts = decode(model, tokenizer, dev, max(len(e.answer) for e in dev) + 4)
    right = [text.strip() in e.references for text, e in zip(texts, dev, strict=True)]
    valid = [is_valid(text, e.references[0]) for text, e in zip(texts, dev, strict=True)]
    for text, e in list(zip(texts, dev, strict=True))[:3]:
        print(f"  wanted {e.references[0]}\n  got    {text}", flush=True)
    minutes = (time.monotonic() - begin) / 60
    after = mean_answer_loss(model, dev)
    score = (float(np.mean(right)), float(np.mean(valid)))
    return TaskScore(task, args.steps, before, after, *score, len(dev), minutes)


# --------------------------------------------------------------------------------------------- main


def prose_ids(tokenizer, data: Path) -> np.ndarray:
    documents = mix.prose_documents(data, "dev")
    return np.concatenate(
        [tokenizer.encode(d, add_special_tokens=False, verbose=False) for d in documents]
    )


def table(copied: dict[str, float], prose: float, scores: list[TaskScore]) -> str:
    first, second = copied["copy_first"], copied["copy_second"]
    lines = [
        f"copy test   first {first:.3f}  second {second:.3f}  ratio {second / first:.3f}",
        f"prose dev   {prose:.3f} nats/token",
        "task              loss before -> after   exact match   valid   rows   minutes",
    ]
    for s in scores:
        lines.append(
            f"{s.task:<18}{s.loss_before:11.3f} -> {s.loss_after:.3f}{s.exact_match:14.3f}"
            f"{s.valid:8.3f}{s.rows:7d}{s.minutes:10.1f}"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--data", type=Path, required=True, help="folder with the public sets")
    parser.add_argument("--out", type=Path, default=None, help="write the numbers here as JSON")
    parser.add_argument("--tasks", nargs="*", default=["json_snips", "sql_wikisql"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--train-rows", type=int, default=12_000)
    parser.add_argument("--dev-rows", type=int, default=200)
    parser.add_argument("--longest", type=int, default=160, help="tokens of prompt and answer")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    args = parse()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = LlamaForCausalLM.from_pretrained(args.base, dtype=torch.float32).to(device).eval()
    copied = pretrain_base.copy_test(base)
    prose = pretrain_base.prose_loss(base, prose_ids(tokenizer, args.data), 512, None)
    scores = [try_task(base, tokenizer, task, args) for task in args.tasks]
    print(table(copied, prose, scores))
    accepted = copied["copy_second"] < COPY_RATIO * copied["copy_first"]
    accepted = accepted and all(score.exact_match > 0 for score in scores)
    print("accepted" if accepted else "NOT accepted: train the base for longer, or on more drills")
    if args.out:
        record = {"accepted": accepted, **copied, "prose_dev": prose}
        record["tasks"] = [asdict(score) for score in scores]
        args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0 if accepted else 1


if __name__ == "__main__":
    sys.exit(main())
