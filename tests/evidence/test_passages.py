import gzip
import json

import pytest

from bem.errors import DataError
from bem.evidence.passages import Passage, corpus_hash, read_corpus


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_plain_rows_with_and_without_title_and_id(tmp_path):
    path = write(
        tmp_path / "c.jsonl",
        {"id": "a", "title": "Ada", "text": "wrote a program"},
        "",
        {"text": "Привет, мир 🌍"},
    )
    first, second = read_corpus(path)
    assert first == Passage("a", "wrote a program", "Ada")
    assert first.shown == "Ada: wrote a program"
    assert second == Passage("3", "Привет, мир 🌍")  # named by its line
    assert second.shown == second.text


def test_gzip_reads_as_the_plain_file_does(tmp_path):
    plain = write(tmp_path / "c.jsonl", {"id": "a", "text": "x"})
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_corpus(packed) == read_corpus(plain)


def test_a_row_without_an_answer_has_its_input_as_title(tmp_path):
    row = {"id": "h0", "input": "Ed Wood", "references": [], "evidence": ["a film"]}
    assert read_corpus(write(tmp_path / "c.jsonl", row)) == [Passage("h0", "a film", "Ed Wood")]


def test_a_question_never_enters_the_corpus_with_its_evidence(tmp_path):
    row = {"id": "q", "input": "who?", "references": ["ada"], "evidence": ["one", "two"]}
    found = read_corpus(write(tmp_path / "c.jsonl", row))
    assert found == [Passage("q#0", "one"), Passage("q#1", "two")]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{broken", "c.jsonl:2: not JSON"),
        ("[1]", "c.jsonl:2: a row must be an object"),
        ({"id": True, "text": "x"}, "c.jsonl:2: id must be text or a number, got True"),
        ({"id": "b", "text": "  "}, "c.jsonl:2: the text is empty"),
        ({"id": "b", "text": 5}, "c.jsonl:2: text must be a string, got int"),
        ({"id": "b", "body": "x"}, "it has: id, body"),
        ({"id": "a", "text": "y"}, "id 'a' was already used in line 1"),
        ({"id": "b", "input": "t", "references": [], "evidence": ["x", "y"]}, "found 2"),
    ],
)
def test_a_row_that_is_not_usable_is_refused_with_file_and_line(tmp_path, row, said):
    path = write(tmp_path / "c.jsonl", {"id": "a", "text": "x"}, row)
    with pytest.raises(DataError, match=said):
        read_corpus(path)


def test_files_without_passages_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no passages"):
        read_corpus(write(tmp_path / "c.jsonl", ""))
    with pytest.raises(DataError, match=r"absent\.jsonl is missing"):
        read_corpus(tmp_path / "absent.jsonl")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}')[:-5])
    with pytest.raises(DataError, match=r"c\.jsonl\.gz:1: cannot be read"):
        read_corpus(tmp_path / "c.jsonl.gz")


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_only_a_newline_ends_a_passage(tmp_path, character):
    row = {"id": f"a{character}b", "text": f"one{character}two"}
    assert read_corpus(write(tmp_path / "c.jsonl", row)) == [Passage(row["id"], row["text"])]


def test_the_hash_knows_order_ids_and_where_a_field_ends():
    a, b = Passage("1", "text", "title"), Passage("2", "other")
    assert corpus_hash([a, b]) == corpus_hash((a, b))
    others = [[b, a], [a], [a, Passage("3", "other")], [Passage("1", "ttext", "itle"), b]]
    assert len({corpus_hash(corpus) for corpus in [[a, b], *others]}) == 5


def test_half_a_character_is_refused_with_its_line(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": "a", "text": "lone \\ud800 surrogate"}\n')
    with pytest.raises(DataError, match=r"corpus.jsonl:1: text holds half a character.*d800 at 5"):
        read_corpus(path)


def test_rows_with_an_id_of_null_are_named_by_their_line(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": null, "text": "a"}\n{"id": null, "text": "b"}\n')
    assert [p.id for p in read_corpus(path)] == ["1", "2"]
