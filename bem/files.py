"""Files that are whole or not there: the one place that writes, hashes, locks and reads lines.

Everything that BEM keeps goes through here, so that a kill, a full disk or a second process never
leaves half a file, and a reader never sees one.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gzip
import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bem.errors import BemError, DataError

RENAME_EXCHANGE = 2  # linux/fs.h


# --- writing ------------------------------------------------------------------------------------


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a whole file or nothing: to a neighbour, synced, then renamed into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        sync_folder(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """`write_text` of JSON with a newline at its end."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def whole_folder(
    folder: Path, ours: Callable[[Path], Iterable[str]], error: type[BemError]
) -> Iterator[Path]:
    """Write a folder whole or not at all: fill the one that is yielded, it is then put in place.

    Args:
        folder: target; made if missing. What stands there is replaced in one step.
        ours: of an existing folder, the names (relative, POSIX) that this library wrote.
        error: raised when the target holds anything else, or cannot be written.
    Raises:
        error: the target is a file, or holds entries that are not `ours`: nothing is deleted.
    """
    target = Path(folder).resolve()
    _refuse_foreign(target, ours, error)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as failed:
        raise error(f"could not write {folder}: {failed}. Nothing was changed.") from failed
    try:
        yield work
        _usual_rights(work)
        _sync_tree(work)
        _put_in_place(work, target)
    except OSError as failed:
        raise error(f"could not write {folder}: {failed}. What was there is whole.") from failed
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _refuse_foreign(
    target: Path, ours: Callable[[Path], Iterable[str]], error: type[BemError]
) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise error(f"{target} is a file: name a folder.")
    present = {p.relative_to(target).as_posix() for p in target.rglob("*") if not p.is_dir()}
    present |= {  # an empty folder is somebody's too
        p.relative_to(target).as_posix()
        for p in target.rglob("*")
        if p.is_dir() and not any(p.iterdir())
    }
    if foreign := sorted(present - set(ours(target))) if present else []:
        raise error(
            f"{target} holds {len(foreign)} entries that were not written here, as {foreign[0]!r}: saving "
            "would replace them. Name a new folder, or move them away."
        )


def _put_in_place(work: Path, target: Path) -> None:
    if not target.exists():
        os.rename(work, target)
    elif not any(target.iterdir()):  # it may be somebody's working directory: it stays the same one
        for item in sorted(work.iterdir()):
            os.rename(item, target / item.name)
    else:
        here = Path.cwd()
        _exchange(work, target)  # `work` then is the old one, which the caller deletes
        if here == target:
            os.chdir(target)  # out of the old one
    sync_folder(target.parent)


def _exchange(one: Path, other: Path) -> None:
    """Swap two folders: in one step where the kernel can, else by three renames."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = (os.fsencode(one), os.fsencode(other))
    if renameat2 and renameat2(-100, names[0], -100, names[1], RENAME_EXCHANGE) == 0:
        return
    aside = one.with_name(one.name + ".old")
    os.rename(other, aside)
    try:
        os.rename(one, other)
    except OSError:
        os.rename(aside, other)
        raise
    os.rename(aside, one)


def _usual_rights(folder: Path) -> None:
    """Those of new files: mkdtemp and safetensors write for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _sync_tree(folder: Path) -> None:
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        with open(path, "rb") as file:
            os.fsync(file.fileno())


# --- locks --------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: Path, busy: BemError | None = None, wait: Callable[[], None] | None = None):
    """Hold an exclusive lock on a file, made if missing; it goes with the process that holds it.

    Args:
        busy: raised when somebody else holds it; None: wait for it.
        wait: called about once a second while waiting.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if busy is not None:
                    raise busy from None
                if wait is not None:
                    wait()
                time.sleep(0.2 if wait is None else 1.0)
        yield


# --- digests ------------------------------------------------------------------------------------


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_listed(folder: Path, listed: dict[str, str], error: type[BemError]) -> None:
    """Every listed file is there with its sha256; `error` names the first that is not."""
    for name, digest in listed.items():
        if not (folder / name).is_file():
            raise error(f"{folder}: {name} is missing.")
        if (actual := sha256_file(folder / name)) != digest:
            raise error(
                f"{folder}: {name} was changed after saving (sha256 {actual[:12]}, manifest says {digest[:12]})."
            )


# --- reading ------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """UTF-8 text, with or without a byte order mark, plain or .gz.

    Raises:
        DataError: missing, unreadable, damaged or not UTF-8; names the file.
    """
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        return raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} is missing.") from None
    except UnicodeDecodeError as failed:
        raise DataError(f"{path} is not UTF-8 text: {failed}.") from None
    except (OSError, EOFError, zlib.error) as failed:
        raise DataError(f"{path} cannot be read: {failed}.") from None


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every line of a JSON Lines file; blank lines are skipped.

    Lines end at a newline alone: U+2028, U+2029 and U+0085 are text, which `str.splitlines` forgets.

    Raises:
        DataError: not readable, or a line that is not JSON; names file and line.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (json.JSONDecodeError, RecursionError, ValueError) as failed:
                raise DataError(f"{path}:{number}: not JSON: {failed}.") from None


def read_json(path: Path, error: type[BemError] = DataError) -> Any:
    """A JSON file; `error` if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} is missing.") from None
    except (ValueError, RecursionError, OSError) as failed:
        raise error(f"{path} is not valid JSON: {failed}.") from None
