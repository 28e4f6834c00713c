"""An entry is only ever appended, and rests on the one before it."""

import errno
import json
import os
import resource
from contextlib import contextmanager

import pytest

from bem.errors import CheckpointError
from bem.runs.ledger import BEGINNING, append, in_use, read_ledger, without_torn_line


def entry(event="promote", release="r1", **changes):
    values = {
        "at": "2030-01-01T00:00:00.000+00:00",
        "by": "ada",
        "event": event,
        "release": release,
    }
    return {
        **values,
        "version": release,
        "verdict": None,
        "reason": "why",
        "about": None,
        **changes,
    }


@pytest.fixture
def ledger(tmp_path):
    """Three entries."""
    ledger = read_ledger(tmp_path / "ledger.jsonl")
    for number in (1, 2, 3):
        ledger = append(ledger, **entry(release=f"r{number}", reason="ein Grund: ü\u2028\n"))
    return ledger


def test_what_is_appended_is_read_again_with_numbers_and_the_hash_of_the_one_before(ledger):
    assert read_ledger(ledger.path) == ledger
    assert [e.number for e in ledger.entries] == [1, 2, 3]
    hashes = [e.sha256 for e in ledger.entries]
    assert [e.previous for e in ledger.entries] == [
        BEGINNING,
        *hashes[:2],
    ] and ledger.head == hashes[2]
    assert [json.loads(line)["sha256"] for line in ledger.path.read_bytes().splitlines()] == hashes


def test_a_flipped_byte_anywhere_is_found_and_what_stands_before_it_is_kept(ledger):
    raw = ledger.path.read_bytes()
    for place in range(len(raw)):
        ledger.path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        read = read_ledger(ledger.path)
        line = raw.count(b"\n", 0, place)  # of the byte, from 0
        assert read.entries == ledger.entries[:line]
        assert read.damage or read.torn  # torn: the last line lost its end


@pytest.mark.parametrize("order", [[0, 2], [1, 0, 2], [0, 1, 1, 2], [1, 2]])
def test_lines_that_are_dropped_moved_or_doubled_are_found(ledger, order):
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    ledger.path.write_bytes(b"".join(lines[i] for i in order))
    read = read_ledger(ledger.path)
    assert "does not follow on the one before it" in read.damage
    with pytest.raises(CheckpointError, match=r"is damaged: line .* `bem store repair`"):
        read.whole()


def test_a_torn_last_line_is_told_apart_and_can_be_cut_off(ledger):
    raw = ledger.path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(raw) if byte == 10]
    for length in range(ends[1] + 1, len(raw)):
        ledger.path.write_bytes(raw[:length])
        read = read_ledger(ledger.path)
        assert (read.entries, read.torn, read.damage) == (
            ledger.entries[:2],
            raw[ends[1] : length],
            "",
        )
    assert without_torn_line(read).entries == ledger.entries[:2]
    assert ledger.path.read_bytes() == raw[: ends[1]]


@contextmanager
def disk_full_at(size: int):
    """No file of this process may grow beyond this size: the kernel refuses, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 1, 100])
def test_a_full_disk_leaves_the_ledger_as_it_was(ledger, room):
    raw = ledger.path.read_bytes()
    with disk_full_at(len(raw) + room), pytest.raises(OSError) as full:
        append(ledger, **entry())
    assert full.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert os.path.getsize(ledger.path) == len(raw) and read_ledger(ledger.path) == ledger


def test_what_was_taken_back_is_no_place_to_go_back_to(tmp_path):
    ledger = read_ledger(tmp_path / "ledger.jsonl")
    said = []
    for event, release in [
        ("promote", "a"), ("promote", "b"), ("rollback", "a"), ("promote", "c"), ("import", "x"),
        ("rollback", "b"), ("rollback", None),
    ]:  # fmt: skip
        ledger = append(ledger, **entry(event, release))
        said.append(in_use(ledger.moves()))
    assert said == [
        [None, "a"], [None, "a", "b"], [None, "a"], [None, "a", "c"], [None, "a", "c"],
        [None, "a", "c", "b"], [None],
    ]  # fmt: skip


def test_a_move_that_was_abandoned_counts_for_nothing(ledger):
    ledger = append(ledger, **entry("abandon", None, about=2))
    assert [move.release for move in ledger.moves()] == ["r1", "r3"]
