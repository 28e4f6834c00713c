"""What is in use is whole and is what the ledger says; anything else is refused, or the last good one is taken."""

import multiprocessing
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bem.errors import BaseMismatch, CheckpointError, ConfigError, NotAccepted
from bem.runs.ledger import read_ledger
from bem.runs.release import read_content
from bem.runs.store import Store
from bem.runs.upkeep import check, collect
from tests.runs.contents import (
    BASE,
    WEIGHTS,
    everything,
    make_content,
    make_grounds,
    make_store,
    promote,
    sha256,
)  # fmt: skip
from tests.runs.test_ledger import disk_full_at


def events(store) -> list[tuple[str, str | None]]:
    return [(e.event, e.version) for e in read_ledger(store.journal.ledger_file).entries]


# --- promote and rollback -----------------------------------------------------------------------


def test_a_promoted_release_is_in_use_and_the_ledger_says_who_when_and_by_which_verdict(tmp_path):
    store = make_store(tmp_path)
    grounds = make_grounds(tmp_path, "a")
    release = store.promote(make_content(tmp_path / "a", {WEIGHTS: "w"}), grounds)
    assert store.current() == release == store.load_current().release
    assert (release.base, release.verdict, release.parent) == (BASE, grounds.sha256, None)
    (entry,) = read_ledger(store.journal.ledger_file).entries
    assert (entry.event, entry.by, entry.at) == ("promote", "ada", "2030-01-01T00:00:01.000+00:00")
    assert (entry.release, entry.version) == (release.id, release.version)
    assert (entry.verdict, entry.reason) == (grounds.sha256, "run: a, seed 0")
    with store.shelf.folder(release) as folder:
        assert everything(folder) == everything(tmp_path / "a")
    assert not folder.exists()


def test_what_two_releases_share_is_kept_once(tmp_path):
    store = make_store(tmp_path)
    experts = {f"experts/{name}/{WEIGHTS}": f"expert {name}" for name in "abcd"}
    first = make_content(tmp_path / "1", {**experts, "router.safetensors": "r1"}, "router")
    changed = {**experts, f"experts/b/{WEIGHTS}": "another", "router.safetensors": "r1"}
    second = make_content(tmp_path / "2", changed, "router")
    grounds = make_grounds(tmp_path)
    store.promote(first, grounds)
    one = len(list(store.shelf.objects.iterdir()))
    assert one == 4 + 1 + 2  # experts, router, manifest and verdicts
    store.promote(second, grounds)
    assert (
        len(list(store.shelf.objects.iterdir())) == one + 2
    )  # the expert that changed, the manifest


def test_a_release_knows_its_parent_and_promoting_it_again_changes_nothing(tmp_path):
    store = make_store(tmp_path)
    first, second = promote(store, tmp_path, "a"), promote(store, tmp_path, "b")
    assert second.parent == first.id
    before = everything(store.path)
    assert promote(store, tmp_path, "b") == second and everything(store.path) == before


def test_a_rollback_goes_back_step_by_step_to_the_bare_base(tmp_path):
    store = make_store(tmp_path, "a", "b", "c")
    versions = [version for _, version in events(store)]
    for expected in (versions[1], versions[0]):
        assert store.rollback(reason="worse").version == expected
    assert store.rollback(reason="worse") is None and store.current() is None
    with pytest.raises(NotAccepted, match="bare base is in use already"):
        store.rollback(reason="worse")
    assert events(store)[3:] == [("rollback", v) for v in (versions[1], versions[0], None)]


def test_a_rollback_may_name_any_version_that_was_in_use_by_its_first_digits(tmp_path):
    store = make_store(tmp_path, "a", "b", "c")
    (_, first), _, (_, third) = events(store)
    assert store.rollback(first[:8], reason=" slow ").version == first
    assert store.rollback(third, reason="was not it").version == third
    assert store.rollback("base", reason="all") is None
    assert [e.reason for e in store.journal.ledger().entries[3:]] == ["slow", "was not it", "all"]


