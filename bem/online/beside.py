"""The learner of a server: what `bem serve --learn` runs in a process of its own.

It has its own copy of the base, reads the server's feedback log, and moves the version store, which the server
follows. Neither waits for the other: killed, it takes nothing along, and is gone on with from its last snapshot.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from bem.adapters.attach import attach, load
from bem.adapters.copies import with_shared_weights
from bem.bases.limits import context_length
from bem.bases.load import load_base
from bem.config import LearningConfig, ServingConfig
from bem.errors import ConfigError
from bem.online.adapter_trainee import AdapterTrainee
from bem.online.feedback import FeedbackLog
from bem.online.live import follow
from bem.online.loop import Loop
from bem.online.marks import METRICS, marks_by
from bem.online.router_trainee import RouterTrainee
from bem.online.stream import read_stream
from bem.online.told import Scores
from bem.online.trainee import Trainee
from bem.routing.mount import load_router
from bem.routing.mounted import is_router
from bem.runs.loading import load_current
from bem.runs.store import Store
from bem.training.data import encode
from bem.training.example import Example

BY = "bem serve --learn"
"""Who stands in the store's ledger."""


def learn(config: ServingConfig, stopped: threading.Event) -> None:
    """Learn from a server's feedback until stopped.

    Args:
        config: the server's.
    Raises:
        ConfigError: it asks for no learner, or for one that the base cannot have.
        OnlineError: another learner has the folder, or it is damaged.
        CheckpointError: the store is damaged, or holds another kind than the one that learns.
    """
    if config.learn is None or config.store is None or config.feedback is None:
        raise ConfigError("this server has no learner: start it with --learn.")
    options, store = config.learn, Store(config.store, by=BY)
    dtype: Any = config.dtype
    model, tokenizer = load_base(config.base, config.device, dtype)
    _check(options, model)
    folder = Path(options.folder)
    trainee = trainee_of(options, store, model, tokenizer)
    log = FeedbackLog(config.feedback)

    def check(row: Example) -> object:
        return encode(row, tokenizer, options.online.max_length, train_history=False)

    try:
        with Loop(folder, store, trainee, options.online) as loop:
            loop.trust(read_stream(options.trusted) if options.trusted else [])
            scores = Scores(folder, loop.event)
            follow(loop, log, stopped, options.wait_s, check, scores.add)
    finally:
        log.close()


def _check(options: LearningConfig, model: Any) -> None:
    if options.score not in METRICS:
        raise ConfigError(f"learn.score {options.score!r} is none of {', '.join(METRICS)}.")
    positions = context_length(model)
    if positions is not None and options.online.max_length > positions:
        raise ConfigError(
            f"learn.online.max_length {options.online.max_length} is more than the {positions} positions of the base."
        )


def trainee_of(options: LearningConfig, store: Store, model: Any, tokenizer: Any) -> Trainee:
    """What learns. It begins as what the store has in use is made, and stays of that kind: what it began with
    lies in the learner's folder, so that a restart begins with the same numbers.

    Args:
        model: the base; copies of it learn.
    """
    start = Path(options.folder) / "start"
    if not start.is_dir():
        _begin(start, options, store, model)
    marks = marks_by(options.score, tokenizer, options.online.max_length, form=options.form)
    if is_router(start):
        mounted = load_router(with_shared_weights(model), start)
        return RouterTrainee(mounted, tokenizer, marks, options.online)
    attached = load(with_shared_weights(model), start)
    return AdapterTrainee(attached, tokenizer, marks, options.online)


def _begin(start: Path, options: LearningConfig, store: Store, model: Any) -> None:
    """A router begins as it is. An adapter begins new, as the bare base, in the form of the one in use."""
    found = None
    if store.journal.begun():
        found, _ = load_current(store, with_shared_weights(model))
    start.parent.mkdir(parents=True, exist_ok=True)
    if found is None:
        new = attach(with_shared_weights(model), options.variant, rank=options.rank)
    elif store.load_current().release.kind == "router":
        new = found
    else:
        new = attach(with_shared_weights(model), found.config)
    new.save(start)
