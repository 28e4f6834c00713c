"""Pretrain the small base model that ships with the package.

    # 2 CPU cores, one process per core (about 3.4 million parameters, at most two hours)
    torchrun --nproc-per-node 2 scripts/pretrain_base.py --data DIR_OF_THE_PUBLIC_SETS \\
        --out runs/pretrain --hours 2

    # one CUDA GPU, bf16, 20 million parameters
    python scripts/pretrain_base.py --data DIR_OF_THE_PUBLIC_SETS --out runs/pretrain20 --size 20m \\
        --hours 0.3 --tokens-per-step 65536 --micro-tokens 65536

    # write the model of the last checkpoint as a Hugging Face folder
    python scripts/pretrain_base.py --out runs/pretrain --export bem/bases/bem-tiny

Running the same command again goes on from the last checkpoint. The learning rate follows the
share of `--hours` (training time, also over restarts) or of `--steps` that has passed: linear
warm-up, flat, linear to zero over the last 30 %. `log.jsonl` in the output folder has every number.
"""

import argparse
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pretraining_mixture as mix
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Size:
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    vocab: int


SIZES = {
    "1m": Size(128, 4, 4, 344, 4096),
    "3m": Size(192, 6, 6, 512, 4096),
    "8m": Size(256, 8, 8, 688, 8192),
    "20m": Size(448, 7, 14, 1200, 8192),
}
CONTEXT = 1024
LONG_ROWS_FROM = 0.7  # share of the run after which rows have CONTEXT tokens instead of half

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}{{ eos_token }}"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


# -------------------------------------------------------------------------------- tokenizer, tokens


def train_tokenizer(documents: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; each digit is its own token, so that numbers can be copied digit by digit."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(mix.SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def tokenizer_text(sources: dict[str, list[str]]) -> Iterator[str]:
    """A third of all text, without the special marks: enough to choose 4-8 thousand tokens."""
    for documents in sources.values():
        for document in documents[::3]:
            for mark in mix.SPECIAL_TOKENS:
                document = document.replace(mark, "\n")
            yield document


def prepare(data: Path, out: Path, vocab_size: int) -> None:
    """Write the tokenizer and the token ids of every source, once."""
    if (out / "tokens" / "done").exists():
        return
    sources = {
        "prose": mix.prose_documents(data),
        "python": mix.python_documents(),
        "paired": mix.paired_documents(data),
        "unpaired": mix.unpaired_documents(data),
    }
    tokenizer = train_tokenizer(tokenizer_text(sources), vocab_size)
    tokenizer.save_pretrained(out / "tokenizer")
    (out / "tokens").mkdir(exist_ok=True)
    for name, documents in {**sources, "dev": mix.prose_documents(data, "dev")}.items():
        ids = [
            tokenizer.backend_tokenizer.encode(d, add_special_tokens=False).ids for d in documents
        ]
        np.save(
            out / "tokens" / f"{name}.npy", np.concatenate([np.array(i, np.uint16) for i in ids])
        )
        np.save(out / "tokens" / f"{name}.ends.npy", np.cumsum([len(i) for i in ids]))
        print(f"{name}: {len(ids)} documents, {sum(map(len, ids)) / 1e6:.2f} M tokens", flush=True)
    sentences = sentences_for_drills(sources)
    (out / "tokens" / "sentences.json").write_text(json.dumps(sentences), encoding="utf-8")
    (out / "tokens" / "done").touch()


def sentences_for_drills(sources: dict[str, list[str]], most: int = 60_000) -> list[str]:
    """Lines of prose of 5 to 60 words."""
    lines = [line for document in sources["prose"] for line in document[7:-7].split("\n")]
    good = [line for line in lines if 5 <= line.count(" ") + 1 <= 60]
    return [good[i] for i in np.random.default_rng(0).permutation(len(good))[:most]]


def load_mixture(out: Path, tokenizer, vocab_size: int, seed: int, rank: int, world: int):
    tokens = out / "tokens"
    shelves = {
        name: mix.Shelf(
            np.load(tokens / f"{name}.npy", mmap_mode="r"),
            np.load(tokens / f"{name}.ends.npy"),
            seed,
            rank,
            world,
        )
        for name in ("prose", "python", "paired", "unpaired")
    }

    def encode(text: str) -> list[int]:
        return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    sentences = json.loads((tokens / "sentences.json").read_text(encoding="utf-8"))
    return mix.Mixture(shelves, mix.Drills(encode, vocab_size, sentences), seed * 1000 + rank)


# --------------------------------------------------------------------------------- model, optimiser


def build_model(size: Size) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocab,
            hidden_size=size.d_model,
            num_hidden_layers=size.n_layers,
            num_attention_heads=size.n_heads,
            num_key_value_heads=size.n_heads,
            intermediate_size=size.d_ff,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            pad_token_id=mix.PAD,
            bos_token_id=mix.BOS,
            eos_token_id=mix.EOS,
        )
    )


