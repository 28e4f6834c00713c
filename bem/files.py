"""Files that are whole or not there: the one place that writes, hashes, locks and reads lines.

Everything that BEM keeps goes through here, so that a kill, a full disk or a second process never
leaves half a file, and a reader never sees one.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import errno
import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from bem.errors import BemError, DataError

RENAME_EXCHANGE = 2  # linux/fs.h
LINE_END = re.compile(r"\r\n|\n|\r")


# --- writing ------------------------------------------------------------------------------------


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a whole file or nothing: to a neighbour, synced, then renamed into place.

    A link stays, what it names is replaced; a device or a pipe is written to, as it cannot be replaced.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "This is a folder, name a file", str(path))
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    path = path.resolve()
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


def is_draft(name: str, path: Path) -> bool:
    """Is this what `write_bytes` left beside a file when it was killed?"""
    return name.startswith(f".{path.name}.") and name.endswith(".draft")


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """`write_text` of JSON with a newline at its end."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Write a large file or a new folder piece by piece: the draft gets the name once it is complete.

    The draft, NAME.part, stays after a failure and is begun anew by the next call; one writer at a time.
    """
    draft = path.with_name(path.name + ".part")
    if draft.is_dir():
        shutil.rmtree(draft)
    yield draft
    _sync_tree(draft)
    draft.replace(path)
    sync_folder(path.parent)


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
    try:
        target = Path(folder).resolve()
        _refuse_foreign(target, ours, error)
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except (OSError, ValueError) as failed:  # ValueError: a NUL in the name
        raise error(f"could not write {str(folder)!r}: {failed}. Nothing was changed.") from failed
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
    if foreign := _foreign(target, target, set(ours(target))):
        raise error(
            f"{target} holds {len(foreign)} entries that were not written here, as {foreign[0]!r}: saving "
            "would replace them. Name a new folder, or move them away."
        )


def _foreign(folder: Path, target: Path, ours: set[str]) -> list[str]:
    """Entries that are not ours; a folder that holds nothing of ours is one entry."""
    found = []
    for entry in sorted(folder.iterdir()):
        name = entry.relative_to(target).as_posix()
        if entry.is_dir() and any(own.startswith(f"{name}/") for own in ours):
            found += _foreign(entry, target, ours)
        elif name not in ours or entry.is_dir():
            found.append(name)
    return found


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


def _sync_tree(path: Path) -> None:
    """Every file of a folder, or one file."""
    for part in [p for p in (path, *path.rglob("*")) if p.is_file()]:
        with open(part, "rb") as file:
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


def check_listed(folder: Path, listed: Any, error: type[BemError]) -> None:
    """Every listed file (name -> sha256) is there as it was; `error` names the first that is not."""
    if not isinstance(listed, dict) or not all(isinstance(d, str) for d in listed.values()):
        raise error(f"{folder}: its manifest lists no files with their sha256.")
    for name, digest in listed.items():
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise error(f"{folder}: its manifest lists {name!r}, which lies outside.")
        if not (folder / name).is_file():
            raise error(f"{folder}: {name} is missing.")
        if (actual := sha256_file(folder / name)) != digest:
            raise error(
                f"{folder}: {name} was changed after saving (sha256 {actual[:12]}, manifest says {digest[:12]})."
            )


# --- reading ------------------------------------------------------------------------------------


MARKS = {  # byte order marks; the longer ones first: UTF-32's begins as UTF-16's does
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
NOT_TEXT = {
    b"PK\x03\x04": "an Excel workbook or a zip archive",
    b"PAR1": "a Parquet file",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
}


def read_text(path: Path) -> str:
    """Text in UTF-8, or as its byte order mark says (UTF-16, UTF-32); plain or gzipped.

    Raises:
        DataError: missing, unreadable, damaged, or not text; names the file and the line.
    """
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except FileNotFoundError:
        raise DataError(f"{path} is missing.") from None
    except (OSError, EOFError, zlib.error, ValueError) as failed:
        reason = getattr(failed, "strerror", None) or failed
        raise DataError(f"{path} cannot be read: {reason}.") from None
    return _decoded(raw, path)


def _encoding(start: bytes) -> str:
    return next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8-sig")


def _decoded(raw: bytes, path: Path) -> str:
    for magic, kind in NOT_TEXT.items():
        if raw.startswith(magic):
            raise DataError(f"{path} is {kind}, not text. Export it as CSV or JSON Lines in UTF-8.")
    encoding = _encoding(raw[:4])
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as failed:
        line = raw.count(b"\n", 0, failed.start) + 1
        raise DataError(
            f"{path}:{line} is not {encoding.upper().removesuffix('-SIG')} text (byte "
            f"0x{raw[failed.start]:02x}). Save it as UTF-8."
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}:{line} holds a NUL character: this is no text. Save it as UTF-8.")
    return text


def parse_json(text: str, where: str) -> Any:
    """A JSON value.

    Raises:
        DataError: not JSON, nested too deeply, or an object in which a key stands twice (the last would
            win silently); names `where`.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except DataError as failed:
        raise DataError(f"{where}: {failed}") from None
    except (ValueError, RecursionError) as failed:
        raise DataError(f"{where}: not JSON: {failed}.") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise DataError(f"key {twice!r} stands twice in one object.")
    return values


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every line of a JSON Lines file, plain or gzipped; blank lines are skipped.

    Lines end at LF, CR LF or CR: U+2028, U+2029 and U+0085 are text, which `str.splitlines` forgets.
    One line is held at a time.

    Raises:
        DataError: missing, unreadable, damaged, not text, or a line that is not JSON; names the line.
    """
    number = 0
    try:
        with _open_text(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, parse_json(line, f"{path}:{number}")
    except FileNotFoundError:
        raise DataError(f"{path} is missing.") from None
    except UnicodeError as failed:
        raise DataError(f"{path}:{number + 1}: is not UTF-8 text: {failed}.") from None
    except (OSError, EOFError, zlib.error, ValueError) as failed:
        reason = getattr(failed, "strerror", None) or failed
        raise DataError(f"{path}:{number + 1}: cannot be read: {reason}.") from None


def _open_text(path: Path) -> IO[str]:
    with open(path, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    opened = gzip.open if packed else open
    with opened(path, "rb") as start:
        encoding = _encoding(start.read(4))
    return opened(path, "rt", encoding=encoding)


def parse_json_lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """`json_lines` of text that was read already; `path` is what messages name."""
    for number, line in enumerate(LINE_END.split(text), 1):
        if line.strip():
            yield number, parse_json(line, f"{path}:{number}")


def read_json(path: Path, error: type[BemError] = DataError) -> Any:
    """A JSON file; `error` if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} is missing.") from None
    except (ValueError, RecursionError, OSError) as failed:
        raise error(f"{path} is not valid JSON: {failed}.") from None


def made_under(mark: Path, key: str) -> bool:
    """Does a mark say that something was finished under this key? One that is missing or broken says
    nothing: the work is done again."""
    try:
        content = read_json(mark)
    except DataError:
        return False
    return isinstance(content, dict) and content.get("key") == key
