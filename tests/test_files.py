"""Lines are read as written, and what has its name is whole."""

import gzip
import json

import pytest

from bem.errors import DataError
from bem.files import json_lines, whole


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_lines_end_at_line_feeds_and_carriage_returns_alone(tmp_path, character, ending):
    line = json.dumps({"a": f"x{character}y"}, ensure_ascii=False)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ending.join([line, "", "  ", line]).encode())
    assert list(json_lines(path)) == [(1, {"a": f"x{character}y"}), (4, {"a": f"x{character}y"})]


def test_a_byte_order_mark_and_gzip_are_seen_in_the_content(tmp_path):
    for name in ("a.jsonl", "a.jsonl.gz"):
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf[1]\n")
        assert list(json_lines(path)) == [(1, [1])]
        path.write_bytes(gzip.compress(b"\xef\xbb\xbf[1]\n"))
        assert list(json_lines(path)) == [(1, [1])]


def test_lines_are_read_one_by_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{broken\n')
    lines = json_lines(path)
    assert next(lines) == (1, {"a": 1})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: not JSON"):
        next(lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]\n\xff\n", r"rows\.jsonl:\d: is not UTF-8 text"),
        (gzip.compress(b"[1]\n" * 999)[:-9], r"rows\.jsonl:\d+: cannot be read"),
        (b"[" * 100_000, r"rows\.jsonl:1: not JSON"),
        (b"1" * 5000, r"rows\.jsonl:1: not JSON"),
        (b"[1]\x00", r"rows\.jsonl:1: not JSON"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(json_lines(path))


def test_a_missing_file_and_a_folder_are_data_errors(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl is missing"):
        list(json_lines(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="cannot be read"):
        list(json_lines(tmp_path))


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
