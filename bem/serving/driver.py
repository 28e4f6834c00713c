"""The one thread that steps engines. Others leave word for it, and hear from it through their event loop.

An engine belongs to this thread from `add` on: whoever wants something of it says so by `post`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TypeVar

from bem.engine.engine import Engine, StepStats
from bem.engine.request import ChunkAction, Request, Result, TokenLogprob
from bem.engine.sequence import Sequence
from bem.errors import BemError, Refused

log = logging.getLogger(__name__)

T = TypeVar("T")
Observe = Callable[[str, StepStats], None]


@dataclass(frozen=True)
class Progress:
    """What came of an answer since the last look."""

    version: str
    cached_tokens: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    actions: tuple[ChunkAction, ...]
    """Of a router, in chunks that began since: the last one governs the last token."""


Event = Progress | Result | BaseException
"""A result or an exception is the last one."""


@dataclass(eq=False)
class Job:
    """A request on its way; made and heard in an event loop."""

    engine: str
    request: Request
    streams: bool
    """Does it hear of every token?"""
    loop: asyncio.AbstractEventLoop
    hear: Callable[[Event], None]
    """Called in the loop."""
    number: int = -1
    """Of the engine; -1: not submitted."""
    seen: int = 0
    """Tokens of the answer that were told."""
    chunks: int = 0
    """Chunks whose action was told."""
    over: bool = False


class Driver:
    """Steps engines by name, each in turn, as long as they have something to do."""

    def __init__(self, observe: Observe = lambda name, stats: None):
        """observe: hears (engine's name, stats) after each step, on this thread."""
        self.observe = observe
        self._mail: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._engines: dict[str, Engine] = {}
        self._jobs: dict[str, dict[int, Job]] = {}
        self.lost: set[str] = set()
        """Names of engines that failed for good."""
        self._going = True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- from any thread --------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to step."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step; what runs is cut off."""
        self.post(self._halt)
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Does the thread run?"""
        return self._thread.is_alive()

    def post(self, call: Callable[[], None]) -> None:
        """Have something done on the thread, between two steps."""
        self._mail.put(call)

    async def call(self, compute: Callable[[], T]) -> T:
        """Have something computed on the thread, between two steps, and wait for it."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(done: Callable[[], None]) -> None:
            loop.call_soon_threadsafe(lambda: None if future.cancelled() else done())

        def run() -> None:
            try:
                value = compute()
            except Exception as error:
                failed = error
                settle(lambda: future.set_exception(failed))
            else:
                settle(lambda: future.set_result(value))

        self.post(run)
        return await future

    def add(self, name: str, engine: Engine) -> None:
        """Take an engine in; it belongs to this thread from now on."""

        def take() -> None:
            self._engines[name], self._jobs[name] = engine, {}
            self.lost.discard(name)

        self.post(take)

    def remove(self, name: str) -> None:
        """Let go of an engine that nobody uses; the blocks that it computed stay in the store."""

        def drop() -> None:
            if self._jobs.get(name):
                log.error("engine %s still has %d requests: kept", name, len(self._jobs[name]))
                return
            self._engines.pop(name, None)
            self._jobs.pop(name, None)

        self.post(drop)

    def submit(self, job: Job) -> None:
        """Have a request answered; what comes of it goes to `job.hear`."""
        self.post(lambda: self._submit(job))

    def cancel(self, job: Job) -> None:
        """Nobody waits for it any more."""
        self.post(lambda: self._cancel(job))

    # --- on the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        while self._going:
            self._read_mail()
            for name in [n for n, engine in self._engines.items() if engine.busy]:
                try:
                    stats = self._engines[name].step()
                except Exception as error:
                    self._failed(name, error)
                    continue
                self._hand_out(name, stats)
                try:
                    self.observe(name, stats)
                except Exception:  # what is only watched must not end what is served
                    log.exception("a step could not be noted")

    def _read_mail(self) -> None:
        """Do what was asked; wait for it when there is nothing else to do."""
        wait = not any(engine.busy for engine in self._engines.values())
        try:
            while True:
                call = self._mail.get(block=wait)
                wait = False
                try:
                    call()
                except Exception:
                    log.exception("a call to the engines failed")
        except Empty:
            return

    def _halt(self) -> None:
        self._going = False
        for name in self._jobs:
            self._end_all(name, Refused(503, "The server stops.", None, "stopping", 5))

    def _submit(self, job: Job) -> None:
        if job.over:  # cancelled before it came here
            return
        engine = self._engines.get(job.engine)
        try:
            if engine is None:
                raise Refused(503, "That version just left memory: ask again.", retry_after_s=1)
            job.number = engine.submit(job.request)
        except BemError as error:
            _tell(job, [error])
            return
        except Exception as error:
            log.exception("a request could not be submitted")
            _tell(job, [error])
            return
        self._jobs[job.engine][job.number] = job

    def _cancel(self, job: Job) -> None:
        job.over = True
        if self._jobs.get(job.engine, {}).pop(job.number, None) is not None:
            self._engines[job.engine].cancel(job.number)

    def _hand_out(self, name: str, stats: StepStats) -> None:
        jobs = self._jobs[name]
        said: dict[asyncio.AbstractEventLoop, list[tuple[Job, Event]]] = {}
        for sequence in self._engines[name].running:
            job = jobs.get(sequence.id)
            if job is not None and job.streams and (news := self._news(name, job, sequence)):
                said.setdefault(job.loop, []).append((job, news))
        for result in stats.finished:
            if (job := jobs.pop(result.id, None)) is not None:
                said.setdefault(job.loop, []).append((job, result))
        for loop, events in said.items():  # one wake-up a step, however many listen
            _wake(loop, events)

    def _news(self, name: str, job: Job, sequence: Sequence) -> Progress | None:
        answer, acts, spans = sequence.answer, sequence.acts, sequence.spans
        if len(answer) <= job.seen or acts is None or spans is None:
            return None
        new = slice(job.seen, len(answer))
        job.seen = len(answer)
        begun = sum(start < sequence.read for start in spans.starts[job.chunks :])
        actions: tuple[ChunkAction, ...] = ()
        if begun:  # once a chunk: it reads from the device
            actions = self._engines[name].actions(sequence)[job.chunks :]
            job.chunks += begun
        ids, logprobs = tuple(answer[new]), tuple(sequence.logprobs[new])
        return Progress(acts.version.digest, sequence.cached, ids, logprobs, actions)

    def _failed(self, name: str, error: Exception) -> None:
        """A step that fails leaves nothing that could go on: all its requests end."""
        log.error("engine %s failed, its requests end", name, exc_info=error)
        engine = self._engines[name]
        numbers = [*(s.id for s in engine.waiting), *(s.id for s in engine.running)]
        self._end_all(name, error)
        try:
            for number in numbers:
                engine.cancel(number)
        except Exception:
            log.exception("engine %s does not recover: it is given up", name)
            del self._engines[name], self._jobs[name]
            self.lost.add(name)

    def _end_all(self, name: str, error: Exception) -> None:
        jobs, self._jobs[name] = self._jobs[name], {}
        for job in jobs.values():
            _tell(job, [error])


def _tell(job: Job, events: list[Event]) -> None:
    _wake(job.loop, [(job, event) for event in events])


def _wake(loop: asyncio.AbstractEventLoop, events: list[tuple[Job, Event]]) -> None:
    def deliver() -> None:
        for job, event in events:
            job.over = job.over or not isinstance(event, Progress)
            job.hear(event)

    try:
        loop.call_soon_threadsafe(deliver)
    except RuntimeError:  # the loop is closed: nobody listens
        log.debug("%d events for a loop that is closed", len(events))
