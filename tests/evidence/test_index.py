import json
import shutil
import threading

import numpy as np
import pytest

from bem.errors import DataError, MissingExtra
from bem.evidence import dense, storage
from bem.evidence.encoders import PooledStates
from bem.evidence.index import ENTRIES, Hit, build, in_memory, open_index
from bem.evidence.passages import Passage, corpus_hash
from bem.files import locked

PASSAGES = [
    Passage("cat", "The cat sat on the mat."),
    Passage("dog", "A dog chased the cat."),
    Passage("ada", "wrote the first program", "Ada Lovelace"),
    Passage("han", "東京は日本の首都である"),
    Passage("rus", "Москва — столица России 🌍"),
]


@pytest.fixture(scope="session")
def encoder(micro_base):
    return PooledStates(str(micro_base))


def ids(hits: list[Hit]) -> list[str]:
    return [hit.passage.id for hit in hits]


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def generation(folder):
    return folder / manifest(folder)["generation"]


# --- search ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_each_method_finds_its_passages(where, tmp_path, encoder):
    index = (
        in_memory(PASSAGES, encoder) if where == "memory" else build(PASSAGES, tmp_path, encoder)
    )
    assert len(index) == 5 and list(index.passages) == PASSAGES
    assert index.corpus_hash == corpus_hash(PASSAGES)
    cats, ada, capital = index.search(["cats", "Who is Ada Lovelace?", "столица"])
    assert ids(cats) == ["dog", "cat"] or ids(cats) == ["cat", "dog"]
    assert ids(ada) == ["ada"] and ids(capital) == ["rus"]
    assert all(hit.score == hit.lexical > 0 for hit in cats)
    near = index.search([PASSAGES[2].shown], k=5, method="dense")[0]
    assert ids(near)[0] == "ada" and near[0].score == pytest.approx(1, abs=1e-5)
    assert sorted(ids(near)) == sorted(p.id for p in PASSAGES)
    both = index.search([PASSAGES[2].shown], k=2, method="hybrid")[0]
    assert ids(both)[0] == "ada" and len(both) == 2
    assert both[0].score == pytest.approx(2 / 61)


def test_a_hit_carries_its_lexical_score_whatever_the_method(encoder):
    index = in_memory(PASSAGES, encoder)
    lexical = {h.passage.id: h.score for h in index.search(["the cat"])[0]}
    for hit in index.search(["the cat"], k=5, method="dense")[0]:
        assert hit.lexical == lexical.get(hit.passage.id, 0.0)


def test_a_query_in_a_language_of_no_passage(encoder):
    index = in_memory(PASSAGES[:3], encoder)
    question = "Где находится библиотека?"
    assert index.search([question], method="bm25") == [[]]
    assert len(index.search([question], k=3, method="dense")[0]) == 3
    assert len(index.search([question], k=3, method="hybrid")[0]) == 3


def test_scripts_without_spaces_are_searchable():
    assert ids(in_memory(PASSAGES).search(["日本の首都"])[0]) == ["han"]


def test_one_passage(tmp_path, encoder):
    index = build([PASSAGES[0]], tmp_path, encoder)
    for method in ("bm25", "dense", "hybrid"):
        assert ids(index.search(["cat"], method=method)[0]) == ["cat"]


def test_ten_megabytes_in_one_passage(tmp_path, encoder):
    long = Passage("long", "hay " * 2_500_000 + "needle")
    index = build([PASSAGES[0], long], tmp_path, encoder)
    assert ids(index.search(["needle"])[0]) == ["long"]
    assert index.passages[1] == long


def test_texts_that_are_shown_alike_are_indexed_once(tmp_path):
    copies = [Passage("a", "one cat"), Passage("b", "two cats"), Passage("c", "one cat")]
    index = build(copies, tmp_path)
    assert [p.id for p in index.passages] == ["a", "b"]
    assert sorted(ids(index.search(["cat"])[0])) == ["a", "b"]
    assert (manifest(tmp_path)["passages"], manifest(tmp_path)["copies"]) == (2, 1)
    assert index.corpus_hash == corpus_hash(copies)  # of what was given


