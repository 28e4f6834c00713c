"""The engine: many requests at once, each adapted and routed by itself, no finished chunk computed twice.

    engine = bem.Engine(adapted, tokenizer)
    results = engine.generate(["one prompt", "another"], max_new_tokens=64)

or step by step: `submit` puts a request into the queue, every `step` admits what fits, reads a piece of the
prompts, decodes one token for all that run, and hands out what was finished. One thread drives it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Row
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bem.bases.limits import text_config
from bem.control.keys import ChunkKey
from bem.engine.acts import Acts, parts_of
from bem.engine.answers import Reader, ends_of
from bem.engine.chain import Chains
from bem.engine.fit import apart, check_probe, length_of, mask_dtype
from bem.engine.intake import Intake, told_of
from bem.engine.request import ChunkAction, FinishReason, Request, Result
from bem.engine.runner import Piece, Runner
from bem.engine.sampler import choose
from bem.engine.scheduler import Waiting, batches, prefill_pieces
from bem.engine.sequence import Sequence, Spans
from bem.engine.slab import Slab, SlotLayer
from bem.engine.store import ChunkStore
from bem.engine.versions import Versions
from bem.errors import EngineError

GIB = 1 << 30
NO_TOKEN = "no token of the vocabulary would fit."


@dataclass(frozen=True)
class StepStats:
    """What one step did."""

    step: int
    seconds: float
    admitted: int
    """Requests that left the queue."""
    prefilled: int
    """Tokens of prompts that were computed."""
    reused: int
    """Tokens of prompts that came from the store."""
    decoded: int
    """Tokens generated, the first ones of answers included."""
    passes: int
    """Forward passes."""
    running: int
    waiting: int
    finished: tuple[Result, ...]


class Engine:
    """Generates for many requests at once with one adapted model; see the module's docstring."""

    def __init__(
        self,
        adapted: Any,
        tokenizer: Any,
        slots: int = 8,
        cache_gib: float = 1.0,
        *,
        max_tokens: int | None = None,
        prefill_tokens: int = 512,
        queue: int = 1024,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
        store: ChunkStore | None = None,
    ):
        """
        Args:
            adapted: what `bem.attach`, `load`, `mount` or `load_router` gave; or a base with nothing on it.
            slots: sequences that run at once.
            cache_gib: of the chunk store, beside what runs; 0: nothing is stored.
            max_tokens: of the longest sequence, prompt and answer; None: as the model allows.
            prefill_tokens: prompt tokens that are read in one step: more, and answers that run wait longer.
            queue: requests that may wait.
            seed: of the random numbers of requests that bring no seed.
            clock: seconds that only grow; deadlines and times are by it.
            store: shared with other engines of this base on the same thread; None: one of its own.
        Raises:
            EngineError: the model cannot be run with rows at different places, or a number makes no sense.
        """
        for name, value in (("slots", slots), ("prefill_tokens", prefill_tokens), ("queue", queue)):
            if value < 1:
                raise EngineError(f"{name} must be at least 1, got {value}.")
        self.adapted, self.tokenizer, self.slots = adapted, tokenizer, slots
        self._model, self._base = parts_of(adapted)
        self.prefill_tokens, self.clock = prefill_tokens, clock
        self.max_tokens = length_of(self._base, max_tokens)
        self.store = ChunkStore(int(cache_gib * GIB)) if store is None else store
        self.waiting = Waiting(queue)
        self._rows: list[Sequence | None] = [None] * slots
        self._arrived: list[Sequence] = []  # those that run, in the order of admission
        self._reader = Reader(tokenizer, ends_of(self._base, tokenizer))
        self._generator = torch.Generator().manual_seed(seed)
        self._undelivered: list[Result] = []
        self._ids = self._steps = 0
        self._versions = Versions(adapted)
        self._intake = Intake(self._base, self._reader, self._versions, self.max_tokens, queue)
        self._set_up()

    def _set_up(self) -> None:
        acts, base = self._versions.current, self._base
        blocks = text_config(base).num_hidden_layers
        mask, pad = mask_dtype(base), self._reader.pad_id

        def runner(slots: int) -> Runner:
            control = None if acts.wiring is None else SlotLayer(acts.wiring, slots, base.device)
            return Runner(self._model, Slab(blocks, slots), control, pad, mask)

        probe = runner(2)
        with torch.inference_mode():
            check_probe(base, self._alone, lambda *rows: apart(probe, acts, *rows))
        self._runner = runner(self.slots)
        self._runner.slab.begin_like(probe.slab)
        root = ChunkKey.root(acts.version.base, base.dtype, acts.chunk_size, self._reader.name)
        self._chains = Chains(self.store, self._runner.slab, self._runner.control, root)

    def _alone(self, ids: list[int]) -> Tensor:
        """Logits of a plain forward pass, for `check_probe`."""
        tokens = torch.tensor([ids], device=self._base.device)
        told = {}
        if self._versions.current.wiring is not None:
            told["turn_starts"] = torch.zeros_like(tokens, dtype=torch.bool)
            told["turn_starts"][0, -2] = True
        return self._model(input_ids=tokens, **told).logits[0, -1].float()

    # --- requests ---------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Put a request into the queue; returns its number, under which its results come: `request.n` of them.

        Raises:
            QueueFull: as many as allowed wait already.
            EngineError: it can never be served: too long, a token without embedding, an unknown expert or
                version, a grammar that cannot be used.
            MissingExtra: it has a grammar, and llguidance is not installed.
        """
        self.waiting.add(*self._intake.sequences(request, self._ids, self.clock()))
        self._ids += 1
        return self._ids - 1

    def keep(self, name: str, shadow: Any) -> str:
        """Have a release of a routed model ready for requests that name it as their `version`, beside what is in use;
        returns its digest.

        Args:
            shadow: of the model (`Mounted.shadow`); what is trained in it later does not reach the engine.
        Raises:
            EngineError: no routed model, whose releases alone can stand side by side.
            AttachError: it is no shadow of the model, or its weights are not finite.
        """
        return self._versions.keep(name, shadow)

    def drop(self, name: str) -> None:
        """Keep a version no longer; requests that were submitted under it go on.

        Raises:
            EngineError: there is none of that name.
        """
        self._versions.drop(name)

    @property
    def versions(self) -> dict[str, str]:
        """Name -> digest of what is kept; "" is what is in use."""
        kept = {name: acts.version.digest for name, acts in self._versions.kept.items()}
        return {"": self._versions.in_use().version.digest, **kept}

    def cancel(self, id: int) -> bool:
        """End a request; its results, as far as they came, are handed out by the next step. False: it is over."""
        found = [s for s in (*self.waiting, *self._arrived) if s.id == id]
        for sequence in found:
            self._end(sequence, "cancelled")
        return bool(found)

    def generate(
        self,
        prompts: Row[str | Row[int] | Request],
        max_new_tokens: int = 64,
        ignore_eos: bool = False,
        **fields: Any,
    ) -> list[Result]:
        """Answers to all prompts, in their order; of a request with `n` > 1 all of them, one after another.

        Args:
            prompts: texts, token ids, or whole requests, which are taken as they are.
            fields: of `Request`, for all that are not whole requests.
        """
        wanted = [
            p if isinstance(p, Request)
            else Request(p, max_new_tokens=max_new_tokens, ignore_eos=ignore_eos, **fields)
            for p in prompts
        ]  # fmt: skip
        ours: set[int] = set()
        results: dict[tuple[int, int], Result] = {}
        others, left = [], sum(request.n for request in wanted)
        try:
            while left > len(results):
                while len(ours) < len(wanted) and self.waiting.has_room(wanted[len(ours)].n):
                    ours.add(self.submit(wanted[len(ours)]))
                for result in self.step().finished:
                    if result.id in ours:
                        results[result.id, result.index] = result
                    else:
                        others.append(result)
        except (
            BaseException
        ):  # a request that cannot be served, or Ctrl-C: nobody is left to take the answers
            for number in ours:
                self.cancel(number)
            self._undelivered = [r for r in self._undelivered if r.id not in ours]
            raise
        finally:
            self._undelivered += others
        return [results[key] for key in sorted(results)]

    @property
    def busy(self) -> bool:
        """Does anything wait, run, or wait to be handed out?"""
        return bool(len(self.waiting) or self._arrived or self._undelivered)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Those that were admitted and are not over, in the order of admission; to be read only."""
        return tuple(self._arrived)

    # --- a step -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> StepStats:
        """Admit, read a piece of the prompts, decode a token for all, hand out.

        Raises:
            EngineError: the model was changed in a way that sequences which run cannot follow.
        """
        began, passes, reused = self.clock(), self._runner.passes, self.store.stats.reused
        if self._base.training:
            raise EngineError("the model is in training mode: call model.eval() before a step.")
        for sequence in [*self.waiting, *self._arrived]:
            if sequence.deadline is not None and began >= sequence.deadline:
                self._end(sequence, "deadline")
        admitted = self._admit()
        prefilled, first = self._prefill()
        decoded = self._decode()
        if not len(self.waiting):
            self._close_ranks()
        finished, self._undelivered = tuple(self._undelivered), []
        self._steps += 1
        return StepStats(
            self._steps,
            self.clock() - began,
            admitted,
            prefilled,
            self.store.stats.reused - reused,
            first + decoded,
            self._runner.passes - passes,
            len(self._arrived),
            len(self.waiting),
            finished,
        )

    def _admit(self) -> int:
        """Give free slots to those who wait."""
        if not len(self.waiting) or None not in self._rows:
            return 0
        acts, admitted = self._versions.renew(len(self._arrived)), 0
        for sequence in [s for s in self.waiting if self._versions.is_gone(s.acts)]:
            sequence.error = "the version that it names was changed in place while it waited."
            self._end(sequence, "error")
        for slot in [s for s, row in enumerate(self._rows) if row is None]:
            sequence = self.waiting.take()
            if sequence is None:
                break
            self._begin(sequence, slot, sequence.acts or acts)
            admitted += 1
        return admitted

    def _begin(self, sequence: Sequence, slot: int, acts: Acts) -> None:
        request = sequence.request
        acts = acts.at_strength(request.strength)
        sequence.acts, sequence.slot = acts, slot
        sequence.route = acts.option(request.route)
        sequence.spans = Spans(sequence.prompt, request.turn_starts, acts.chunk_size)
        if request.sampling.temperature:
            seed = request.sampling.seed
            if seed is None:
                seed = int(torch.randint(1 << 62, (), generator=self._generator))
            sequence.generator = torch.Generator().manual_seed(seed + sequence.sample)
        if (control := self._runner.control) is not None:
            sequence.control = control.state.begin()
            control.look_again()
            for name, told in told_of(request, acts).items():
                control.state.conditioning[name][sequence.control] = told
        self._rows[slot] = sequence
        self._arrived.append(sequence)

    def _prefill(self) -> tuple[int, int]:
        """Read a piece of the prompts; returns (tokens read, first tokens of answers)."""
        budget, first = self.prefill_tokens, 0
        while budget > 0:
            ready = self._chains.ready([s for s in self._arrived if s.prefilling])
            pieces = prefill_pieces(ready, budget)
            if not pieces:
                break
            for batch in batches(pieces):
                first += self._read(batch)
            budget -= sum(piece.tokens for piece in pieces)
        return self.prefill_tokens - budget, first

    def _read(self, pieces: list[Piece]) -> int:
        """One pass; returns how many tokens were generated."""
        logits = self._runner.run(pieces)
        done = [i for i, piece in enumerate(pieces) if not piece.sequence.prefilling]
        for piece in pieces:
            if piece.start <= piece.sequence.prompt:  # later chunks are stored when the answer ends
                self._chains.store_finished(piece.sequence)
        if not done:
            return 0
        for i in [i for i in done if not pieces[i].sequence.request.max_new_tokens]:
            done.remove(i)
            self._end(pieces[i].sequence, "length")
        ready = [pieces[i].sequence for i in done]
        rows = logits if len(done) == len(pieces) else logits[done]
        for sequence, token in zip(ready, choose(rows, ready), strict=True):
            self._take(sequence, token)
        return len(done)

    def _take(self, sequence: Sequence, token: int | None) -> None:
        """One more token of an answer; None: none can follow."""
        matcher = sequence.matcher
        if matcher is not None and token is not None and token not in self._reader.ends:
            matcher.accept(token)
        if token is None or (matcher is not None and matcher.error):
            assert matcher is not None
            sequence.error = f"the grammar lets nothing follow: {matcher.error or NO_TOKEN}"
            self._end(sequence, "error")
            return
        sequence.ids.append(token)
        assert sequence.spans is not None
        sequence.spans.grow(len(sequence.ids))
        if sequence.first_token is None:
            sequence.first_token = self.clock()
        if (reason := self._reader.why_over(sequence)) is not None:
            self._end(sequence, reason)

    def _decode(self) -> int:
        """One token for all whose prompt was read."""
        running = [s for s in self._arrived if not s.prefilling]
        return self._read([Piece(s, 1) for s in running]) if running else 0

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        """Give back all that a sequence holds; its result waits to be handed out."""
        sequence.finished = reason
        actions = ()
        if sequence.slot < 0:
            self.waiting.remove(sequence)
        else:
            self._chains.store_finished(sequence)
            self._chains.let_go(sequence)
            actions = self.actions(sequence)
            if (control := self._runner.control) is not None:
                control.state.free(sequence.control)
            self._rows[sequence.slot] = None
            self._arrived.remove(sequence)
        result = self._reader.result(sequence, reason, self.clock(), actions)
        self._undelivered.append(result)

    def actions(self, sequence: Sequence) -> tuple[ChunkAction, ...]:
        """What a router did so far, chunk by chunk."""
        control, acts, spans = self._runner.control, sequence.acts, sequence.spans
        if control is None or acts is None or spans is None or not sequence.read:
            return ()
        tails = control.state.history([sequence.control])[0, 1:, control.layout.applied :]
        return acts.actions(tails, spans.starts[: len(tails)])

    def _close_ranks(self) -> None:
        """Move sequences into free slots below them: rows side by side are read without a copy."""
        while None in self._rows:
            hole = self._rows.index(None)
            last = max((s for s, row in enumerate(self._rows) if row is not None), default=-1)
            if last < hole:
                return
            sequence = self._rows[last]
            assert sequence is not None
            self._runner.slab.move(last, hole, sequence.read)
            self._rows[hole], self._rows[last] = sequence, None
            sequence.slot = hole
