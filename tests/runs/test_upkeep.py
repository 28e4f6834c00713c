"""Upkeep finds all damage, repairs what can be, and throws away only what nobody needs."""

import pytest

from bem.errors import CheckpointError, ConfigError
from bem.runs.upkeep import check, collect, repair
from tests.runs.contents import WEIGHTS, everything, make_content, make_store, promote


def events(store) -> list[str]:
    return [entry.event for entry in store.journal.ledger().whole().entries]


# --- collect ------------------------------------------------------------------------------------


def test_what_was_used_last_stays_and_what_no_release_names_goes(tmp_path):
    store = make_store(tmp_path, *"abcde")
    releases = [store.shelf.release(e.release) for e in store.journal.ledger().entries]
    gone = collect(store, keep=2)
    assert set(gone.releases) == {r.id for r in releases[:3]}
    assert gone.objects == 3 * 3  # weights, manifest and verdicts of each
    kept = {path.name for path in store.shelf.objects.iterdir()}
    assert kept == releases[3].objects | releases[4].objects
    assert check(store) == [] and store.current() == releases[4]
    assert (
        events(store)[-1] == "collect"
        and releases[0].id[:12] in store.journal.ledger().entries[-1].reason
    )
    assert store.rollback(reason="x") == releases[3]


def test_a_file_that_a_kept_release_shares_stays(tmp_path):
    store = make_store(tmp_path)
    for number in range(3):
        content = make_content(tmp_path / f"{number}", {"shared": "s", WEIGHTS: f"{number}"})
        store.add(content, f"{number}")
    collect(store, keep=1)
    assert check(store) == [] and len(list(store.shelf.objects.iterdir())) == 3


def test_what_is_in_use_and_what_a_rollback_goes_to_stay_however_old(tmp_path):
    store = make_store(tmp_path, "a", "b")
    for number in range(4):
        store.add(make_content(tmp_path / f"{number}", {WEIGHTS: f"{number}"}), f"{number}")
    before, current = (store.find(e.version) for e in store.journal.ledger().entries[:2])
    assert len(collect(store, keep=1).releases) == 3
    assert store.current() == current and store.rollback(reason="x") == before


def test_what_killed_writers_left_goes_and_nothing_to_do_writes_nothing(tmp_path):
    store = make_store(tmp_path, "a")
    draft = store.shelf.objects / ".abc.123.draft"
    draft.write_text("half")
    orphan = store.shelf.objects / ("0" * 64)
    orphan.write_text("")
    assert (collect(store, keep=1).objects, draft.exists(), orphan.exists()) == (1, False, False)
    before = everything(store.path)
    assert collect(store, keep=1).objects == 0 and everything(store.path) == before


def test_nothing_is_thrown_away_while_something_is_damaged_or_on_a_senseless_order(tmp_path):
    store = make_store(tmp_path, "a", "b", "c")
    with pytest.raises(ConfigError, match="keep must be 1 or more, got 0"):
        collect(store, keep=0)
    store.shelf.manifest(store.current().id).write_text("x")
    before = everything(store.path)
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        collect(store, keep=1)
    assert everything(store.path) == before


# --- repair -------------------------------------------------------------------------------------


def test_a_whole_store_needs_no_repair(tmp_path):
    store = make_store(tmp_path, "a")
    before = everything(store.path)
    assert repair(store, "x").done == () and everything(store.path) == before


def test_a_damaged_pointer_is_written_anew_for_the_last_move(tmp_path):
    store = make_store(tmp_path, "a", "b")
    last = store.current()
    store.journal.pointer_file.write_bytes(b"")
    assert repair(store, "disk failed").release == last == store.current()
    entry = store.journal.ledger().entries[-1]
    assert (entry.event, entry.release) == ("repair", last.id) and "disk failed" in entry.reason
    promote(store, tmp_path, "c")
    assert check(store) == []


def test_a_damaged_ledger_is_kept_beside_its_whole_part_and_what_is_in_use_stays(tmp_path):
    store = make_store(tmp_path, "a", "b", "c")
    last, raw = store.current(), store.journal.ledger_file.read_bytes()
    lines = raw.splitlines(keepends=True)
    spoilt = lines[0] + lines[1].replace(b"ada", b"eve") + lines[2]
    store.journal.ledger_file.write_bytes(spoilt)
    assert repair(store, "x").release == last == store.current()
    assert events(store) == ["promote", "repair"]
    (aside,) = store.path.glob("ledger.damaged-*.jsonl")
    assert aside.read_bytes() == spoilt and aside.name in store.journal.ledger().entries[-1].reason
    assert (
        check(store) == []
        and store.rollback(reason="y").version == store.find(lines_version(raw)).version
    )


def lines_version(raw: bytes) -> str:
    """Version of the first entry."""
    return raw.split(b'"version":"')[1][:64].decode()


def test_a_damaged_release_is_left_for_the_last_good_one(tmp_path):
    store = make_store(tmp_path, "a", "b")
    first = store.find(store.journal.ledger().entries[0].version)
    (store.shelf.objects / store.current().files[WEIGHTS]).unlink()
    assert repair(store, "x").release == first == store.current()
    assert events(store) == ["promote", "promote", "repair"]
    with pytest.raises(CheckpointError, match="cannot be read"):
        store.rollback(store.journal.ledger().entries[1].version, reason="back to what is damaged")


def test_where_nothing_is_whole_a_repair_changes_nothing(tmp_path):
    store = make_store(tmp_path, "a")
    (store.shelf.objects / store.current().files[WEIGHTS]).unlink()
    before = everything(store.path)
    with pytest.raises(CheckpointError, match="holds no release that is whole"):
        repair(store, "x")
    assert everything(store.path) == before
    with pytest.raises(CheckpointError, match="is no version store"):
        repair(make_store(tmp_path / "nowhere"), "x")