def test_stored_passages_are_a_sequence_and_keep_every_character(tmp_path):
    odd = Passage("o", 'line\nbreak "quote" \x00 \ud800 🌍', "tab\t")
    stored = build([*PASSAGES, odd], tmp_path).passages
    assert stored[-1] == odd and stored[1:3] == PASSAGES[1:3]
    with pytest.raises(IndexError):
        stored[6]


def test_ties_come_in_the_order_of_the_corpus():
    same_length = [Passage(str(i), f"cat w{i}") for i in range(20)]
    assert ids(in_memory(same_length).search(["cat"], k=5)[0]) == ["0", "1", "2", "3", "4"]


def test_impossible_requests_are_refused(encoder):
    index = in_memory(PASSAGES)
    with pytest.raises(DataError, match="list of queries"):
        index.search("cat")
    with pytest.raises(DataError, match="k must be >= 1"):
        index.search(["cat"], k=0)
    with pytest.raises(DataError, match="holds no vectors"):
        index.search(["cat"], method="dense")
    with pytest.raises(DataError, match="no passages"):
        in_memory([])
    with pytest.raises(DataError, match="Two different passages have the id 'a'"):
        in_memory([Passage("a", "x"), Passage("a", "y")])
    assert index.search([]) == []


def test_an_empty_corpus_leaves_the_index_as_it_was(tmp_path):
    build(PASSAGES, tmp_path)
    with pytest.raises(DataError, match="no passages"):
        build([], tmp_path)
    assert len(open_index(tmp_path)) == 5


# --- on disk --------------------------------------------------------------------------------------


def test_opened_again_it_answers_the_same_and_finds_its_own_encoder(tmp_path, encoder):
    built = build(PASSAGES, tmp_path, encoder)
    opened = open_index(tmp_path)
    for method in ("bm25", "dense", "hybrid"):
        assert opened.search(["the cat"], method=method) == built.search(["the cat"], method=method)


def test_while_it_is_rebuilt_readers_and_new_queries_see_the_old_one(tmp_path, encoder):
    reader = build(PASSAGES[:2], tmp_path)
    during = {}

    def look(stage, done, total):
        during[stage] = ids(open_index(tmp_path).search(["program cat"])[0])

    build(PASSAGES, tmp_path, encoder, on_progress=look)
    assert set(during) == {"words", "encoding", "checksums"}
    assert all("ada" not in found for stage, found in during.items() if stage != "checksums")
    assert "ada" in ids(open_index(tmp_path).search(["program"])[0])
    assert len(reader) == 2 and ids(reader.search(["dog"])[0]) == ["dog"]  # still its own
    assert len(list(tmp_path.glob("g-*"))) == 1


def test_queries_in_other_threads_never_fail_during_rebuilds(tmp_path):
    build(PASSAGES, tmp_path)
    stop, failures = threading.Event(), []

    def read():
        while not stop.is_set():
            try:
                assert "cat" in ids(open_index(tmp_path).search(["cat"])[0])
            except Exception as error:
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for size in (2, 3, 4, 5, 3):
        build(PASSAGES[:size], tmp_path)
    stop.set()
    reader.join()
    assert not failures


@pytest.mark.parametrize("stage", ["words", "encoding", "checksums"])
def test_an_interrupted_build_is_no_index_and_goes_on(tmp_path, encoder, monkeypatch, stage):
    def stop(name, done, total):
        if name == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(PASSAGES, tmp_path, encoder, on_progress=stop)
    with pytest.raises(DataError, match=r"no index: it has no manifest\.json"):
        open_index(tmp_path)
    heard = []
    index = build(PASSAGES, tmp_path, encoder, on_progress=lambda name, *_: heard.append(name))
    assert index.search(["cat"], method="hybrid")[0]
    expected = {"words": {"words", "encoding"}, "encoding": {"encoding"}, "checksums": set()}
    assert set(heard) == {*expected[stage], "checksums"}  # nothing that was finished is done again


