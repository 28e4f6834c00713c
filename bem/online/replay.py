"""What the learner practises on: a fair sample of all that was, in which no source has much to say.

    replay = Replay(capacity=10_000, seed=0)
    replay.trust(Item("q1", "curated", {...}))          # a stratum that never leaves
    replay.offer(Item("e17", "user-4", {...}))
    batch = replay.draw(32)

Algorithm R (Vitter 1985): item t replaces a random one of k with chance k/t, so that every item of the
stream is in the reservoir with the same chance. A source that fills its share (5 % of the capacity)
goes on inside it: its new items replace its own, by the same algorithm. Content that was seen before
is refused by its hash. A batch takes 5 % of its items from any one source in expectation at most,
however few sources there are: what is missing comes from the trusted stratum.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from bem.errors import DataError
from bem.files import sha256_json

Offered = Literal["added", "replaced", "passed", "duplicate"]
"""passed: counted, and by its own lot not kept."""


@dataclass(frozen=True)
class Item:
    """One training event."""

    id: str
    source: str
    """Who is answerable for it: a user, a key, a check."""
    content: Any
    """JSON values; two items of equal content are duplicates, whoever sent them."""


class Replay:
    """Reservoir and trusted stratum. Randomness is its own generator, part of the state."""

    def __init__(
        self,
        capacity: int = 10_000,
        seed: int = 0,
        max_share: float = 0.05,
        remembered: int = 100_000,
    ):
        """
        Args:
            capacity: items of the reservoir; the trusted stratum comes on top.
            max_share: of the capacity, and of a batch, that one source may hold.
            remembered: hashes of the newest contents that are known as duplicates though their items
                left again; those of what is held are always known.
        Raises:
            ValueError: an argument out of its range.
        """
        if not 0 < max_share <= 1 or int(capacity * max_share) < 1:
            raise ValueError(
                f"a source must be allowed one item at least: capacity {capacity}, max_share {max_share}."
            )
        if remembered < 0:
            raise ValueError(f"remembered must not be negative, got {remembered}.")
        self.capacity, self.max_share, self.remembered = capacity, max_share, remembered
        self.offered = 0
        """Items counted by algorithm R: all but duplicates and those of sources with a full share."""
        self.items: list[Item] = []
        self.trusted: list[Item] = []
        self._rng = np.random.Generator(np.random.PCG64(seed))
        self._held: Counter[str] = Counter()
        self._sent: Counter[str] = Counter()
        """Items that each source has offered, without duplicates."""
        self._hashes: set[str] = set()
        self._old: OrderedDict[str, None] = OrderedDict()

    @property
    def cap(self) -> int:
        """Items that one source may hold."""
        return int(self.capacity * self.max_share)

    # --- filling --------------------------------------------------------------------------------

    def trust(self, item: Item) -> bool:
        """Into the trusted stratum, for good, and out of the reservoir; False: it is trusted already."""
        digest = _digest(item)
        if digest in self._hashes:
            same = [held for held in self.items if _digest(held) == digest]
            if not same:
                return False
            self._drop(same[0])
            self.items.remove(same[0])
        self._hashes.add(digest)
        self.trusted.append(item)
        return True

    def offer(self, item: Item) -> Offered:
        """Let chance decide whether an item is kept, and what it replaces."""
        digest = _digest(item)
        if digest in self._hashes or digest in self._old:
            return "duplicate"
        self._remember(digest)
        self._sent[item.source] += 1
        if self._held[item.source] >= self.cap:
            return self._within_share(item, digest)
        self.offered += 1
        if len(self.items) < self.capacity:
            self._put(None, item, digest)
            return "added"
        slot = int(self._rng.integers(self.offered))
        if slot >= self.capacity:
            return "passed"
        self._put(slot, item, digest)
        return "replaced"

    def _within_share(self, item: Item, digest: str) -> Offered:
        chosen = int(self._rng.integers(self._sent[item.source]))
        if chosen >= self.cap:
            return "passed"
        own = [slot for slot, held in enumerate(self.items) if held.source == item.source]
        self._put(own[chosen], item, digest)
        return "replaced"

    def _put(self, slot: int | None, item: Item, digest: str) -> None:
        if slot is None:
            self.items.append(item)
        else:
            self._drop(self.items[slot])
            self.items[slot] = item
        self._hashes.add(digest)
        self._held[item.source] += 1

    def _drop(self, item: Item) -> None:
        self._hashes.discard(_digest(item))
        self._held[item.source] -= 1

    def _remember(self, digest: str) -> None:
        self._old[digest] = None
        while len(self._old) > self.remembered:
            self._old.popitem(last=False)

    def forget(self, source: str) -> int:
        """Erase everything of a source, trusted items too; the number of items that went.

        Its hashes are forgotten as well: whoever was erased may come again.
        """
        gone = [i for i in (*self.items, *self.trusted) if i.source == source]
        for item in gone:
            self._hashes.discard(_digest(item))
            self._old.pop(_digest(item), None)
        self.items = [i for i in self.items if i.source != source]
        self.trusted = [i for i in self.trusted if i.source != source]
        del self._held[source], self._sent[source]
        return len(gone)

    # --- drawing --------------------------------------------------------------------------------

    def draw(self, n: int) -> list[Item]:
        """n items with replacement; the generator moves on.

        Raises:
            DataError: so few sources that their shares do not fill a batch, and no trusted stratum.
        """
        pool = [*self.items, *self.trusted]
        chances = self.chances()
        return [pool[i] for i in self._rng.choice(len(pool), size=n, p=chances)]

    def draw_trusted(self, n: int) -> list[Item]:
        """n trusted items with replacement, all alike; [] if there are none."""
        if not self.trusted:
            return []
        return [self.trusted[i] for i in self._rng.integers(len(self.trusted), size=n)]

    @property
    def is_fair(self) -> bool:
        """Has the reservoir sources enough for a batch in which none has more than its share?"""
        return len({item.source for item in self.items}) * self.max_share >= 1 - 1e-9

    def draw_offered(self, n: int) -> list[Item]:
        """n items of the reservoir alone with replacement; [] while it is not fair."""
        if not self.is_fair:
            return []
        return [
            self.items[i]
            for i in self._rng.choice(len(self.items), size=n, p=self.chances(alone=True))
        ]

    def chances(self, alone: bool = False) -> np.ndarray:
        """Chance of every item, the reservoir's first, then the trusted ones' unless it is `alone`.

        Equal for all, but that no source's sum exceeds `max_share`: what it has above that goes to
        the others in equal parts. The trusted stratum has no such limit.
        """
        names = sorted(name for name, count in self._held.items() if count)
        counts = np.array([self._held[name] for name in names], dtype=float)
        trusted = 0 if alone else len(self.trusted)
        shares = _limited(counts, trusted, self.max_share)
        if shares is None:
            raise DataError(
                f"{len(names)} sources with {self.max_share:.0%} of a batch at most each cannot fill one, and "
                "there is no trusted item: trust some, raise max_share, or wait for more sources."
            )
        each = dict(zip(names, shares / counts, strict=True))
        of_items = [each[item.source] for item in self.items]
        rest = 1.0 - sum(of_items)
        of_trusted = [rest / trusted] * trusted if trusted else []
        chances = np.array([*of_items, *of_trusted])
        return chances / chances.sum()

    # --- surviving a restart --------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Items, counters and the generator, as JSON values: a restored one draws the same."""
        return {
            "capacity": self.capacity,
            "max_share": self.max_share,
            "remembered": self.remembered,
            "offered": self.offered,
            "items": [asdict(item) for item in self.items],
            "trusted": [asdict(item) for item in self.trusted],
            "sent": dict(self._sent),
            "old": list(self._old),
            "generator": self._rng.bit_generator.state,
        }

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Replay:
        """The inverse of `state`.

        Raises:
            DataError: not a reservoir's state.
        """
        try:
            replay = Replay(state["capacity"], 0, state["max_share"], state["remembered"])
            replay.offered = state["offered"]
            replay.items = [Item(**item) for item in state["items"]]
            replay.trusted = [Item(**item) for item in state["trusted"]]
            replay._sent.update(state["sent"])
            replay._old.update(dict.fromkeys(state["old"]))
            replay._held.update(item.source for item in replay.items)
            replay._hashes.update(map(_digest, (*replay.items, *replay.trusted)))
            replay._rng.bit_generator.state = state["generator"]
        except (KeyError, TypeError, ValueError) as failed:
            raise DataError(f"this is no state of a replay reservoir: {failed!r}.") from None
        return replay

    def to_json(self) -> str:
        """`state` as text."""
        return json.dumps(self.state(), ensure_ascii=False)


def _digest(item: Item) -> str:
    return sha256_json(item.content)[:32]


def _limited(counts: np.ndarray, trusted: int, most: float) -> np.ndarray | None:
    """Shares of the sources: in proportion to their counts, but `most` at most; None: they leave a rest
    that nobody may take."""
    shares, limited = np.zeros(len(counts)), np.zeros(len(counts), dtype=bool)
    while True:
        free = counts[~limited].sum() + trusted
        left = 1.0 - most * limited.sum()
        if free == 0:
            return np.full(len(counts), most) if abs(left) < 1e-9 and len(counts) else None
        shares[~limited], shares[limited] = left * counts[~limited] / free, most
        over = ~limited & (shares > most * (1 + 1e-12))
        if not over.any():
            return shares
        limited |= over
