"""The one thing that moves in a version store: a small file that says which release is in use, and whether
it and the ledger agree."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from bem.errors import CheckpointError
from bem.files import sha256_json, write_bytes
from bem.runs.ledger import Entry, Ledger

FORMAT = 1
REPAIR = "Put it back from a copy, or run `bem store repair`."


@dataclass(frozen=True)
class Pointer:
    """Which release is in use, and by which entry of the ledger."""

    release: str | None
    """Id of a release; None: the bare base."""
    version: str | None
    entry: int
    """Number of the entry that put it into use; 0: nothing ever was."""
    entry_sha256: str

    def to_bytes(self) -> bytes:
        """As it stands in the file, with a sha256 over it."""
        values = {"format": FORMAT, **asdict(self)}
        return (json.dumps({**values, "sha256": sha256_json(values)}, indent=1) + "\n").encode()

    def write(self, path: Path) -> None:
        """Replace the pointer in one step that survives a power cut."""
        write_bytes(path, self.to_bytes())


def read_pointer(path: Path) -> Pointer:
    """The pointer, byte for byte as it was written.

    Raises:
        CheckpointError: missing, changed, or of another format.
    """
    try:
        raw = path.read_bytes()
        values = json.loads(raw)
        kind = values.get("format") if isinstance(values, dict) else None
        pointer = Pointer(*(values[name] for name in _NAMES)) if kind == FORMAT else None
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__})") from None
    if pointer is None or pointer.to_bytes() != raw:
        raise CheckpointError(f"{path} was changed after it was written")
    return pointer


_NAMES = ("release", "version", "entry", "entry_sha256")


@dataclass(frozen=True)
class Look:
    """Pointer and ledger as they are at one instant."""

    ledger: Ledger
    pointer: Pointer | None
    """None: missing or damaged."""
    trouble: str
    """Why they do not agree; empty: they do, as far as the ledger is whole."""

    def agreed(self) -> Pointer:
        """The pointer.

        Raises:
            CheckpointError: missing, changed, older than the ledger, or of an entry that is not there.
        """
        if self.trouble or self.pointer is None:
            raise CheckpointError(f"{self.trouble}. {REPAIR}")
        return self.pointer

    @property
    def believed(self) -> Pointer | None:
        """The pointer, if it is whole and the ledger, as far as it is whole, does not speak against it."""
        pointer = self.pointer
        if pointer and not (is_older(pointer, self.ledger) or contradicts(pointer, self.ledger)):
            return pointer
        return None


def look_at(pointer_file: Path, pointer: Pointer, ledger: Ledger) -> Look:
    """Do a whole pointer and a ledger agree?"""
    number, length = pointer.entry, len(ledger.entries)
    trouble = ""
    if is_older(pointer, ledger):
        trouble = f"{pointer_file} is older than the ledger: it is of entry {number}, behind which several moves stand"
    elif contradicts(pointer, ledger):
        trouble = f"{pointer_file} and entry {number} of the ledger contradict each other"
    elif number > length and not ledger.damage:
        trouble = f"{ledger.path} ends at entry {length}, the pointer is of entry {number}: lines were lost"
    return Look(ledger, pointer, trouble)


def open_moves(pointer: Pointer, ledger: Ledger) -> list[Entry]:
    """Moves in the ledger that the pointer did not follow."""
    return [move for move in ledger.moves() if move.number > pointer.entry]


def is_older(pointer: Pointer, ledger: Ledger) -> bool:
    """Is it a pointer of long ago? A killed writer leaves one open move; nobody leaves two."""
    return len(open_moves(pointer, ledger)) > 1


def contradicts(pointer: Pointer, ledger: Ledger) -> bool:
    """Does the ledger's entry of that number say something else?"""
    if not 0 < pointer.entry <= len(ledger.entries):
        return False
    entry = ledger.entries[pointer.entry - 1]
    return (entry.sha256, entry.release) != (pointer.entry_sha256, pointer.release)