def test_building_the_same_again_does_nothing_anew(tmp_path, encoder):
    build(PASSAGES, tmp_path, encoder)
    before = manifest(tmp_path)
    heard = []
    build(PASSAGES, tmp_path, encoder, on_progress=lambda name, *_: heard.append(name))
    assert set(heard) == {"checksums"} and manifest(tmp_path) == before


def test_two_builds_in_one_folder_are_one_too_many(tmp_path):
    with locked(tmp_path / ".lock"), pytest.raises(DataError, match="Another build is working"):
        build(PASSAGES, tmp_path)


@pytest.mark.parametrize("layer", [None, 1], ids=["no encoder", "another encoder"])
def test_vectors_are_not_deleted_unasked(tmp_path, encoder, micro_base, layer):
    build(PASSAGES, tmp_path, encoder)
    before = manifest(tmp_path)
    other = None if layer is None else PooledStates(str(micro_base), layer=layer)
    for passages in (PASSAGES, PASSAGES[:3]):
        with pytest.raises(DataError, match=f"holds vectors by encoder {encoder.name};.*--force"):
            build(passages, tmp_path, other)
    assert manifest(tmp_path) == before and open_index(tmp_path, encoder).search(
        ["cat"], 1, "dense"
    )
    build(PASSAGES[:3], tmp_path, encoder)  # another corpus, the same encoder: the usual rebuild
    build(PASSAGES, tmp_path, other, force=True)
    after = manifest(tmp_path)["encoder"]
    assert after is None if other is None else after["name"] == other.name


def test_vectors_of_an_unfinished_build_are_not_deleted_unasked(tmp_path, encoder):
    def stop(name, done, total):
        if name == "checksums":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(PASSAGES, tmp_path, encoder, on_progress=stop)
    with pytest.raises(DataError, match=r"vectors of a build that is not finished.*--force"):
        build(PASSAGES, tmp_path)
    build(PASSAGES, tmp_path, force=True)
    assert len(list(tmp_path.glob("g-*"))) == 1


def test_a_build_deletes_nothing_that_it_has_not_written(tmp_path, encoder):
    build(PASSAGES[:2], tmp_path, encoder)
    theirs = ["notes.txt", "g-photos/one.jpg", "g-0123456789abcdeg/x", "deep/er/file", ".hidden"]
    inside = [f"{generation(tmp_path).name}/thesis.tex"]
    for name in (*theirs, *inside):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    build(PASSAGES, tmp_path, encoder)
    assert [(tmp_path / name).read_text() for name in (*theirs, *inside)] == [*theirs, *inside]
    left = {p.name for p in (tmp_path / inside[0]).parent.iterdir()}
    assert left == {"thesis.tex"}  # what the build had written there is gone


