"""Versions in memory, side by side on one base: which one answers a request, and when one is let go.

Each stands on a copy of the base that shares its weights, with an engine of its own; but routers over experts of
the same ranks share one, and with it every pass. All engines share one chunk store, so that what two versions
have in common is computed once and going back is warm. A version that is replaced stays until its last answer is
out.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bem.adapters.copies import with_shared_weights
from bem.adapters.version import base_identity
from bem.config import ServingConfig
from bem.engine.acts import acts_of
from bem.engine.engine import GIB, Engine
from bem.engine.store import ChunkStore
from bem.errors import BemError, CheckpointError, ConfigError, Refused
from bem.routing.mounted import Mounted
from bem.runs.loading import attach_release
from bem.runs.release import SHORT, Release
from bem.runs.store import Store
from bem.runs.taken import Taken
from bem.serving.driver import Driver
from bem.serving.naming import BASE, Name, unknown_model
from bem.serving.resident import Coin, Lease, Resident

log = logging.getLogger(__name__)


RETRY_S = 30.0
"""Until a store that could not be followed is looked at again."""


class Residents:
    """The versions that a server has in memory; used from one event loop."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: ServingConfig,
        driver: Driver,
        guarded: Callable[[Any], Any] = lambda adapted: adapted,
    ):
        """
        Args:
            model: the base; nothing runs on it or is attached to it, copies of it are.
            guarded: what every version passes before it serves.
        Raises:
            CheckpointError: there is no store, or no release in it is whole.
            BaseMismatch: the store serves another base.
            ConfigError: a canary that the store does not have.
        """
        self.model, self.tokenizer, self.config, self.driver = model, tokenizer, config, driver
        self._guarded = guarded
        self.chunks = ChunkStore(int(config.cache_gib * GIB))
        self.store = None if config.store is None else Store(config.store)
        self.problems: tuple[str, ...] = ()
        """What of the store is damaged, or why what is in use there is not served."""
        self.moved = 0
        """How often another version was put in front since the start."""
        self._asked = 0
        self._loader = ThreadPoolExecutor(1, "loader")
        self._loading: dict[str, asyncio.Task[Resident]] = {}
        self._resident: dict[str, Resident] = {}
        self._base_identity = asdict(base_identity(model))
        self._seen: object = None
        self._look_again = 0.0
        self.bare = self._made(None)
        self.current = self._first()
        self.canaries = self._canaries(config.canary)

    def __iter__(self):
        return iter(self._resident.values())

    # --- which one --------------------------------------------------------------------------------

    def choose(self, name: Name, conversation: str) -> str | None:
        """Digits or digest of the version that a name means for a conversation; None: the bare base."""
        if name.bare:
            return None
        if name.version is not None:
            return name.version
        place = int(hashlib.sha256(conversation.encode()).hexdigest()[:12], 16) / 16**12
        if name.expert is None:
            for version, share in self.canaries.items():
                if place < share:
                    return version
                place -= share
        return None if self.current is self.bare else self.current.version

    async def lease(self, name: Name, conversation: str, asked: str) -> Lease:
        """The version that answers, loaded if it is not here, held until the lease ends.

        A canary that cannot be had leaves its conversations to the version in front.

        Args:
            asked: the model's name as the client gave it.
        Raises:
            Refused: the store has no such version, or it cannot be loaded; or as many as allowed are in
                memory and busy.
        """
        version, shares = self.choose(name, conversation), list(self.canaries.values())
        tossed = name == Name() and len(shares) == 1
        if version not in self.canaries or name.version is not None:
            coin = Coin(False, shares[0]) if tossed else None
            return Lease(await self._get(version, asked), self.let_go, coin)
        try:
            coin = Coin(True, shares[0]) if tossed else None
            return Lease(await self._get(version, asked), self.let_go, coin)
        except Refused as error:
            log.error("the canary is passed over: %s", error)
            if error.retry_after_s is None:
                self.canaries.pop(version, None)
            front = None if self.current is self.bare else self.current.version
            return Lease(await self._get(front, asked), self.let_go)

    async def _get(self, version: str | None, asked: str) -> Resident:
        """A version in memory, counted as used; None: the bare base."""
        while True:
            self._forget_lost()
            resident = self._find(self.bare.version if version is None else version)
            if resident is None:
                release = None if version is None else await self._release(version, asked)
                resident = await self._load(release)
            if self._resident.get(resident.version) is resident:  # and not let go meanwhile
                break
        self._asked += 1
        resident.used, resident.users = self._asked, resident.users + 1
        return resident

    def _forget_lost(self) -> None:
        """Versions whose engine failed for good are loaded anew when they are asked for."""
        if self.driver.lost:
            lost = {v for v, r in self._resident.items() if r.host in self.driver.lost}
            for version in lost:
                del self._resident[version]

    def let_go(self, resident: Resident) -> None:
        """An answer is out."""
        resident.users -= 1

    def _find(self, version: str) -> Resident | None:
        found = [r for r in self._resident.values() if r.version.startswith(version)]
        return found[0] if len(found) == 1 else None

    async def _release(self, version: str, name: str) -> Release:
        if self.store is None:
            raise unknown_model(name, "This server has no version store: start it with --store.")
        try:
            return await self._off_loop(self.store.find, version)
        except CheckpointError as error:
            raise unknown_model(name, str(error)) from None

    # --- loading and letting go -------------------------------------------------------------------

    async def _load(self, release: Release | None) -> Resident:
        """A release beside those that are here; asked for twice it is loaded once."""
        key = BASE if release is None else release.version
        task = self._loading.get(key)
        if task is None:
            self._make_room()
            task = asyncio.ensure_future(self._loaded(release))
            self._loading[key] = task
            task.add_done_callback(lambda _: self._loading.pop(key, None))
        try:
            return await asyncio.shield(task)
        except BemError as error:
            what = "the base" if release is None else f"version {release.short}"
            log.error("%s cannot be loaded: %s", what, error)
            raise Refused(
                503, f"{what} cannot be loaded: {error}", "model", "model_damaged"
            ) from error

    async def _loaded(self, release: Release | None) -> Resident:
        adapted = await self._off_loop(self._attached, release)
        host, acting = await self._host(release, adapted)
        if host is None:
            resident = await self._off_loop(self._alone, release, adapted)
            self.driver.add(resident.host, resident.engine)
        else:
            assert release is not None
            version, engine = release.version, host.engine
            resident = Resident(version, release, adapted, engine, host.host, host.experts, acting)
        self._kept(resident)
        if release is None:
            self.bare = resident
        return resident

    async def _host(self, release: Release | None, adapted: Any) -> tuple[Resident | None, str]:
        """A version whose engine takes this one in too, and what it is called there: a router over as many experts
        of the same ranks."""
        if release is None or not isinstance(adapted, Mounted):
            return None, ""
        version = release.version
        hosts = {r.host: r for r in self._resident.values() if isinstance(r.adapted, Mounted)}
        for resident in hosts.values():
            engine = resident.engine
            try:
                acting = await self.driver.call(lambda e=engine: e.keep(version, adapted))
            except BemError as error:
                log.info("version %s has an engine of its own: %s", version[:SHORT], error)
            else:
                return resident, acting
        return None, ""

    def _make_room(self) -> None:
        kept = {id(self.bare), id(self.current)}
        versions = [r for r in self._resident.values() if r.release is not None]
        if len(versions) + len(self._loading) < self.config.resident:
            return
        idle = [r for r in versions if not r.users and id(r) not in kept]
        if not idle:
            raise Refused(
                503,
                f"{len(versions)} versions are in memory and busy: try again later, or start the server with a larger "
                "resident.",
                "model",
                "too_many_versions",
                retry_after_s=5,
            )
        gone = min(idle, key=lambda r: r.used)
        log.info("version %s leaves memory", gone.short)
        del self._resident[gone.version]
        if any(r.host == gone.host for r in self._resident.values()):
            self.driver.post(lambda: _drop(gone))
        else:
            self.driver.remove(gone.host)

    def _attached(self, release: Release | None) -> Any:
        """A release on a copy of the base."""
        copy: Any = with_shared_weights(self.model)
        if release is None:
            return self._guarded(copy)
        assert self.store is not None
        return self._guarded(attach_release(self.store, release, copy))

    def _alone(self, release: Release | None, adapted: Any) -> Resident:
        """A version with an engine of its own."""
        options = self.config
        engine = Engine(
            adapted,
            self.tokenizer,
            options.slots,
            prefill_tokens=options.prefill_tokens,
            queue=options.queue,
            store=self.chunks,
        )
        experts = adapted.router.space.experts if isinstance(adapted, Mounted) else ()
        acting = acts_of(adapted).version.digest
        version = acting if release is None else release.version
        return Resident(version, release, adapted, engine, version, tuple(experts), acting)

    def _made(self, release: Release | None) -> Resident:
        resident = self._alone(release, self._attached(release))
        self.driver.add(resident.host, resident.engine)
        return self._kept(resident)

    def _kept(self, resident: Resident) -> Resident:
        """It is in memory from now on."""
        self._resident[resident.version] = resident
        what = resident.short if resident.release else "of the bare base"
        beside = f", beside {resident.host[:SHORT]}" if resident.guest else ""
        log.info("version %s is in memory%s", what, beside)
        return resident

    async def _off_loop(self, call: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._loader, call, *arguments)

    # --- what is in use ---------------------------------------------------------------------------

    def _first(self) -> Resident:
        if self.store is None:
            return self.bare
        self._seen = _mark(self.store)
        taken = self._taken(self.store)
        self.problems = taken.problems
        return self.bare if taken.release is None else self._made(taken.release)

    def _taken(self, store: Store) -> Taken:
        journal = store.journal
        if not (journal.pointer_file.exists() or journal.ledger_file.exists()):
            return Taken(None, "nothing was promoted yet: there is no store")
        return store.load_current(self._base_identity)

    def _canaries(self, shares: Mapping[str, float]) -> dict[str, float]:
        if not shares:
            return {}
        if self.store is None or sum(shares.values()) > 1:
            raise ConfigError(
                f"canary {dict(shares)}: it needs a version store, and shares of 1 at most together."
            )
        found = {self.store.find(name).version: share for name, share in shares.items()}
        for version, share in found.items():
            self.chunks.set_quota(version, max(share, 0.1))
        return found

    async def watch(self) -> None:
        """Follow the store's pointer until cancelled."""
        while True:
            await asyncio.sleep(self.config.watch_s)
            try:
                await self.look()
            except Exception:
                log.exception("looking at the version store failed; what is served stays")

    async def look(self) -> bool:
        """Put in front what is in use now; what cannot be loaded is logged, and what is served stays.

        Returns:
            Is it another version than before?
        """
        now = asyncio.get_running_loop().time()
        if self.store is None or now < self._look_again:
            return False
        if (mark := _mark(self.store)) == self._seen:
            return False
        try:
            front, self.problems = await self._front(self.store)
            self._seen = mark
        except (BemError, OSError) as error:
            self.problems, self._look_again = (str(error),), now + RETRY_S
            log.error("the version store cannot be followed, what is served stays: %s", error)
            return False
        if front is self.current:
            return False
        log.info("version %s is in front, %s was", front.short, self.current.short)
        self.current, self.moved = front, self.moved + 1
        return True

    async def _front(self, store: Store) -> tuple[Resident, tuple[str, ...]]:
        """What is to be in front, in memory, and what of the store is damaged."""
        taken = await self._off_loop(self._taken, store)
        if taken.release is None:
            return self.bare, taken.problems
        self._forget_lost()
        here = self._resident.get(taken.release.version)
        return (await self._load(taken.release) if here is None else here), taken.problems

    def close(self) -> None:
        """Load nothing any more."""
        self._loader.shutdown(wait=False, cancel_futures=True)


def _drop(gone: Resident) -> None:
    """Have an engine forget a version; the one for which it was made has no name there, and stays."""
    if gone.version in gone.engine.versions:
        gone.engine.drop(gone.version)


def _mark(store: Store) -> object:
    """What changes when the pointer moves."""
    try:
        return Path(store.journal.pointer_file).read_bytes()
    except OSError as error:
        return type(error).__name__
