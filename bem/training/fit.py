"""Fit an adapter on the answers of examples; resumable after a kill with the same bits.

All arms of an experiment see the same examples in the same order, because the order depends only
on the seed and the number of examples; and every step draws its randomness (dropout, Gumbel noise)
from (seed, step), so a resumed run repeats what the killed one would have done.

A loop of our own rather than transformers' Trainer: Trainer restores one global random state, which
repeats a run only if the kill fell on a checkpoint, and shuffles inside its sampler.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bem.adapters.sites import base_hash
from bem.config import TrainingConfig
from bem.errors import Diverged, TrainingError
from bem.training.data import Encoded, Example, collate, data_hash, encode
from bem.training.losses import answer_logits, answer_nll, labelled_tokens

if TYPE_CHECKING:
    from bem.adapters.attach import Attached

STATE = "state.pt"
METRICS = "metrics.jsonl"
FINAL_LR = 0.1
"""Share of the peak learning rate that is left in the last step."""


@dataclass(frozen=True)
class Objective:
    """What the training brings down, beside the regularisers."""

    name: str
    """What it depends on beside the examples; a resumed run must agree."""
    loss: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    """(logits, batch as `collate` makes it) -> sum over the answer tokens, in nats. The logits may
    belong to the last positions only, see `answer_nll`."""


def _nll(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    return answer_nll(logits, batch["labels"])[0].sum()


LIKELIHOOD = Objective("nll", _nll)


@dataclass(frozen=True)
class StepMetrics:
    """What one optimiser step did."""

    step: int
    """Steps done, counting this one."""
    loss: float
    """Mean of the objective over the answer tokens, in nats."""
    penalty: float
    """Regularisers of the variant."""
    grad_norm: float
    """Global gradient norm before clipping."""
    learning_rate: float
    tokens: int
    """Tokens of the step that were not padding."""
    seconds: float


@dataclass(frozen=True)
class FitResult:
    """What a run of `fit` did, over all its resumptions."""

    steps: int
    final_loss: float
    """Mean loss of the last tenth of the steps."""
    losses: list[float] = field(repr=False)
    seconds: float
    cpu_seconds: float
    folder: Path
    tokens: int
    """Tokens seen that were not padding."""
    data_hash: str
    """sha256 of the examples."""


def fit(
    attached: Attached,
    tokenizer: Any,
    examples: Sequence[Example],
    config: TrainingConfig,
    folder: str | Path,
    seed: int,
    on_progress: Callable[[StepMetrics], None] | None = None,
    label: str | None = None,
    objective: Objective = LIKELIHOOD,
) -> FitResult:
    """Train the adapter; the base model stays as it is.

    loss = mean NLL (or another objective) over all answer tokens of the step + attached.penalty()

    Each step's examples are sorted by length before they are cut into `config.accumulation`
    micro-batches: the gradient is the same, the padding less.

    Args:
        folder: gets state.pt (resumed from when it is there), metrics.jsonl, and TensorBoard files
            if that is installed.
        seed: of the order of the examples and of all noise.
        on_progress: called after every step.
        label: name of the arm in messages; None: the folder's name.
        objective: negative log-likelihood, or what `distill` hands over.
    Raises:
        Diverged: the loss or a gradient was not finite. The adapter holds the last saved state.
        TrainingError: the folder holds the state of another run, or the disk is full.
        DataError: an answer is longer than `config.max_length`.
        KeyboardInterrupt: passed on; the state is saved, call again to go on.
    """
    folder = Path(folder)
    if not examples:
        raise TrainingError(f"{label or folder.name}: no training examples.")
    batches = example_order(len(examples), config.steps, config.batch_size, seed)
    seen = sorted({i for batch in batches for i in batch})
    encoded = {i: encode(examples[i], tokenizer, config.max_length) for i in seen}
    run = _Run(
        attached,
        config,
        folder,
        label or folder.name,
        {
            "training": config.model_dump(exclude={"checkpoint_every"}),
            "seed": seed,
            "data": data_hash(examples),
            "tokens": _tokens_hash(encoded),
            "base": base_hash(attached.model),
            "adapter": attached.config.model_dump() if hasattr(attached, "config") else None,
            "parameters": {n: list(p.shape) for n, p in attached.named_parameters()},
            **({} if objective is LIKELIHOOD else {"objective": objective.name}),
        },
        objective,
    )
    run.begin()
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    attached.model.train()
    try:
        while run.step < config.steps:
            batch = [encoded[i] for i in batches[run.step]]
            metrics = run.advance(batch, pad_id, seed)
            if on_progress:
                on_progress(metrics)
            if run.step % config.checkpoint_every == 0 or run.step == config.steps:
                run.save()
    except KeyboardInterrupt:
        if run.consistent:
            run.save()
        raise
    except Diverged:
        run.restore()
        raise
    finally:
        attached.model.eval()
        run.close()
    losses = run.losses
    return FitResult(
        steps=run.step,
        final_loss=sum(losses[-max(1, len(losses) // 10) :]) / max(1, len(losses) // 10),
        losses=losses,
        seconds=run.seconds,
        cpu_seconds=run.cpu_seconds,
        folder=folder,
        tokens=run.tokens,
        data_hash=run.fingerprint["data"],
    )


def example_order(n: int, steps: int, batch_size: int, seed: int) -> list[list[int]]:
    """Indices of each step's examples: epoch after epoch, each in a new order."""
    need = steps * batch_size
    epochs = [np.random.default_rng([seed, e]).permutation(n) for e in range(-(-need // n))]
    stream = np.concatenate(epochs)[:need].tolist()
    return [stream[i : i + batch_size] for i in range(0, need, batch_size)]


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Rate of the step after `step` done ones: linear warm-up, then cosine to a tenth."""
    warmup = math.ceil(config.warmup * config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - 1 - warmup)
    share = FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(math.pi * min(1.0, done))) / 2
    return config.learning_rate * share


class _Run:
    """The state of a run: what is saved, restored and advanced together."""

    def __init__(
        self,
        attached: Attached,
        config: TrainingConfig,
        folder: Path,
        label: str,
        fingerprint: dict[str, Any],
        objective: Objective = LIKELIHOOD,
    ):
        self.attached, self.config, self.folder, self.label = attached, config, folder, label
        self.fingerprint, self.objective = fingerprint, objective
        self.parameters = [p for _, p in attached.named_parameters()]
        if not self.parameters:
            raise TrainingError(f"{label}: the adapter has no trainable parameters.")
        self.device = self.parameters[0].device
        decayed = [p for p in self.parameters if p.ndim > 1]
        plain = [p for p in self.parameters if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": group, "weight_decay": decay}
                for group, decay in ((decayed, config.weight_decay), (plain, 0.0))
                if group
            ],
            lr=config.learning_rate,
        )
        self.step, self.tokens, self.seconds, self.cpu_seconds = 0, 0, 0.0, 0.0
        self.losses: list[float] = []
        self.saved_step = -1
        self.consistent = True
        self._metrics: io.FileIO | None = None
        self._board: Any = None

    # -- state on disk

    def begin(self) -> None:
        """Resume, or write the state before the first step (so a full disk shows at once)."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"{self.label}: cannot use {self.folder}: {error}.") from error
        if (self.folder / STATE).exists():
            self.restore()
        else:
            self.save()
        self._open_logs()

    def save(self) -> None:
        state = {
            "fingerprint": json.dumps(self.fingerprint),
            "adapter": {k: v.detach().cpu() for k, v in self.attached.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "losses": self.losses,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with self._disk("the training state"):
            write_atomically(self.folder / STATE, buffer.getbuffer())
        self.saved_step = self.step

    def restore(self) -> None:
        path = self.folder / STATE
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            before = json.loads(state["fingerprint"])
        except Exception as error:  # torch raises many kinds for a file that is no checkpoint
            raise TrainingError(
                f"{self.label}: {path} cannot be read ({type(error).__name__}). "
                "Delete it to begin anew."
            ) from error
        changes = _changes(before, json.loads(json.dumps(self.fingerprint)))
        if changes:
            more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
            raise TrainingError(
                f"{self.label}: {path} belongs to a run with other settings: {'; '.join(changes[:3])}{more}. "
                f"Set them back, or delete {self.folder} to begin anew."
            )
        self.attached.load_state_dict(state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.tokens = state["step"], state["tokens"]
        self.seconds, self.cpu_seconds = state["seconds"], state["cpu_seconds"]
        self.losses = state["losses"]
        self.saved_step, self.consistent = self.step, True

    # -- one step

    def advance(self, batch: list[Encoded], pad_id: int, seed: int) -> StepMetrics:
        """One optimiser step over `batch`."""
        started, cpu_started = time.perf_counter(), time.process_time()
        rate = learning_rate(self.step, self.config)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            noise = np.random.SeedSequence([seed, self.step]).generate_state(1, np.uint64)[0]
            torch.manual_seed(int(noise))
            loss, penalty = self._backward(batch, pad_id)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip))
        if not math.isfinite(norm):
            self._diverged("gradient norm", norm)
        self.consistent = False  # an interrupt from here on must not save a half-made step
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.attached.after_step()
        tokens = sum(len(encoded) for encoded in batch)
        seconds = time.perf_counter() - started
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        self.cpu_seconds += time.process_time() - cpu_started
        self.losses.append(loss)
        self.consistent = True
        metrics = StepMetrics(self.step, loss, penalty, norm, rate, tokens, seconds)
        self._log(metrics)
        return metrics

    def _backward(self, batch: list[Encoded], pad_id: int) -> tuple[float, float]:
        ordered = sorted(batch, key=len)
        size = -(-len(ordered) // self.config.accumulation)
        micros = [collate(ordered[i : i + size], pad_id) for i in range(0, len(ordered), size)]
        count = sum(labelled_tokens(micro["labels"]) for micro in micros)
        total_loss = total_penalty = 0.0
        for micro in micros:
            inputs = {key: tensor.to(self.device) for key, tensor in micro.items()}
            with torch.autocast(
                self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"
            ):
                logits = answer_logits(self.attached.model, inputs)
                # Divided by the answer tokens of the whole step: the sum over micro-batches is then
                # the mean over the step, however it was cut.
                loss = self.objective.loss(logits, inputs) / count
            penalty = self.attached.penalty() * (len(inputs["labels"]) / len(batch))
            total = loss + penalty
            if not math.isfinite(value := float(total.detach())):
                self._diverged("loss", value)
            total.backward()
            total_loss += float(loss.detach())
            total_penalty += float(penalty.detach())
        return total_loss, total_penalty

    def _diverged(self, what: str, value: float) -> None:
        raise Diverged(
            f"{self.label}: the {what} was {value} in step {self.step + 1}. "
            f"Kept the state after step {self.saved_step}. "
            f"Lower training.learning_rate (now {self.config.learning_rate:g})."
        )

    # -- logs

    def _open_logs(self) -> None:
        path = self.folder / METRICS
        kept = path.read_bytes().splitlines(keepends=True)[: self.step] if path.exists() else []
        with self._disk("the metrics"):
            write_atomically(path, b"".join(kept))
            self._metrics = open(path, "ab", buffering=0)  # noqa: SIM115 - closed in close()
        if find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1)

    def _log(self, metrics: StepMetrics) -> None:
        assert self._metrics is not None
        at = self._metrics.tell()
        with self._disk("the metrics"):
            try:
                self._metrics.write(json.dumps(asdict(metrics)).encode() + b"\n")
            except OSError:
                self._metrics.truncate(at)
                raise
        if self._board:
            for name in ("loss", "penalty", "grad_norm", "learning_rate"):
                self._board.add_scalar(name, getattr(metrics, name), metrics.step)

    def close(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self._metrics:
            self._metrics.close()
        if self._board:
            self._board.close()

    @contextmanager
    def _disk(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kept = (
                "" if self.saved_step < 0 else f" The state after step {self.saved_step} is whole."
            )
            reason = "no space is left" if error.errno == errno.ENOSPC else str(error)
            raise TrainingError(
                f"{self.label}: {what} could not be written to {self.folder}: {reason}.{kept} "
                "Free some space and start again: it goes on from there."
            ) from error


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file that is either whole or not there: to a neighbour first, then renamed."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _tokens_hash(encoded: dict[int, Encoded]) -> str:
    digest = hashlib.sha256()
    for i, row in encoded.items():
        digest.update(np.array([i, len(row), *row.input_ids, *row.labels], np.int64).tobytes())
        digest.update(np.array(row.relevance, np.float64).tobytes())
    return digest.hexdigest()


def _changes(before: Any, now: Any, name: str = "") -> list[str]:
    """What differs, as "training.steps was 100, is 200"."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [
            change
            for key in keys
            for change in _changes(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
        ]
    if before == now:
        return []
    return [f"{name} was {str(before)[:12]}, is {str(now)[:12]}"]