@pytest.mark.parametrize("content", ['{"format": "bem-adapter-1"}', "[1]", '"x"', "{broken", "{}"])
def test_a_manifest_of_something_else_is_not_written_over(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(
        DataError, match=r"is not the manifest of an index\. Give the index a folder"
    ):
        build(PASSAGES, tmp_path)
    assert (tmp_path / "manifest.json").read_text() == content


def test_a_damaged_manifest_of_an_index_can_be_built_again(tmp_path):
    build(PASSAGES, tmp_path)
    (tmp_path / "manifest.json").write_text("{broken")
    assert build(PASSAGES, tmp_path).search(["cat"])[0]
    (tmp_path / "manifest.json").write_text('{"format": "bem-index-0"}')
    assert build(PASSAGES, tmp_path).search(["cat"])[0]


def test_a_file_cannot_hold_an_index(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="file cannot hold an index"):
        build(PASSAGES, tmp_path / "file")


def test_a_generation_holds_nothing_but_what_a_build_deletes_again(tmp_path, encoder, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(dense, "FAISS_FROM", 5)
    build(PASSAGES, tmp_path, encoder)
    assert {path.name for path in generation(tmp_path).iterdir()} <= set(ENTRIES)


def test_a_damaged_index_is_refused_with_the_reason_and_can_be_built_again(tmp_path, encoder):
    build(PASSAGES, tmp_path / "good", encoder)
    names = [*manifest(tmp_path / "good")["files"]]
    assert "vectors.npy" in names and "passages.jsonl" in names and len(names) >= 8
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", folder)
        path = generation(folder) / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(DataError, match="sha256 differs"):
            open_index(folder)
        path.write_bytes(content + b"x")
        with pytest.raises(DataError, match=f"has {len(content) + 1:,} bytes, the manifest says"):
            open_index(folder, checksums=False)
        path.unlink()
        with pytest.raises(DataError, match="is missing"):
            open_index(folder)
    assert build(PASSAGES, folder, encoder).search(["cat"], method="hybrid")[0]


def test_a_foreign_folder_is_refused_with_the_reason(tmp_path, encoder):
    with pytest.raises(DataError, match=r"bem index build CORPUS\.jsonl --out"):
        open_index(tmp_path / "absent")
    (tmp_path / "manifest.json").write_text("{broken")
    with pytest.raises(DataError, match="is damaged"):
        open_index(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "other-2"}')
    with pytest.raises(DataError, match="format 'other-2', this version reads 'bem-index-1'"):
        open_index(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "bem-index-1", "encoder": null}')
    with pytest.raises(DataError, match="is damaged"):
        open_index(tmp_path)


def test_parts_of_two_indexes_do_not_make_one(tmp_path):
    build(PASSAGES, tmp_path / "a")
    build(PASSAGES[:3], tmp_path / "b")
    ours, theirs = generation(tmp_path / "a"), generation(tmp_path / "b")
    for name in (storage.PASSAGES, storage.OFFSETS):
        shutil.copy(theirs / name, ours / name)
    values = manifest(tmp_path / "a") | {"files": storage.describe_files(ours)}
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="'passages': 3, 'bm25': 5"):
        open_index(tmp_path / "a")


def test_another_encoder_is_refused(tmp_path, encoder, micro_base):
    build(PASSAGES, tmp_path, encoder)
    other = PooledStates(str(micro_base), layer=1)
    with pytest.raises(DataError, match="cannot be compared"):
        open_index(tmp_path, other)


def test_vectors_that_are_nan_stop_the_build_and_name_the_passage(tmp_path, encoder, monkeypatch):
    good = encoder.encode

    def broken(texts, on_progress=None):
        vectors = good(texts)
        vectors[list(texts).index(PASSAGES[3].shown)] = np.nan
        return vectors

    monkeypatch.setattr(encoder, "encode", broken)
    with pytest.raises(DataError, match="passage 'han'"):
        build(PASSAGES, tmp_path, encoder)
    with pytest.raises(DataError, match="no index"):
        open_index(tmp_path)


def test_large_corpora_are_searched_through_faiss_unless_exact(tmp_path, encoder, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(dense, "FAISS_FROM", 5)
    graph = build(PASSAGES, tmp_path / "graph", encoder)
    exact = build(PASSAGES, tmp_path / "exact", encoder, exact=True)
    assert manifest(tmp_path / "graph")["search"] == "hnsw"
    assert manifest(tmp_path / "exact")["search"] == "exact"
    query = ["the cat"]
    assert ids(graph.search(query, 5, "dense")[0]) == ids(exact.search(query, 5, "dense")[0])
    monkeypatch.setattr(dense.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"bem\[retrieval\]"):
        build(PASSAGES, tmp_path / "third", encoder)
    with pytest.raises(MissingExtra, match=r"bem\[retrieval\]"):
        open_index(tmp_path / "graph")