@pytest.mark.parametrize(
    ("to", "reason", "error", "message"),
    [
        (None, " ", ConfigError, "needs a reason"),
        (
            "0000000",
            "x",
            CheckpointError,
            r"no whole version '0000000' \(give 4 digits or more\). It has: ",
        ),
        ("", "x", CheckpointError, "no whole version ''"),
        ("CURRENT", "x", NotAccepted, "is in use already"),
        ("IMPORTED", "x", NotAccepted, "was never in use: a verdict that says PROMOTE"),
    ],
)
def test_a_rollback_that_cannot_be_is_refused_and_changes_nothing(
    tmp_path, to, reason, error, message
):
    store = make_store(tmp_path, "a", "b")
    imported = store.add(make_content(tmp_path / "i", {WEIGHTS: "i"}), "i")
    named = {"CURRENT": store.current().version, "IMPORTED": imported.version}
    before = everything(store.path)
    with pytest.raises(error, match=message):
        store.rollback(named.get(to, to), reason=reason)
    assert everything(store.path) == before


def test_what_is_imported_can_be_found_but_is_not_in_use(tmp_path):
    store = make_store(tmp_path)
    content = make_content(tmp_path / "i", {WEIGHTS: "i"})
    release = store.add(content, "somewhere")
    assert store.add(content, "somewhere") == release and len(events(store)) == 1
    assert store.find(release.version[:6]) == release and release.verdict is None
    taken = store.load_current()
    assert (taken.release, taken.why, taken.problems) == (None, "nothing was promoted yet", ())
    promoted = store.promote(content, make_grounds(tmp_path))
    assert store.find(release.version[:6]) == promoted == store.current()


def test_a_version_that_was_in_use_can_be_gone_back_to_though_it_was_imported_since(tmp_path):
    store = make_store(tmp_path, "a", "b")
    used = store.find(events(store)[0][1])
    imported = store.add(read_content(tmp_path / "a"), "a again")
    assert imported.version == used.version and store.find(used.version) == imported != used
    assert store.rollback(used.version, reason="x") == used == store.current()


# --- another base -------------------------------------------------------------------------------


def test_a_store_serves_one_base(tmp_path):
    store = make_store(tmp_path, "a")
    other = {**BASE, "digest": "c" * 64, "dtype": "bfloat16"}
    foreign = make_content(tmp_path / "foreign", {WEIGHTS: "f"}, base=other)
    before = everything(store.path)
    for refused in (
        lambda: store.promote(foreign, make_grounds(tmp_path)),
        lambda: store.add(foreign, "f"),
    ):
        with pytest.raises(
            NotAccepted, match=r"base with digest cccccccccccc, .* one with bbbbbbbbbbbb"
        ):
            refused()
    assert everything(store.path) == before
    assert store.load_current(BASE).release
    with pytest.raises(BaseMismatch, match="made for a base with digest bbbbbbbbbbbb in float32"):
        store.load_current(other)


# --- damage -------------------------------------------------------------------------------------


def damaged(store: Store, original: Path, path: str, place: int) -> None:
    """A copy of the original with one byte flipped."""
    shutil.rmtree(store.path)
    shutil.copytree(original, store.path)
    raw = bytearray((store.path / path).read_bytes())
    raw[place] ^= 1
    (store.path / path).write_bytes(raw)


def test_a_flipped_byte_in_any_file_is_refused_and_the_last_good_release_is_taken(tmp_path, caplog):
    store = make_store(tmp_path, "a", "b")
    (_, first), (_, second) = events(store)
    current = store.current()
    original = shutil.copytree(store.path, tmp_path / "original")
    own = {f"releases/{current.id}.json", *(f"objects/{d}" for d in current.objects)}
    for path, raw in everything(original).items():
        if path == ".lock":
            continue
        for place in {0, len(raw) // 2, len(raw) - 1}:
            caplog.clear()
            damaged(store, original, path, place)
            assert check(store), path
            if path == "current.json" or path in own:
                with pytest.raises(CheckpointError, match=re.escape(Path(path).name)):
                    store.current()
            taken = store.load_current()
            assert taken.release.version == (first if path in own else second)
            in_the_way = path in own or path in ("current.json", "ledger.jsonl")
            assert bool(taken.problems) == in_the_way == bool(caplog.records)
            assert all(Path(path).name in problem for problem in taken.problems)


def test_a_swapped_file_is_refused(tmp_path):
    store = make_store(tmp_path, "a", "b")
    one, other = (store.shelf.objects / store.find(v).files[WEIGHTS] for _, v in events(store))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second), other.write_bytes(first)
    with pytest.raises(CheckpointError, match=f"{other.name} was changed after it was written"):
        store.current()
    with pytest.raises(CheckpointError, match="holds no release that is whole"):
        store.load_current()


