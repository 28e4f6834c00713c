"""A server without its HTTP face: engines, versions, and what is known of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from bem.bases.limits import text_config
from bem.bases.load import load_base
from bem.config import ServingConfig
from bem.engine.engine import StepStats
from bem.engine.request import Result
from bem.errors import CheckpointError, Refused
from bem.evidence.index import open_index
from bem.evidence.rerank import load_reranker
from bem.evidence.retriever import Retriever
from bem.runs.release import SHORT, Release
from bem.serving.answers import Receipt
from bem.serving.driver import Driver
from bem.serving.feedback import Ledger
from bem.serving.guarding import Guarding
from bem.serving.history import History
from bem.serving.keys import KeyRing, Quotas
from bem.serving.learner import LearnerProcess
from bem.serving.learning import Learning
from bem.serving.metrics import Metrics
from bem.serving.pictures import Sight
from bem.serving.prompts import Limits, Prepared, Writer
from bem.serving.residents import Residents
from bem.serving.schemas import Asked

log = logging.getLogger("bem.serving.requests")


class Serving:
    """Everything that a server has; `async with` starts and stops it."""

    def __init__(self, config: ServingConfig, base: tuple[Any, Any] | None = None):
        """
        Args:
            base: model and tokenizer that are loaded already; None: `config.base` is loaded.
        Raises:
            BaseError: the base cannot be loaded.
            EngineError: it is a model that the engine cannot run.
            CheckpointError: the store is damaged, or serves another base.
        """
        self.config = config
        dtype: Any = config.dtype
        model, self.tokenizer = base or load_base(config.base, config.device, dtype)
        self.metrics = Metrics(config.base)
        self.history = History(time.monotonic)
        self.driver = Driver(self._observe)
        self.guard = Guarding(config.policy, self.metrics, self.tokenizer)
        guarded = self.guard.on_model
        self.residents = Residents(model, self.tokenizer, config, self.driver, guarded)
        limits = Limits(self.residents.bare.engine.max_tokens, text_config(model).vocab_size)
        self.writer = Writer(self.tokenizer, config, limits, _retriever(config))
        self.sight = Sight(config)
        self.keys = KeyRing(None if config.keys is None else Path(config.keys))
        self.guard.warn_of(self.keys.names)
        self.quotas = Quotas(time.monotonic)
        self.feedback = None if config.feedback is None else Ledger(config.feedback)
        self.learner = LearnerProcess(config) if config.learn else None
        self.learning = Learning(self.learner, self.feedback, self.residents.store)
        self.metrics.registry.register(self.learning)
        self.draining = False
        self._writes = ThreadPoolExecutor(1, "writer")
        self._beside: list[asyncio.Task[None]] = []
        """What runs beside the answers: who watches the store, who keeps the learner alive."""

    def _observe(self, engine: str, stats: StepStats) -> None:
        if self.guard.basis is not None:  # engines know guarded versions by another name
            known = {r.acting: r.version for r in list(self.residents)}
            told = (replace(r, version=known.get(r.version, r.version)) for r in stats.finished)
            stats = replace(stats, finished=tuple(told))
        self.metrics.step(engine, stats, self.residents.chunks)
        self.history.step(stats)

    # --- its life ---------------------------------------------------------------------------------

    async def __aenter__(self) -> Serving:
        self.driver.start()
        self.guard.start()
        self._beside = [asyncio.ensure_future(self.residents.watch())]
        if self.learner is not None:
            self._beside.append(asyncio.ensure_future(self.learner.run()))
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.draining = True
        for task in self._beside:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if self.learner is not None:
            await asyncio.to_thread(self.learner.stop)
        self.residents.close()
        self._writes.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.driver.stop)
        await asyncio.to_thread(self.guard.close)
        if self.feedback is not None:
            self.feedback.close()

    @property
    def ready(self) -> bool:
        """May requests be sent here?"""
        return self.driver.alive and not self.draining

    def check_open(self) -> None:
        """Refuse what comes while the server stops.

        Raises:
            Refused: it does.
        """
        if self.draining:
            raise Refused(503, "The server is about to stop.", None, "stopping", retry_after_s=5)

    # --- what it does -----------------------------------------------------------------------------

    async def prepare(self, asked: Asked, owner: str, route: str | None) -> Prepared:
        """See `Writer.prepare` and `Sight.add`."""

        def call() -> Prepared:
            return self.sight.add(asked, self.writer.prepare(asked, owner, route))

        return await asyncio.get_running_loop().run_in_executor(self._writes, call)

    def note(
        self, receipt: Receipt, owner: str, prepared: Prepared, results: Sequence[Result]
    ) -> None:
        """Write to the log what was answered; what was said only if that is asked for."""
        log.info(
            "%s by %s: %s version %s, %d of %d answers, prompt tokens %d, cached %d, generated %d, %.0f ms",
            receipt.id,
            owner,
            receipt.model,
            receipt.version[:SHORT],
            len(results),
            len(prepared.requests),
            sum(len(prompt.ids) for prompt in prepared.prompts),
            sum(result.cached_tokens for result in results),
            sum(len(result.token_ids) for result in results),
            1000 * max((result.seconds for result in results), default=0.0),
        )
        if self.config.log_prompts:
            asked = [self.tokenizer.decode(list(prompt.ids)) for prompt in prepared.prompts]
            log.info("%s: %r -> %r", receipt.id, asked, [result.text for result in results])

    async def names(self) -> dict[str, dict[str, Any]]:
        """Name of each model that can be asked for -> what it is."""
        residents = self.residents
        front, kept = residents.current, await asyncio.to_thread(self.kept)
        listed = {
            "bem": {"version": front.version},
            "bem:base": {"version": residents.bare.version},
        }
        listed |= {f"bem:{expert}": {"version": front.version} for expert in front.experts}
        for release in kept:
            name = f"bem@{release.short}"
            listed.setdefault(name, {"version": release.version, "source": release.source})
        return listed

    def kept(self) -> list[Release]:
        """Releases that can be asked for by version, the one that was mentioned last first."""
        store = self.residents.store
        try:
            return [] if store is None else store.known()
        except CheckpointError:
            return []

    def state(self) -> dict[str, Any]:
        """For people and load balancers."""
        residents = self.residents
        return {
            "ready": self.ready,
            "base": self.config.base,
            "version": residents.current.version,
            "resident": sorted(r.version[:SHORT] for r in residents),
            "canary": {version[:SHORT]: share for version, share in residents.canaries.items()},
            "problems": len(residents.problems),
        }

    def versions(self) -> list[dict[str, Any]]:
        """The versions in memory, the one in front first."""
        residents = self.residents
        said = [
            {
                "version": each.short,
                "source": each.release.source if each.release else "",
                "experts": list(each.experts),
                "current": each is residents.current,
                "bare": each is residents.bare,
                "canary": residents.canaries.get(each.version, 0.0),
            }
            for each in residents
        ]
        return sorted(said, key=lambda version: not version["current"])

    async def metrics_text(self) -> bytes:
        """For Prometheus."""
        await asyncio.to_thread(self.learning.read)
        residents = self.residents
        versions = [resident.version for resident in residents]
        current, problems = residents.current.version, len(residents.problems)
        self.metrics.versions(versions, current, residents.canaries, problems)
        return self.metrics.text()


def _retriever(config: ServingConfig) -> Retriever | None:
    if config.index is None:
        return None
    index = open_index(config.index)
    return Retriever(index, load_reranker("tiny"), timeout_ms=config.retrieval_ms)