def build_optimisers(model: LlamaForCausalLM, muon_lr: float, adam_lr: float):
    """Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) for the matrices of the blocks,
    AdamW for embeddings and norms."""
    blocks = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in blocks}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(blocks, lr=muon_lr, weight_decay=0.02),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def lr_factor(progress: float, warm_up: float = 0.01, decay: float = 0.3) -> float:
    """Linear from 0 to 1 over `warm_up`, flat, linear to 0 over the last `decay`; all as shares."""
    return max(0.0, min((progress + 1e-4) / warm_up, 1.0, (1 - progress) / decay))


def token_losses(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Loss in nats of ids[:, 1:] given what comes before, (rows, length)."""
    hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
    # In parts: the logits of a whole batch are the largest tensor by far and would leave the cache.
    losses = [
        torch.nn.functional.cross_entropy(model.lm_head(h).float(), y, reduction="none")
        for h, y in zip(
            hidden.flatten(0, 1).split(1024), ids[:, 1:].flatten().split(1024), strict=True
        )
    ]
    return torch.cat(losses).view(len(ids), -1)


def autocast(device: torch.device):
    return torch.autocast(device.type, torch.bfloat16)


# -------------------------------------------------------------------------------------------- tests


@torch.no_grad()
def copy_test(model: LlamaForCausalLM, spans: int = 64, seed: int = 0) -> dict[str, float]:
    """Mean loss on a 20-token span of random ids, first and second time, 20 random ids between."""
    rng = np.random.default_rng(seed)
    size = (spans, 20)
    low, high = len(mix.SPECIAL_TOKENS), model.config.vocab_size
    span, gap = rng.integers(low, high, size), rng.integers(low, high, size)
    ids = np.concatenate([np.full((spans, 1), mix.BOS), span, gap, span], axis=1)
    with autocast(model.device):
        losses = token_losses(model, torch.from_numpy(ids).to(model.device)).float()
    # The first token of the second occurrence cannot be foretold; it counts all the same.
    return {"copy_first": losses[:, :20].mean().item(), "copy_second": losses[:, 40:].mean().item()}


@torch.no_grad()
def prose_loss(model: LlamaForCausalLM, ids: np.ndarray, length: int, most: int | None) -> float:
    """Mean loss per token of `ids` cut into rows of `length`; `most` rows, evenly spread."""
    rows = (len(ids) - 1) // length
    chosen = np.unique(np.linspace(0, rows - 1, min(rows, most or rows)).astype(int))
    total = 0.0
    for part in np.array_split(chosen, math.ceil(len(chosen) / 4)):
        windows = part[:, None] * length + np.arange(length + 1)
        batch = torch.from_numpy(ids[windows].astype(np.int64)).to(model.device)
        with autocast(model.device):
            total += token_losses(model, batch).float().mean(dim=1).sum().item()
    return total / len(chosen)


# ----------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Plan:
    """How long and in which portions to train. Exactly one of `hours`, `steps` ends the run."""

    hours: float | None
    steps: int | None
    tokens_per_step: int = 4096  # over all processes
    micro_tokens: int = 2048  # per forward pass
    check_every_s: float = 240.0  # validation, copy test and checkpoint
    row_length: int = CONTEXT

    def progress(self, step: int, elapsed_s: float) -> float:
        if self.steps is not None:
            return step / self.steps
        return elapsed_s / (3600 * self.hours)


@dataclass
class State:
    """Everything that a checkpoint keeps."""

    model: LlamaForCausalLM
    optimisers: list[torch.optim.Optimizer]
    mixture: mix.Mixture
    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0


def world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def save(state: State, path: Path) -> None:
    rank, size = world()
    mixtures = [state.mixture.state_dict()]
    if size > 1:
        mixtures = [None] * size
        dist.all_gather_object(mixtures, state.mixture.state_dict())
    if rank:
        return
    checkpoint = {
        "model": state.model.state_dict(),
        "optimisers": [o.state_dict() for o in state.optimisers],
        "mixtures": mixtures,
        "counts": {"step": state.step, "tokens": state.tokens, "elapsed_s": state.elapsed_s},
        "config": state.model.config.to_dict(),
    }
    torch.save(checkpoint, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)  # a kill while writing leaves the old one whole


def resume(state: State, path: Path) -> bool:
    if not path.exists():
        return False
    rank, size = world()
    checkpoint = torch.load(path, map_location=state.model.device, weights_only=True)
    if len(checkpoint["mixtures"]) != size:
        raise SystemExit(
            f"{path} was written by {len(checkpoint['mixtures'])} processes, this run has {size}. "
            "Start the same number, or choose another --out."
        )
    state.model.load_state_dict(checkpoint["model"])
    for optimiser, saved in zip(state.optimisers, checkpoint["optimisers"], strict=True):
        optimiser.load_state_dict(saved)
    state.mixture.load_state_dict(checkpoint["mixtures"][rank])
    for name, value in checkpoint["counts"].items():
        setattr(state, name, value)
    return True


def average_gradients(model: torch.nn.Module, extra: Tensor) -> Tensor:
    """Mean over processes of all gradients and of `extra`, in one message."""
    _, size = world()
    if size == 1:
        return extra
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in grads), extra])
    dist.all_reduce(flat)
    flat /= size
    at = 0
    for grad in grads:
        grad.copy_(flat[at : at + grad.numel()].view_as(grad))
        at += grad.numel()
    return flat[at:]


def train_step(state: State, plan: Plan, progress: float) -> float:
    """One update; returns the mean loss of the tokens that count."""
    length = plan.row_length if progress >= LONG_ROWS_FROM else plan.row_length // 2
    rows = max(1, plan.tokens_per_step // world()[1] // length)
    batch = state.mixture.batch(rows, length, progress)
    device = state.model.device
    ids, learn = (torch.from_numpy(a).to(device) for a in batch)
    count = learn[:, 1:].sum().clamp(min=1)
    total = torch.zeros((), device=device)
    per_pass = max(1, plan.micro_tokens // length)
    for some_ids, some_learn in zip(ids.split(per_pass), learn.split(per_pass), strict=True):
        with autocast(device):
            losses = token_losses(state.model, some_ids)
        loss = (losses * some_learn[:, 1:]).sum() / count
        loss.backward()
        total += loss.detach()
    mean = average_gradients(state.model, total.view(1)).item()
    if not math.isfinite(mean):
        raise SystemExit(
            f"Loss is {mean} at step {state.step}; the last checkpoint is untouched. "
            "Start again with a lower --muon-lr or --adam-lr."
        )
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
    for optimiser in state.optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["top_lr"] * lr_factor(progress)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    state.step += 1
    state.tokens += rows * length * world()[1]
    return mean


def agreed_time(elapsed_s: float) -> float:
    """The first process's clock: all must follow one schedule and stop at the same step."""
    if world()[1] == 1:
        return elapsed_s
    shared = torch.tensor([elapsed_s], dtype=torch.float64)
    dist.broadcast(shared, 0)
    return shared.item()


def check(state: State, dev: np.ndarray, most: int | None = 48) -> dict[str, float]:
    return {"dev_loss": prose_loss(state.model, dev, CONTEXT // 2, most), **copy_test(state.model)}


def train(
    state: State,
    plan: Plan,
    out: Path,
    dev: np.ndarray,
    clock: Callable[[], float],
    stop_at_step: int | None = None,
) -> None:
    """Train until the plan is done; `stop_at_step` ends earlier, as a kill would."""
    for optimiser in state.optimisers:
        for group in optimiser.param_groups:
            group.setdefault("top_lr", group["lr"])
    resume(state, out / "checkpoint.pt")
    log = Log(out / "log.jsonl") if world()[0] == 0 else None
    before, begin = state.elapsed_s, clock()
    last_check = last_log = begin
    tokens_then = state.tokens
    while state.step != stop_at_step:
        state.elapsed_s = before + agreed_time(clock() - begin)
        progress = plan.progress(state.step, state.elapsed_s)
        if progress >= 1:
            break
        loss = train_step(state, plan, progress)
        if log and state.step % 10 == 0:
            now = clock()
            rate = (state.tokens - tokens_then) / max(now - last_log, 1e-9)
            last_log, tokens_then = now, state.tokens
            log.write(step_line(state, progress, loss, rate))
        if agreed_time(clock() - last_check) >= plan.check_every_s:
            save(state, out / "checkpoint.pt")
            if log:
                log.write({"step": state.step, **check(state, dev)})
            last_check = clock()
    save(state, out / "checkpoint.pt")
    if log:
        log.write({"step": state.step, "tokens": state.tokens, **check(state, dev, None)})


def step_line(state: State, progress: float, loss: float, rate: float) -> dict[str, Any]:
    return {
        "step": state.step,
        "loss": round(loss, 4),
        "tokens": state.tokens,
        "tok_per_s": round(rate),
        "elapsed_s": round(state.elapsed_s),
        "eta_s": round(state.elapsed_s * (1 / max(progress, 1e-6) - 1)),
        "lr_factor": round(lr_factor(progress), 3),
    }


class Log:
    """Each record on stdout and as a line of a file."""

    def __init__(self, path: Path):
        self.file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in record.items()}
        print("  ".join(f"{name} {value}" for name, value in shown.items()), flush=True)
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()


# ------------------------------------------------------------------------------------------- export


def export(out: Path, target: Path) -> None:
    """Write the last checkpoint as a bf16 Hugging Face folder, replacing files one by one."""
    checkpoint = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
    model = LlamaForCausalLM(LlamaConfig(**checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    target.parent.mkdir(parents=True, exist_ok=True)
    # Next to the target, so that each move is a rename and no reader sees half a file.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        shutil.copytree(out / "tokenizer", folder, dirs_exist_ok=True)
        target.mkdir(exist_ok=True)
        for file in Path(folder).iterdir():
            file.chmod(0o644)  # safetensors writes for the owner only
            shutil.move(file, target / file.name)
    print(f"{target}: {checkpoint['counts']}")


# --------------------------------------------------------------------------------------------- main


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with the public *.train.jsonl.gz files")
    parser.add_argument("--out", type=Path, required=True, help="tokens, checkpoint and log")
    parser.add_argument("--size", choices=SIZES, default="3m")
    parser.add_argument("--hours", type=float, default=None, help="training time in hours")
    parser.add_argument("--steps", type=int, default=None, help="instead of --hours")
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--micro-tokens", type=int, default=2048)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export", type=Path, default=None, help="write the model here and stop")
    args = parser.parse_args()
    if args.export is None and (args.hours is None) == (args.steps is None):
        parser.error("give either --hours or --steps")
    if args.export is None and not (args.data and args.data.is_dir()):
        parser.error(
            f"--data {args.data} is not a folder; it must hold lm_openstax.train.jsonl.gz etc."
        )
    return args


def main() -> None:
    args = parse()
    if args.export:
        return export(args.out, args.export)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # drills are encoded one short text at a time
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
        torch.set_num_threads(1)
    rank, size = world()
    args.out.mkdir(parents=True, exist_ok=True)
    shape = SIZES[args.size]
    if rank == 0:
        prepare(args.data, args.out, shape.vocab)
    if size > 1:
        dist.barrier()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out / "tokenizer")
    torch.manual_seed(args.seed)  # equal weights in all processes
    model = build_model(shape).to("cuda" if torch.cuda.is_available() else "cpu")
    if rank == 0:
        print(
            f"{sum(p.numel() for p in model.parameters()):,} parameters on {model.device}",
            flush=True,
        )
    mixture = load_mixture(args.out, tokenizer, shape.vocab, args.seed, rank, size)
    state = State(model, build_optimisers(model, args.muon_lr, args.adam_lr), mixture)
    plan = Plan(args.hours, args.steps, args.tokens_per_step, args.micro_tokens)
    dev = np.load(args.out / "tokens" / "dev.npy")
    train(state, plan, args.out, dev, time.monotonic)
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