def test_a_release_that_was_taken_back_is_never_fallen_back_to(tmp_path):
    store = make_store(tmp_path, "a", "bad")
    a = store.rollback(reason="bad answers")
    c = promote(store, tmp_path, "c")
    (store.shelf.objects / c.files[WEIGHTS]).unlink()
    taken = store.load_current()
    assert taken.release == a and taken.why.startswith("in use before, because")
    assert c.files[WEIGHTS] in taken.why


def test_a_lost_or_old_pointer_is_refused_and_the_ledger_says_what_was_last(tmp_path, caplog):
    store = make_store(tmp_path, "a")
    old = store.journal.pointer_file.read_bytes()
    promote(store, tmp_path, "b")
    last = promote(store, tmp_path, "c")
    for spoil, message in (
        (lambda p: p.write_bytes(old), "is older than the ledger: it is of entry 1"),
        (lambda p: p.write_bytes(old[:-20]), "is damaged"),
        (lambda p: p.unlink(), "is missing"),
    ):
        spoil(store.journal.pointer_file)
        for refused in (
            store.current,
            lambda: store.rollback(reason="x"),
            lambda: promote(store, tmp_path, "d"),
        ):
            with pytest.raises(CheckpointError, match=f"{message}.*bem store repair"):
                refused()
        assert store.load_current().release == last


def test_lost_lines_of_the_ledger_are_found_and_what_is_in_use_goes_on(tmp_path):
    store = make_store(tmp_path, "a", "b")
    current, lines = (
        store.current(),
        store.journal.ledger_file.read_bytes().splitlines(keepends=True),
    )
    store.journal.ledger_file.write_bytes(lines[0])
    with pytest.raises(
        CheckpointError, match="ends at entry 1, the pointer is of entry 2: lines were lost"
    ):
        promote(store, tmp_path, "c")
    assert store.load_current().release == current


def test_promoting_again_puts_right_what_is_damaged(tmp_path):
    store = make_store(tmp_path, "a")
    release = store.current()
    for path in (store.shelf.objects / release.files[WEIGHTS], store.shelf.manifest(release.id)):
        path.write_bytes(b"x")
        promote(store, tmp_path, "a")
        assert store.load_current().problems == () and store.current().version == release.version


def test_a_checkpoint_that_changes_while_it_is_promoted_is_refused(tmp_path):
    store = make_store(tmp_path, "a")
    content = make_content(tmp_path / "b", {WEIGHTS: "b"})
    (tmp_path / "b" / WEIGHTS).write_text("c")
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        store.promote(content, make_grounds(tmp_path))
    assert check(store) == [] and len(events(store)) == 1


# --- kills, full disks, several writers ---------------------------------------------------------


def test_an_entry_that_the_pointer_never_followed_is_abandoned_by_the_next_writer(tmp_path):
    store = make_store(tmp_path, "a")
    before = store.journal.pointer_file.read_bytes()
    promote(store, tmp_path, "killed")
    store.journal.pointer_file.write_bytes(before)  # as if killed between ledger and pointer
    assert check(store) == [] and store.current() == store.find(events(store)[0][1])
    last = promote(store, tmp_path, "c")
    assert [event for event, _ in events(store)] == ["promote", "promote", "abandon", "promote"]
    assert store.rollback(reason="x").version == events(store)[0][1] and last != store.current()


def test_a_torn_line_is_reported_and_dropped_by_the_next_writer(tmp_path):
    store = make_store(tmp_path, "a")
    with store.journal.ledger_file.open("ab") as file:
        file.write(b'{"number":2,"at":')
    assert "is torn: it was never acknowledged" in store.load_current().problems[0]
    promote(store, tmp_path, "b")
    assert [event for event, _ in events(store)] == ["promote", "recover", "promote"]
    assert (
        "a torn line of 17 bytes" in store.journal.ledger().entries[1].reason and check(store) == []
    )


