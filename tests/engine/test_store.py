"""What the chunk store keeps, what it throws out first, and what it says of it."""

import pytest
import torch

from bem.engine.store import Block, ChunkStore
from bem.errors import EngineError

ONE = 8 * 2 * 4  # bytes of a block below: keys and values, 8 float32 numbers each


def block(name: str, parent: str = "root", version: str = "v", weights=(), ids=(1, 2)) -> Block:
    held = [(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))]
    return Block(name, parent, ids, held, None, version, frozenset(weights), ONE)


def chain(store: ChunkStore, *names: str, version: str = "v") -> None:
    for parent, name in zip(("root", *names), names, strict=False):
        assert store.put(block(name, parent, version))


def test_a_block_is_found_by_its_name_and_its_tokens():
    store = ChunkStore(ONE)
    store.put(block("a", ids=(1, 2)))
    assert store.get("a", (1, 2)) is not None
    assert store.get("a", (1, 3)) is None and store.why_missing("a", "", "text") == "collision"


def test_leaves_go_before_their_parents_and_the_least_recently_used_first():
    store = ChunkStore(4 * ONE)
    chain(store, "a", "b", "c")
    store.put(block("x"))
    running = [store.blocks[name] for name in "abc"]
    store.hold(running)
    store.let_go(running)  # used after x was
    store.put(block("y"))
    assert list(store.blocks) == ["c", "b", "a", "y"]  # x went
    store.put(block("z"))
    assert list(store.blocks) == ["b", "a", "y", "z"]  # then the leaf of the chain
    assert store.stats.evicted == store.stats.evicted_before_reuse == 4
    assert store.why_missing("c", "", "never read") == "new"
    store.read("read")
    assert store.why_missing("c", "", "read") == "evicted"
    assert store.stats.nbytes == 4 * ONE


def test_what_runs_or_is_pinned_stays_and_a_block_that_finds_no_room_is_refused():
    store = ChunkStore(2 * ONE)
    chain(store, "a", "b")
    running = [store.blocks["a"]]
    store.hold(running)
    store.pin(["b"])
    assert not store.put(block("c"))
    store.read("text")
    store.refused("decision", "no room")
    assert store.why_missing(None, "decision", "text") == "no room"
    assert store.why_missing(None, "another", "text") == "changed"
    store.pin(["b"], pinned=False)
    assert store.put(block("c")) and list(store.blocks) == ["a", "c"]
    store.let_go(running)
    assert not store.put(Block("d", "root", (1,), [], None, "v", frozenset(), 3 * ONE))
    with pytest.raises(EngineError, match="no block"):
        store.pin(["b"])


def test_a_parent_is_never_thrown_out_for_its_own_child():
    store = ChunkStore(ONE)
    store.put(block("a"))
    assert not store.put(block("b", parent="a")) and "a" in store.blocks


def test_a_version_with_a_quota_throws_out_its_own_blocks_only():
    store = ChunkStore(4 * ONE, quotas={"canary": 0.25})
    chain(store, "a", "b", "c", version="stable")
    for name in "xyz":
        assert store.put(block(name, version="canary"))
    assert list(store.blocks) == ["a", "b", "c", "z"]
    with pytest.raises(EngineError, match=r"quota must be in \(0, 1\]"):
        store.set_quota("canary", 0)


def test_purging_takes_what_was_computed_under_a_digest_and_all_behind_it():
    store = ChunkStore(10 * ONE)
    store.put(block("a"))
    store.put(block("b", "a", weights=["expert"]))
    store.put(block("c", "b"))
    store.put(block("d", version="other"))
    for name in "abcd":
        store.decided(f"to {name}", store.blocks[name].version, name, None)
    assert store.purge("expert") == 2 * ONE and set(store.blocks) == {"a", "d"}
    assert store.purge("other") == ONE and set(store.blocks) == {"a"}
    assert set(store.decisions) == {"to a"}
    store.clear()
    assert not store.blocks and not store.decisions and store.stats.nbytes == 0


def test_a_negative_budget_is_refused():
    with pytest.raises(EngineError, match="at least 0 bytes"):
        ChunkStore(-1)


def test_who_runs_on_a_purged_block_gives_back_that_one_and_not_the_one_computed_since():
    store = ChunkStore(ONE)
    store.put(block("a"))
    first = [store.blocks["a"]]
    store.hold(first)
    store.purge("v")
    store.put(block("a"))
    second = [store.blocks["a"]]
    store.hold(second)
    store.let_go(first)
    assert not store.put(block("b")), "the second one still runs"
    store.let_go(second)
    assert store.put(block("b"))
