"""Between a sequence and the chunk store: what of a prompt is there already, and what was finished since.

Three names go along a sequence, one step for each chunk:

    text      its tokens alone
    decision  its tokens, and all on which the decisions about them depend beside the weights of experts
    block     its tokens, and what was applied to them (`ChunkKey`)

A decision that was made before leads to the block without any forward pass, under a version that it was
never made for too: it is then composed again from the weights of that version.
"""

from __future__ import annotations

from collections.abc import Sequence as Row
from dataclasses import dataclass, replace
from hashlib import sha256

import torch
from torch import Tensor

from bem.control.controller import Running
from bem.control.keys import ChunkKey
from bem.control.resume import after_chunk, restore
from bem.engine.acts import Acts
from bem.engine.sequence import Sequence
from bem.engine.slab import Slab, SlotLayer
from bem.engine.store import Block, ChunkStore, Reason


@dataclass(frozen=True)
class _Found:
    block: Block
    running: Running | None


class Chains:
    """Reads prompts out of the store, and puts finished chunks into it."""

    def __init__(self, store: ChunkStore, slab: Slab, control: SlotLayer | None, root: ChunkKey):
        """root: without a tenant's salt."""
        self.store, self.slab, self.control, self.root = store, slab, control, root

    # --- reading ----------------------------------------------------------------------------------

    def ready(self, sequences: Row[Sequence]) -> list[Sequence]:
        """Those of the sequences that read their prompts, in order of arrival, which can do so now.

        Who needs a chunk that another one is about to compute waits for it, and so does who gets a prompt's
        scores from another. The others get what the store has of their prompts.
        """
        ready: list[Sequence] = []
        coming: set[tuple[str, str]] = set()
        for sequence in sequences:
            if sequence.waits or (not sequence.looked_up and not self._begin(sequence, coming)):
                continue
            ready.append(sequence)
            if sequence.storing:
                coming |= {_awaited(sequence, c) for c in _missing(sequence)}
        return ready

    def _begin(self, sequence: Sequence, coming: set[tuple[str, str]]) -> bool:
        """Put what is known of a prompt in place; False: more of it is coming.

        The last prompt token is always left to be computed: its logits choose the first token.
        """
        spans = sequence.spans
        assert spans is not None
        finished = spans.finished(sequence.prompt - 1) if self.store.budget else 0
        self._name(sequence, finished)
        found, reason = self._walk(sequence)
        if (
            reason != "scored"
            and len(found) < finished
            and _awaited(sequence, len(found)) in coming
        ):
            return False
        for chunk, each in enumerate(found):
            self.slab.put(sequence.slot, *spans.span(chunk), each.block.held)
            each.block.reused += 1
        sequence.looked_up = True
        sequence.blocks = [each.block for each in found]
        self.store.hold(sequence.blocks)
        sequence.read = sequence.cached = spans.span(len(found) - 1)[1] if found else 0
        if found and self.control is not None:
            running = [each.running for each in found if each.running is not None]
            restore(self.control.state, sequence.control, running)
            self.control.look_again()
        self._count(sequence, reason)
        return True

    def _walk(self, sequence: Sequence) -> tuple[list[_Found], Reason]:
        """The longest chain that the store holds of a prompt, and why it is no longer."""
        found: list[_Found] = []
        parent = self._root(sequence)
        for chunk in range(len(sequence.chain)):
            if _is_scored(sequence, chunk):
                return found, "scored"
            each = self._step(sequence, chunk, parent)
            if not isinstance(each, _Found):
                return found, each
            found.append(each)
            parent = each.block.name
        return found, "open"

    def _count(self, sequence: Sequence, reason: Reason) -> None:
        """What was needed, what was found, and why not more."""
        stats, spans = self.store.stats, sequence.spans
        assert spans is not None
        stats.needed += sequence.prompt
        stats.reused += sequence.read
        behind = 0
        for chunk, (text, _) in enumerate(sequence.chain):
            start, behind = spans.span(chunk)
            seen = self.store.seen(text)
            stats.reusable += seen * (behind - start)
            if chunk >= len(sequence.blocks):
                stats.miss(reason if seen else "new", behind - start)
        stats.miss("open", sequence.prompt - behind)

    def _step(self, sequence: Sequence, chunk: int, parent: str) -> _Found | Reason:
        """One chunk further, or why not."""
        acts, store, ids = sequence.acts, self.store, self._ids(sequence, chunk)
        assert acts is not None
        text, decision = sequence.chain[chunk]
        decided, version = store.decisions.get(decision), acts.version.digest
        if decided is None:
            return store.why_missing(None, decision, text)
        name = decided.blocks.get(version)
        if name is None:
            name = self._name_anew(acts, parent, decided.running, ids)
        block = None if name is None else store.get(name, ids)
        if name is None or block is None:
            return store.why_missing(name, decision, text)
        store.decided(decision, version, name, decided.running)
        running = decided.running
        if running is not None and block.applied is not None:
            tail = running.control[:, block.applied.shape[1] :]
            running = replace(running, control=torch.cat([block.applied, tail], 1))
        return _Found(block, running)

    def _name_anew(
        self, acts: Acts, parent: str, running: Running | None, ids: tuple[int, ...]
    ) -> str | None:
        """The block that a decision leads to under a version that it was not made under."""
        if running is None or self.control is None:
            return None
        applied = acts.compose_again(running.control[:, self.control.layout.applied :])
        if applied is None:
            return None
        weights, _ = acts.weights(applied[0])
        return ChunkKey(parent).extend(ids, applied[0], weights).digest

    # --- storing ----------------------------------------------------------------------------------

    def store_finished(self, sequence: Sequence) -> None:
        """Store the chunks that can grow no more and are not there yet."""
        spans, store = sequence.spans, self.store
        assert spans is not None
        if not store.budget:
            return
        spans.grow(sequence.read)
        finished = spans.finished(sequence.read)
        if finished <= len(sequence.blocks) or not sequence.storing:
            return
        self._name(sequence, finished)
        for chunk in range(len(sequence.blocks), finished):
            text, decision = sequence.chain[chunk]
            store.read(text)
            purged = chunk > 0 and not store.has(sequence.blocks[-1])  # what stands behind goes too
            block = None if purged else self._store(sequence, chunk)
            if block is None:
                store.refused(decision, "evicted" if purged else "no room")
                sequence.storing = False
                return
            sequence.blocks.append(block)

    def _store(self, sequence: Sequence, chunk: int) -> Block | None:
        """A chunk that now stands in the store; None: it found no room."""
        acts, store, ids = sequence.acts, self.store, self._ids(sequence, chunk)
        assert acts is not None and sequence.spans is not None
        parent = sequence.blocks[-1].name if chunk else self._root(sequence)
        span = sequence.spans.span(chunk)
        running = self._running(sequence, chunk, span)
        applied = None
        if running is not None and self.control is not None:
            applied = running.control[:, : self.control.layout.applied].clone()
        shown = torch.zeros(0) if applied is None else applied[0]
        weights, digests = acts.weights(shown)
        name = ChunkKey(parent).extend(ids, shown, weights).digest
        block = store.get(name, ids)
        if block is None:
            if name in store.blocks:  # other tokens under this name: never mix them
                return None
            held = self.slab.take(sequence.slot, *span)
            nbytes = sum(k.nbytes + v.nbytes for k, v in held) + _bytes_of(running, applied)
            version, used = acts.version.digest, frozenset(digests)
            block = Block(name, parent, ids, held, applied, version, used, nbytes)
            if not store.put(block):
                return None
        store.hold([block])
        store.decided(sequence.chain[chunk][1], acts.version.digest, name, running)
        return block

    def _running(self, sequence: Sequence, chunk: int, span: tuple[int, int]) -> Running | None:
        if self.control is None:
            return None
        return after_chunk(self.control.state, sequence.control, chunk + 1, *span)

    def let_go(self, sequence: Sequence) -> None:
        """The sequence is over."""
        self.store.let_go(sequence.blocks)

    # --- names ------------------------------------------------------------------------------------

    def _root(self, sequence: Sequence) -> str:
        request = sequence.request
        root = self.root.salted(request.tenant)
        if request.kappa is not None:  # a clamp that was raised acted on every chunk
            root = root.extend([], torch.tensor([request.kappa]), "kappa")
        return root.digest

    def _name(self, sequence: Sequence, chunks: int) -> None:
        """Name texts and decisions of the first chunks."""
        acts, spans, chain = sequence.acts, sequence.spans, sequence.chain
        assert acts is not None and spans is not None
        if not chain:
            root = self._root(sequence)
            told = [getattr(sequence.request, name) or () for name in acts.reads]
            told = [[float(x) for x in values] if any(values) else [] for values in told]
            decided = f"{root} {acts.controller} {told} {sequence.route}"
            before = _hash(root), _hash(decided)
        else:
            before = chain[-1]
        for chunk in range(len(chain), chunks):
            start, ids = spans.starts[chunk], self._ids(sequence, chunk)
            # a route holds behind the prompt; a router decides alike wherever the prompt ends
            routed = sequence.route is not None and start < sequence.prompt
            how = f"{start in spans.turns} {routed} {ids}"
            before = _hash(f"{before[0]} {ids}"), _hash(f"{before[1]} {how}")
            chain.append(before)

    def _ids(self, sequence: Sequence, chunk: int) -> tuple[int, ...]:
        assert sequence.spans is not None
        start, stop = sequence.spans.span(chunk)
        return tuple(sequence.ids[start:stop])


def _missing(sequence: Sequence) -> range:
    """Chunks of its prompt that are not in the store yet."""
    return range(len(sequence.blocks), len(sequence.chain))


def _is_scored(sequence: Sequence, chunk: int) -> bool:
    """Are logits of its tokens wanted?"""
    assert sequence.spans is not None
    first = sequence.request.prompt_logprobs_from - 1  # predicts the first token that is scored
    return sequence.scores and sequence.spans.span(chunk)[1] > first


def _awaited(sequence: Sequence, chunk: int) -> tuple[str, str]:
    """Under which version a chunk is decided how."""
    assert sequence.acts is not None
    return sequence.acts.version.digest, sequence.chain[chunk][1]


def _bytes_of(running: Running | None, applied: Tensor | None) -> int:
    if running is None or applied is None:
        return 0
    return applied.nbytes + sum(t.nbytes for t in vars(running).values())


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()