@pytest.mark.parametrize("what", ["objects", "ledger"])
def test_a_full_disk_leaves_what_is_in_use(tmp_path, what):
    store = make_store(tmp_path, "a", "b", "c")
    size = store.journal.ledger_file.stat().st_size
    text = "w" * (2 * size if what == "objects" else 10)
    content = make_content(tmp_path / "d", {WEIGHTS: text})
    grounds, current = make_grounds(tmp_path), store.current()
    with (
        disk_full_at(size + 10),
        pytest.raises(CheckpointError, match=r"could not be written: .*stays\."),
    ):
        store.promote(content, grounds)
    assert store.current() == current and check(store) == [] and len(events(store)) == 3
    assert store.promote(content, grounds) == store.current()


def _promote_ten(home: Path, name: str, start) -> None:
    store = Store(home / "store", by=name)
    start.wait()
    for number in range(10):
        content = make_content(home / f"{name}{number}", {WEIGHTS: f"{name}{number}"})
        store.promote(content, make_grounds(home, f"{name}{number}"))


def test_two_processes_that_promote_at_once_take_turns(tmp_path):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)
    both = [context.Process(target=_promote_ten, args=(tmp_path, n, start)) for n in ("ada", "bob")]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    store = Store(tmp_path / "store")
    entries = store.journal.ledger().whole().entries
    assert len(entries) == 20 and {e.event for e in entries} == {"promote"}
    for name in ("ada", "bob"):
        own = [e.reason for e in entries if e.by == name]
        assert own == [f"run: {name}{number}, seed 0" for number in range(10)]
    releases = [store.shelf.release(e.release) for e in entries]
    assert [r.parent for r in releases] == [None, *(e.release for e in entries[:-1])]
    assert store.current() == releases[-1] and check(store) == []


def _move_about(home: Path, started) -> None:
    store, grounds = Store(home / "store"), make_grounds(home)
    contents = [make_content(home / f"m{i}", {WEIGHTS: f"m{i}"}) for i in range(3)]
    started.set()
    for number in range(30):
        store.promote(contents[number % 3], grounds)
        if number % 4 == 3:
            store.rollback(reason="again")
        if number % 10 == 9:
            collect(store, keep=1)


def test_a_reader_never_sees_a_move_half_done(tmp_path):
    context = multiprocessing.get_context("fork")
    make_store(tmp_path, "a")
    started = context.Event()
    process = context.Process(target=_move_about, args=(tmp_path, started))
    process.start()
    started.wait(60)
    store, seen = Store(tmp_path / "store"), set()
    while process.is_alive():
        taken = store.load_current()
        assert taken.problems == ()
        seen.add(taken.release.id)
    process.join()
    assert process.exitcode == 0 and len(seen) > 1 and check(store) == []


# --- what is no store ---------------------------------------------------------------------------


def test_a_folder_with_something_else_is_no_store(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "config.yaml").write_text("a run\n")
    store = make_store(tmp_path)
    with pytest.raises(CheckpointError, match=r"is no version store, it holds 'config.yaml'"):
        promote(store, tmp_path, "a")
    assert [p.name for p in store.path.iterdir()] == ["config.yaml"]
    for read in (store.current, store.load_current, lambda: store.find("abcdef")):
        with pytest.raises(CheckpointError, match=r"is no version store. `bem promote` makes one"):
            read()


def test_a_store_whose_maker_was_killed_before_its_first_pointer_is_made_anew(tmp_path):
    (tmp_path / "store" / "objects").mkdir(parents=True)
    (tmp_path / "store" / ".current.json.123.draft").write_text('{"format"')
    store = make_store(tmp_path)
    assert not store.journal.begun()
    promote(store, tmp_path, "a")
    assert store.journal.begun() and store.current() is not None and check(store) == []


def test_a_store_that_lost_pointer_and_ledger_is_not_begun_anew(tmp_path):
    store = make_store(tmp_path, "a")
    store.journal.pointer_file.unlink()
    store.journal.ledger_file.unlink()
    with pytest.raises(CheckpointError, match="neither pointer nor ledger"):
        promote(store, tmp_path, "b")


def test_digits_that_begin_several_versions_name_none(tmp_path):
    store = make_store(tmp_path)
    for name in "ab":
        content = make_content(tmp_path / name, {WEIGHTS: name})
        store.add(replace(content, version="1234" + sha256(name)[4:]), name)
    with pytest.raises(CheckpointError, match=r"'1234' begins several versions. There are: 1234"):
        store.find("1234")
    assert store.find("1234" + sha256("a")[4:8]).source == "a"
