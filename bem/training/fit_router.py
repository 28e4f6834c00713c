"""A router for experts that exist, from a few rows of each skill.

fit = bem.fit_router(model, tokenizer, {"sql": "loras/sql", "support": "someone/lora"}, "examples.jsonl")
fit.scores                       # accuracy, regret and flip rate on held-out rows, beside plain baselines
fit.mounted.model.generate(...)  # the router decides
fit.save("routed/mine")          # what `bem.load_router` takes

The router decides once per turn, when it has read the prompt; the bare base reads. How it learns: a linear
classifier of what was said becomes the reader's start (`bem.training.reader_start`); then the reader is
trained as far as left-out folds of the training rows say that this helps; actor and critic follow it
(`bem.training.plain_policy`). The held-out rows choose nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bem import files
from bem.config import RouterConfig
from bem.errors import ConfigError, DataError
from bem.experts.expert import Expert, read_expert
from bem.routing.modes import seeded
from bem.routing.mount import mount
from bem.routing.mounted import FIT, Mounted
from bem.training.data import Encoded, check_fits, context_length, data_hash
from bem.training.few_rows import Learned, learn, plain_choices
from bem.training.router_scores import (
    Estimate,
    Score,
    at_turns,
    path_of,
    regret_as_it_acts,
    router_path,
    score,
)
from bem.training.router_targets import (
    UNKNOWN,
    Targets,
    answered_rows,
    check_apart,
    check_enough,
    check_left,
    prompts_of,
    split_rows,
    targets_of,
    turn_losses,
)
from bem.training.routing_rows import BASE, RoutingExample, read_routing_rows

FEWEST = 8
"""Rows of a skill: some must be held out, and the others cut into folds."""
TURN = 64
"""Chunks for which a decision holds, unless a turn begins: the whole answer."""
OWN_RULES = ("spans", "ranks", "strengths", "d_read", "memory", "hidden", "evidence")
Progress = Callable[[str, int, int], None]
"""(stage, done, of)"""


@dataclass(frozen=True)
class RouterFit:
    """A fitted router, and how well it chooses on rows that it was not fitted to."""

    mounted: Mounted
    scores: list[Score]
    """The router first."""
    as_it_acts: Estimate | None
    """Regret of its real forward passes; see `regret_as_it_acts`."""
    rows: dict[str, dict[str, int]]
    """Of each side ("train", "held_out"): rows by the expert of their last turn."""
    held_out: list[str]
    """Ids of the rows that chose nothing."""
    learned: Learned
    notes: list[str]
    """What a reader of the numbers should know."""
    seconds: dict[str, float]
    data: str
    """sha256 of the rows."""
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """All of it but the model, as JSON holds it."""
        own = {k: v for k, v in vars(self).items() if k not in ("mounted", "scores", "learned")}
        own["as_it_acts"] = None if self.as_it_acts is None else asdict(self.as_it_acts)
        scores = [asdict(s) for s in self.scores]
        experts = [{"name": e.name, "from": e.source} for e in self.mounted.experts]
        return {"experts": experts, "scores": scores, "learned": asdict(self.learned), **own}

    def save(self, folder: str | Path) -> Path:
        """Write what `bem.load_router` takes, and all the numbers beside it as fit.json.

        Raises:
            CheckpointError: as `Mounted.save`.
        """
        record = self.to_dict()
        folder = self.mounted.save(folder, self.data, extra={"fit": record["learned"]})
        files.write_json(folder / FIT, record)
        return folder


def fit_router(
    model: Any,
    tokenizer: Any,
    experts: Mapping[str, str | Path | Expert] | Sequence[str | Path | Expert],
    examples: str | Path | Sequence[Any],
    held_out: float | str | Path | Sequence[Any] = 0.25,
    *,
    seed: int = 0,
    max_length: int = 1024,
    batch_size: int = 16,
    cache: str | Path | None = None,
    baselines: bool = True,
    on_progress: Progress | None = None,
    **rules: Any,
) -> RouterFit:
    """Mount experts on a frozen model and fit a router to rows with labels or answers.

    Args:
        experts: name -> folder, hub id or `Expert`; without names, those of the folders.
        examples: a .jsonl file, or rows; see `bem.training.routing_rows`. From 20 of a skill.
        held_out: share of every skill's documents that the numbers are stated on, or rows of their own.
        seed: of the split and of the weights that are drawn.
        max_length: tokens of a conversation that are read, the last ones; at most the model's positions.
        batch_size: rows of one forward pass.
        cache: folder that keeps what the experts lose on the answers, for another fit to the same rows.
        baselines: also score plain classifiers on the base's hidden states, one of them on its last layer.
        on_progress: called with (stage, done, of).
        **rules: fields of `RouterConfig`; what the router may choose beside the expert cannot be learned
            from few rows and is not free.
    Raises:
        DataError: rows that cannot be used, a label that names no expert, a skill with too few rows.
        ConfigError: a rule that is not free, a share outside (0, 1).
        AttachError, CheckpointError: as `bem.mount`.
    """
    _check_options(held_out, rules)
    _check_numbers(seed=(seed, 0), max_length=(max_length, 1), batch_size=(batch_size, 1))
    loaded = _loaded(model, experts)
    names = [e.name for e in loaded if e.name != rules.get("shared")]
    rows = read_routing_rows(examples, names)
    share = float(held_out) if isinstance(held_out, int | float) else None
    test = [] if isinstance(held_out, int | float) else read_routing_rows(held_out, names)
    check_apart(rows, test)
    mounted = mount(model, loaded, RouterConfig(**_rules(loaded, rules.get("shared"))), **rules)
    try:
        kept = None if cache is None else Path(cache)
        job = _Job(mounted, tokenizer, max_length, batch_size, seed, kept, on_progress)
        return job.fit(rows, test, share, baselines)
    except BaseException:
        mounted.detach()
        raise


def _check_options(held_out: Any, rules: Mapping[str, Any]) -> None:
    if held_out is None or (isinstance(held_out, float | int) and not 0.0 < held_out < 1.0):
        raise ConfigError(f"held_out must be a share between 0 and 1, or rows; got {held_out}.")
    if fixed := [name for name in rules if name in OWN_RULES]:
        raise ConfigError(
            f"{', '.join(fixed)}: a router that is fitted to few rows chooses the expert of a turn and nothing "
            "else. `bem train router` learns the other choices too."
        )


def _check_numbers(**given: tuple[Any, int]) -> None:
    for name, (value, least) in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be a whole number from {least}; got {value!r}.")


def _loaded(model: Any, experts: Any) -> list[Expert]:
    named = experts.items() if isinstance(experts, Mapping) else [(None, e) for e in experts]
    return [e if isinstance(e, Expert) else read_expert(e, model, name) for name, e in named]


def _rules(loaded: Sequence[Expert], shared: str | None) -> dict[str, Any]:
    """One decision per turn, free of charge; memory and hidden layer have room for every expert."""
    options = len(loaded) + 1
    sides = ([e for e in loaded if (e.name == shared) == side] for side in (False, True))
    all_ranks = sum(
        max((u.v.shape[0] for e in side for u in e.updates.values()), default=0) for side in sides
    )
    return {
        "spans": (TURN,),
        "ranks": (all_ranks,),
        "strengths": (1.0,),
        "switch_cost": 0.0,
        "hysteresis": 0.0,
        "flip_rate_max": 1.0,
        "d_read": max(32, options + 1),
        "memory": max(48, options + 1),
        "hidden": max(48, options + 1),
    }


class _Job:
    """One fit."""

    def __init__(
        self,
        mounted: Mounted,
        tokenizer: Any,
        max_length: int,
        batch_size: int,
        seed: int,
        cache: Path | None,
        tell: Progress | None,
    ):
        self.mounted, self.tokenizer, self.seed, self.cache = mounted, tokenizer, seed, cache
        self.max_length = min(max_length, context_length(mounted.base) or max_length)
        self.batch_size, self.tell = batch_size, tell or (lambda stage, done, of: None)
        self.pad_id = tokenizer.pad_token_id or 0
        self.experts = mounted.router.space.experts
        self.options = (BASE, *self.experts)
        self.full = 0
        self.seconds: dict[str, float] = {}

    def fit(
        self,
        rows: list[RoutingExample],
        test: list[RoutingExample],
        share: float | None,
        plain: bool,
    ) -> RouterFit:
        examples = [*rows, *test]
        prompts = prompts_of(examples, self.tokenizer, self.max_length)
        check_fits(self.mounted.base, self.tokenizer, prompts)
        self.full = sum(len(prompt) >= self.max_length for prompt in prompts)
        losses: list[Any] = [None] * len(examples)
        self._measure(examples, [i for i, e in enumerate(examples) if not e.labels], losses)
        targets = self._targets(examples, prompts, losses)
        out = np.arange(len(examples)) >= len(rows)
        if share is not None:
            out = split_rows(examples, _last(targets, range(len(examples))), share, self.seed)
        train, held = ((side).nonzero()[0].tolist() for side in (~out, out))
        asked = self._check(targets, rows)
        check_left(_last(targets, train), asked, self.options)
        self._measure(
            examples, [i for i in held if examples[i].labels and examples[i].answered], losses
        )
        targets = self._targets(examples, prompts, losses)
        learned = self._learn(prompts, targets, train)
        choices = self._plain_choices(prompts, targets, train) if plain else {}
        started = time.monotonic()
        scores, acts = self._score(examples, prompts, targets, losses, held, choices)
        self.seconds["measuring"] = time.monotonic() - started
        sides = {"train": train, "held_out": held}
        return RouterFit(
            self.mounted, scores, acts,
            {name: self._counts(targets, side) for name, side in sides.items()},
            [examples[i].row.id for i in held], learned, self._notes(targets, scores, train, acts),
            {k: round(v, 2) for k, v in self.seconds.items()},
            data_hash([e.row for e in examples]), self.seed,
        )  # fmt: skip

    # --- what is right ----------------------------------------------------------------------------

    def _measure(self, examples: list[RoutingExample], chosen: list[int], losses: list) -> None:
        """Every expert's losses on the answers of some rows."""
        if not chosen:
            return
        started = time.monotonic()
        rows = answered_rows(examples, self.tokenizer, self.max_length, chosen)
        found = turn_losses(
            self.mounted, rows, self.pad_id, self.batch_size,
            lambda done, of: self.tell("reading the answers under every expert", done, of),
            self._kept(rows),
        )  # fmt: skip
        for i, loss in zip(chosen, found, strict=True):
            losses[i] = loss
        spent = self.seconds.get("tracing", 0.0)
        self.seconds["tracing"] = spent + time.monotonic() - started

    def _kept(self, rows: list[Encoded]) -> Path | None:
        if self.cache is None:
            return None
        return self.cache / f"{files.sha256_json([row.input_ids for row in rows])[:16]}.npz"

    def _targets(self, examples: Any, prompts: Any, losses: Any) -> Targets:
        chunk_size = self.mounted.router.chunk_size
        return targets_of(examples, prompts, losses, self.experts, self.pad_id, chunk_size)

    def _check(self, targets: Targets, rows: list[RoutingExample]) -> list[int]:
        """Options that labels name, if there are rows enough."""
        best = _last(targets, range(len(rows)))
        named = {label for e in rows for label in e.labels if label is not None}
        missing = [name for name in self.experts if name not in named]
        if missing and all(e.labels for e in rows):
            raise DataError(
                f"no row is labelled {', '.join(map(repr, missing))}: label some, or leave the expert out. "
                f"Labels: {', '.join(sorted(named))}."
            )
        asked = [o for o, name in enumerate(self.options) if name in named]
        check_enough(best, asked, self.options, FEWEST)
        return asked

    def _counts(self, targets: Targets, side: Sequence[int]) -> dict[str, int]:
        last = _last(targets, side)
        return {name: last.count(o) for o, name in enumerate(self.options) if o in last}

    # --- learning and scoring ---------------------------------------------------------------------

    def _learn(self, prompts: list[Encoded], targets: Targets, train: list[int]) -> Learned:
        started = time.monotonic()
        with seeded(self.seed, self.mounted.base.device), self.mounted.training("router"):
            learned = learn(
                self.mounted, prompts, targets, train, self.pad_id, self.seed, self.tell
            )
        self.seconds["fitting"] = time.monotonic() - started
        return learned

    def _plain_choices(
        self, prompts: list[Encoded], targets: Targets, train: list[int]
    ) -> dict[tuple[str, str], NDArray[np.int64]]:
        started, size = time.monotonic(), self.batch_size
        found = plain_choices(
            self.mounted, prompts, targets, train, self.pad_id, size, self.seed, self.tell
        )
        self.seconds["baselines"] = time.monotonic() - started
        return found

    def _score(
        self,
        examples: Any,
        prompts: Any,
        targets: Targets,
        losses: Any,
        held: list[int],
        plain: Any,
    ) -> tuple[list[Score], Estimate | None]:
        self.tell("measuring on held-out rows", 0, 0)
        seen = targets.select(held)
        paths = router_path(self.mounted, [prompts[i] for i in held], self.pad_id, self.batch_size)
        own = at_turns(paths, seen.starts)
        layer = self.mounted.router_config.router_layer
        scores = [score("router", f"layer {layer}", own, paths, seen, self.options)]
        for (name, reads), choices in plain.items():
            chosen = choices[held]
            route = path_of(chosen, seen.starts)
            scores.append(score(name, reads, chosen, route, seen, self.options, own))
        measured = [i for i in held if losses[i] is not None]
        if not measured:
            return scores, None
        rows = answered_rows(examples, self.tokenizer, self.max_length, measured)
        known = [losses[i] for i in measured]
        return scores, regret_as_it_acts(self.mounted, rows, known, self.pad_id, self.batch_size)

    def _notes(
        self, targets: Targets, scores: list[Score], train: list[int], acts: Estimate | None
    ) -> list[str]:
        notes = []
        if self.full:
            of = f"{self.full} of {len(targets.best)} prompts fill max_length"
            notes.append(
                f"{of} ({self.max_length} tokens): what stood before in them was not read."
            )
        router = scores[0]
        for other in scores[1:]:
            if other.is_better:
                notes.append(_better(other, router))
        known = set(targets.best[train].ravel().tolist()) - {UNKNOWN}
        for option, name in enumerate(self.experts, 1):
            if option not in known:
                notes.append(
                    f"{name!r} was the best in no training row: the router never chooses it."
                )
        if acts is not None and router.regret is not None and acts.low > router.regret.high + 0.05:
            notes.append(
                f"as it acts the router loses {acts.value:.3f} nats per answer token, {router.regret.value:.3f} of "
                "them by its choices: the rest is that the bare base read the prompts."
            )
        return notes


def _better(other: Score, router: Score) -> str:
    assert other.lead is not None
    text = (
        f"{other.name} on {other.reads} is better than the router: accuracy {other.accuracy.value:.1%} against "
        f"{router.accuracy.value:.1%}, a difference of {0.0 - other.lead.value:.1%} [{-other.lead.high:.1%}, "
        f"{-other.lead.low:.1%}]"
    )
    if other.regret_lead is not None:
        lead = other.regret_lead
        text += f"; regret {-lead.value:+.3f} nats [{-lead.high:+.3f}, {-lead.low:+.3f}]"
    return (
        text + ". It costs a forward pass of its own before every turn."
        if other.reads != router.reads
        else text + "."
    )


def _last(targets: Targets, rows: Sequence[int]) -> list[int]:
    """Option of the last turn of each row that somebody judged."""
    return [int(targets.best[i][targets.best[i] != UNKNOWN][-1]) for i in rows]
