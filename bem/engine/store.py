"""The chunk store: finished chunks of sequences, to be read again by others (`ChunkSafeKVCache` in the source).

A block is named by what was applied in it (`bem.control.keys`): its tokens, all chunks before it, the control
and the weights that acted. So nothing is ever invalidated by hand: what a new version changes gets another
name, what it does not change is found again, and going back finds everything. Beside the blocks stands, for
every decision that led to one, what the next decision needs to know: a chain is walked without any
forward pass.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from bem.control.controller import Running
from bem.errors import EngineError

Reason = Literal["new", "changed", "evicted", "no room", "collision", "open", "scored"]
"""Why tokens of a prompt had to be computed: never seen; seen under another control, version or evidence;
thrown out; never kept for lack of room; stored under this name with other tokens; in no finished chunk; their
log-probabilities are wanted."""
REMEMBERED = 1 << 16
"""Names kept of chunks that are no longer, or never were, in the store: to say why one is missing."""


@dataclass(eq=False)
class Block:
    """One finished chunk."""

    name: str
    parent: str
    """Name of the chunk before; of the root, for the first."""
    token_ids: tuple[int, ...]
    held: list[tuple[Tensor, Tensor]]
    """Keys and values of each block of the model."""
    applied: Tensor | None
    """Control (1, applied width); None: static."""
    version: str
    """Digest of the version that computed it: on its quota."""
    weights: frozenset[str]
    """Digests of the weights that acted in it."""
    nbytes: int
    users: int = 0
    """Sequences that run on it."""
    pinned: bool = False
    children: set[str] = field(default_factory=set)
    decisions: set[str] = field(default_factory=set)
    reused: int = 0
    """How often it was found."""


@dataclass(eq=False)
class Decided:
    """What one way of deciding led to: the state behind the chunk, and its block under each version."""

    running: Running | None
    """None: static."""
    blocks: dict[str, str] = field(default_factory=dict)
    """Version -> name of the block."""


@dataclass
class StoreStats:
    """In tokens, but for the last two."""

    needed: int = 0
    """Of all prompts that were looked up."""
    reusable: int = 0
    """Of these in chunks whose text was computed before: what a cache that looks at tokens alone could give."""
    reused: int = 0
    missed: dict[Reason, int] = field(default_factory=dict)
    stored: int = 0
    evicted: int = 0
    evicted_before_reuse: int = 0
    """Many of them: the budget is below what is in use."""
    nbytes: int = 0
    blocks: int = 0

    def miss(self, reason: Reason, tokens: int) -> None:
        """Count what had to be computed."""
        self.missed[reason] = self.missed.get(reason, 0) + tokens


class ChunkStore:
    """Blocks within a budget of bytes; the least recently used leaf is thrown out first."""

    def __init__(self, budget: int, quotas: dict[str, float] | None = None):
        """
        Args:
            budget: bytes; 0: nothing is stored.
            quotas: version digest -> share of the budget that its blocks may take; others may take all.
        Raises:
            EngineError: a negative budget, or a share outside (0, 1].
        """
        if budget < 0:
            raise EngineError(f"the store's budget must be at least 0 bytes, got {budget}.")
        self.budget, self.quotas = budget, {}
        for version, share in (quotas or {}).items():
            self.set_quota(version, share)
        self.blocks: OrderedDict[str, Block] = OrderedDict()  # least recently used first
        self.decisions: dict[str, Decided] = {}
        self.stats = StoreStats()
        self._of_version: dict[str, int] = {}
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._gone: OrderedDict[str, Reason] = OrderedDict()

    def set_quota(self, version: str, share: float) -> None:
        """The blocks that this version computes may take so much of the budget: a canary's cannot push out
        the stable version's."""
        if not 0 < share <= 1:
            raise EngineError(f"a quota must be in (0, 1], got {share} for version {version[:12]}.")
        self.quotas[version] = share

    # --- looking ----------------------------------------------------------------------------------

    def get(self, name: str, token_ids: tuple[int, ...]) -> Block | None:
        """The block of that name, if it holds these very tokens."""
        block = self.blocks.get(name)
        return block if block is not None and block.token_ids == token_ids else None

    def has(self, block: Block) -> bool:
        """Is it this very block that stands under its name? It may have been purged, and computed again since."""
        return self.blocks.get(block.name) is block

    def seen(self, text: str) -> bool:
        """Was a chunk behind this very text computed, whatever acted?"""
        return text in self._seen

    def why_missing(self, name: str | None, decision: str, text: str) -> Reason:
        """Why there is no such block behind a decision; name: None: the decision is not known."""
        if name is not None and name in self.blocks:
            return "collision"
        if text not in self._seen:
            return "new"
        return self._gone.get(decision if name is None else name, "changed")

    # --- storing ----------------------------------------------------------------------------------

    def put(self, block: Block) -> bool:
        """Take a block in, behind its parent; False: there is no room for it, and none can be made."""
        if not self._make_room(block):
            return False
        self.blocks[block.name] = block
        if (parent := self.blocks.get(block.parent)) is not None:
            parent.children.add(block.name)
        self._count(block, 1)
        self.stats.stored += len(block.token_ids)
        return True

    def refused(self, decision: str, reason: Reason) -> None:
        """Why what this decision led to is not kept."""
        _remember(self._gone, decision, reason)

    def decided(self, decision: str, version: str, name: str, running: Running | None) -> None:
        """A decision led to a block, and goes on from this state."""
        found = self.decisions.get(decision)
        if found is None:
            found = self.decisions[decision] = Decided(running)
        found.blocks[version] = name
        if (block := self.blocks.get(name)) is not None:
            block.decisions.add(decision)

    def read(self, text: str) -> None:
        """A chunk behind this text was computed."""
        _remember(self._seen, text, None)

    def hold(self, blocks: Sequence[Block]) -> None:
        """A sequence runs on these blocks: they stay."""
        for block in blocks:
            block.users += 1

    def let_go(self, blocks: Sequence[Block]) -> None:
        """It does no more. They were used now, parents after their children, so that parents outlive them."""
        for block in reversed(blocks):
            block.users -= 1
            if self.has(block):
                self.blocks.move_to_end(block.name)

    def pin(self, names: Sequence[str], pinned: bool = True) -> None:
        """These blocks stay until they are unpinned, whoever runs."""
        for name in names:
            if name not in self.blocks:
                raise EngineError(f"no block {name[:12]} in the store: it cannot be pinned.")
            self.blocks[name].pinned = pinned

    # --- throwing out -----------------------------------------------------------------------------

    def purge(self, digest: str) -> int:
        """Throw out whatever was computed under a version, or under an expert's weights, and all behind it.

        Nothing wrong is found without it: it gives room back early. Running sequences go on.

        Returns:
            bytes given back.
        """
        before = self.stats.nbytes
        named = [n for n, b in self.blocks.items() if digest == b.version or digest in b.weights]
        for name in named:
            self._drop_tree(name)
        return before - self.stats.nbytes

    def clear(self) -> None:
        """Throw out everything."""
        for name in list(self.blocks):
            self._drop_tree(name)

    def _drop_tree(self, name: str) -> None:
        behind = [name]
        while behind:
            block = self.blocks.get(behind.pop())
            if block is not None:
                behind += block.children
                self._drop(block)

    def _make_room(self, block: Block) -> bool:
        share = self.quotas.get(block.version)
        quota = self.budget if share is None else int(self.budget * share)
        if block.nbytes > quota:
            return False
        while self._of_version.get(block.version, 0) + block.nbytes > quota:
            if not self._evict(block.parent, block.version):
                return False
        while self.stats.nbytes + block.nbytes > self.budget:
            if not self._evict(block.parent):
                return False
        return True

    def _evict(self, parent: str, version: str | None = None) -> bool:
        """Throw out the least recently used leaf (of one version) that nobody needs, but not `parent`."""
        for name, block in self.blocks.items():
            free = not (block.users or block.pinned or block.children) and name != parent
            if free and version in (None, block.version):
                self.stats.evicted += len(block.token_ids)
                if not block.reused:
                    self.stats.evicted_before_reuse += len(block.token_ids)
                self._drop(block)
                return True
        return False

    def _drop(self, block: Block) -> None:
        del self.blocks[block.name]
        _remember(self._gone, block.name, "evicted")
        if (parent := self.blocks.get(block.parent)) is not None:
            parent.children.discard(block.name)
        for decision in block.decisions:
            found = self.decisions.get(decision)
            if found is not None:
                found.blocks = {v: n for v, n in found.blocks.items() if n in self.blocks}
                if not found.blocks:
                    del self.decisions[decision]
                    _remember(self._gone, decision, "evicted")
        self._count(block, -1)

    def _count(self, block: Block, sign: int) -> None:
        self.stats.nbytes += sign * block.nbytes
        self.stats.blocks += sign
        of = self._of_version
        of[block.version] = of.get(block.version, 0) + sign * block.nbytes
        if not of[block.version]:
            del of[block.version]


def _remember(names: OrderedDict, name: str, value: object) -> None:
    names[name] = value
    names.move_to_end(name)
    if len(names) > REMEMBERED:
        names.popitem(last=False)
