"""A pointer is believed only byte for byte as it was written, and only if the ledger does not speak against it."""

import pytest

from bem.errors import CheckpointError
from bem.runs.ledger import BEGINNING, append, read_ledger
from bem.runs.pointer import Pointer, look_at, read_pointer
from tests.runs.test_ledger import entry


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "current.json"
    Pointer("r" * 64, "v" * 64, 3, "e" * 64).write(path)
    return path


def test_what_is_written_is_read(path):
    assert read_pointer(path) == Pointer("r" * 64, "v" * 64, 3, "e" * 64)


def test_a_flipped_byte_anywhere_or_a_cut_is_found(path):
    raw = path.read_bytes()
    for place in range(len(raw)):
        for spoilt in (raw[:place], raw[:place] + bytes([raw[place] ^ 4]) + raw[place + 1 :]):
            path.write_bytes(spoilt)
            with pytest.raises(CheckpointError, match=r"is damaged|was changed"):
                read_pointer(path)
    path.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        read_pointer(path)


@pytest.mark.parametrize(
    ("number", "release", "trouble", "believed"),
    [
        (3, "r3", "", True),
        (2, "r2", "", True),  # the writer of entry 3 was killed
        (1, "r1", "is older than the ledger", False),
        (3, "r2", "contradict each other", False),
        (4, "r4", "ends at entry 3, the pointer is of entry 4: lines were lost", True),
    ],
)
def test_pointer_and_ledger_must_agree(tmp_path, number, release, trouble, believed):
    ledger = read_ledger(tmp_path / "ledger.jsonl")
    for each in (1, 2, 3):
        ledger = append(ledger, **entry(release=f"r{each}"))
    sha256 = ledger.entries[number - 1].sha256 if number < 4 else "f" * 64
    look = look_at(tmp_path / "current.json", Pointer(release, None, number, sha256), ledger)
    assert trouble in look.trouble and bool(trouble) == bool(look.trouble)
    assert bool(look.believed) == believed
    if trouble:
        with pytest.raises(CheckpointError, match="bem store repair"):
            look.agreed()


def test_a_store_in_which_nothing_was_promoted_agrees_with_its_empty_ledger(tmp_path):
    pointer = Pointer(None, None, 0, BEGINNING)
    look = look_at(tmp_path / "current.json", pointer, read_ledger(tmp_path / "none"))
    assert look.agreed() == look.believed == pointer
