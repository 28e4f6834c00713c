import codecs
import gzip
import os
import threading
from pathlib import Path

import pytest

from bem.errors import DataError
from bem.files import json_lines, parse_json, read_text, whole, write_bytes


def written(folder, content, name="rows.jsonl"):
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        "é\n".encode(),
        codecs.BOM_UTF8 + "é\n".encode(),
        "é\n".encode("utf-16"),
        codecs.BOM_UTF16_BE + "é\n".encode("utf-16-be"),
        "é\n".encode("utf-32"),
        gzip.compress("é\n".encode(), mtime=0),
        gzip.compress("é\n".encode("utf-16"), mtime=0),
    ],
)
def test_text_is_read_as_its_mark_says_plain_or_packed(tmp_path, content):
    assert read_text(written(tmp_path, content)) == "é\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "a\né".encode("latin-1"),
            r"rows.jsonl:2 is not UTF-8 text \(byte 0xe9\). Save it as UTF-8",
        ),
        (codecs.BOM_UTF8 + b"\n\n\xff", r"rows.jsonl:3 is not UTF-8 text"),
        (codecs.BOM_UTF16_LE + b"a", "is not UTF-16 text"),
        ("ab".encode("utf-16-le"), "rows.jsonl:1 holds a NUL character"),
        (b"PK\x03\x04", "is an Excel workbook or a zip archive, not text"),
        (b"BZh91AY", "compressed by bzip2"),
        (b"\x1f\x8b\x08", "rows.jsonl cannot be read"),
        (gzip.compress(b"abc" * 100, mtime=0)[:-6], "rows.jsonl cannot be read"),
        (gzip.compress(b"abc", mtime=0)[:-8] + b"12345678", "rows.jsonl cannot be read"),
    ],
)
def test_what_is_no_text_is_refused_with_file_and_line(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read_text(written(tmp_path, content))


def test_a_folder_and_a_file_that_is_missing_are_named(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path} cannot be read: Is a directory"):
        read_text(tmp_path)
    with pytest.raises(DataError, match="nothing is missing"):
        read_text(tmp_path / "nothing")
    with pytest.raises(DataError, match="cannot be read"):
        read_text(tmp_path / "a\0b")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_at_line_ends_and_not_at_separators_of_unicode(tmp_path, end):
    text = end.join(['{"a": "b\u2028c\u2029d\x85e"}', "", ' {"a": 2} ', ""])
    rows = list(json_lines(written(tmp_path, text.encode())))
    assert rows == [(1, {"a": "b\u2028c\u2029d\x85e"}), (3, {"a": 2})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": ', "rows.jsonl:2: not JSON"),
        ("[" * 100_000, "rows.jsonl:2: not JSON"),
        ("1" * 5000, "rows.jsonl:2: not JSON"),
        ('{"a": {"b": 1, "b": 2}}', "rows.jsonl:2: key 'b' stands twice in one object"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, line, message):
    path = written(tmp_path, f"{{}}\n{line}\n".encode())
    with pytest.raises(DataError, match=message):
        list(json_lines(path))


def test_a_json_text_names_where_it_came_from():
    assert parse_json('{"a": [1]}', "here") == {"a": [1]}
    with pytest.raises(DataError, match="here: not JSON"):
        parse_json("", "here")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_lines_are_read_as_their_mark_says_plain_or_packed(tmp_path, encoding, pack):
    path = written(tmp_path, pack('{"a": "é"}\n[1]\n'.encode(encoding)))
    assert list(json_lines(path)) == [(1, {"a": "é"}), (2, [1])]


@pytest.mark.parametrize(
    "content",
    [b"[1]\n\xff", b"\x1f\x8b\x08", gzip.compress(b"[1]\n" * 999, mtime=0)[:-9], b"\xff\xfea"],
)
def test_lines_that_cannot_be_read_are_named(tmp_path, content):
    with pytest.raises(DataError, match=r"rows.jsonl:\d+: (is not UTF-8 text|cannot be read)"):
        list(json_lines(written(tmp_path, content)))
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        list(json_lines(tmp_path))
    with pytest.raises(DataError, match=r"none.jsonl is missing"):
        list(json_lines(tmp_path / "none.jsonl"))


def test_lines_are_read_one_by_one(tmp_path):
    lines = json_lines(written(tmp_path, b'{"a": 1}\n{broken\n'))
    assert next(lines) == (1, {"a": 1})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not JSON"):
        next(lines)


def test_a_file_or_folder_gets_its_name_when_it_is_whole(tmp_path):
    with whole(tmp_path / "file") as draft:
        draft.write_text("x")
        assert not (tmp_path / "file").exists()
    with whole(tmp_path / "folder") as draft:
        draft.mkdir()
        (draft / "part").write_text("y")
    assert (tmp_path / "file").read_text() == "x" and (tmp_path / "folder/part").read_text() == "y"
    with pytest.raises(IsADirectoryError), whole(tmp_path / "file") as draft:
        draft.write_text("half") and tmp_path.write_text("killed")
    assert (tmp_path / "file").read_text() == "x"


def test_what_cannot_be_replaced_is_written_to_and_a_link_stays_one(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_bytes(pipe, b"abc")
    reader.join(timeout=10)
    assert read == [b"abc"] and pipe.is_fifo()
    (tmp_path / "link").symlink_to("target")
    for content in (b"first", b"second"):
        write_bytes(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "pipe", "target"]


@pytest.mark.parametrize("path", [".", "", "/"])
def test_a_folder_is_no_file_to_write(path):
    with pytest.raises(IsADirectoryError):
        write_bytes(Path(path), b"")
