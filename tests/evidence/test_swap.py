import pytest

from bem.errors import DataError
from bem.evidence.index import in_memory
from bem.evidence.passages import Passage
from bem.evidence.swap import corrupted, sentences, shuffled, swapped

PASSAGES = [
    Passage(f"p{i}", " ".join(f"Passage {i} says {word}." for word in "abcd"), f"Title {i}")
    for i in range(20)
]


def own(passage: Passage) -> int:
    """Sentences of a passage that it has from the start."""
    number = passage.id.removeprefix("p")
    return sum(f"Passage {number} " in part for part in sentences(passage.text))


def test_shuffled_passages_keep_their_ids_and_none_keeps_its_text():
    result = shuffled(PASSAGES)
    assert [p.id for p in result] == [p.id for p in PASSAGES]
    assert not any(a.text == b.text for a, b in zip(result, PASSAGES, strict=True))
    assert {p.shown for p in result} == {p.shown for p in PASSAGES}


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_few_passages_are_shuffled_too(n, seed):
    result = shuffled(PASSAGES[:n], seed)
    assert not any(a.text == b.text for a, b in zip(result, PASSAGES[:n], strict=True))


@pytest.mark.parametrize(("share", "kept"), [(0.0, 4), (0.25, 3), (0.5, 2), (1.0, 0)])
def test_corrupted_passages_lose_their_share_of_sentences(share, kept):
    result = corrupted(PASSAGES, share)
    assert [(p.id, p.title) for p in result] == [(p.id, p.title) for p in PASSAGES]
    assert [own(p) for p in result] == [kept] * 20
    assert [len(sentences(p.text)) for p in result] == [4] * 20


def test_of_passages_with_one_sentence_that_share_is_replaced():
    passages = [Passage(str(i), f"text {i}") for i in range(2000)]
    pairs = zip(corrupted(passages, 0.3), passages, strict=True)
    lost = sum(a.text != b.text for a, b in pairs)
    assert lost / 2000 == pytest.approx(0.3, abs=0.04)


def test_the_same_seed_gives_the_same_passages():
    assert corrupted(PASSAGES, seed=3) == corrupted(PASSAGES, seed=3) != corrupted(PASSAGES)
    assert shuffled(PASSAGES, seed=3) == shuffled(PASSAGES, seed=3) != shuffled(PASSAGES)


@pytest.mark.parametrize("text", ["One. Two!  Three?\nFour", "3.5 m. x", "一。二。", "", " \n"])
def test_sentences_join_to_the_text(text):
    assert "".join(sentences(text)) == text


def test_a_single_passage_cannot_be_swapped():
    with pytest.raises(DataError, match="need 2"):
        shuffled(PASSAGES[:1])
    with pytest.raises(DataError, match="need 2"):
        corrupted([])


def test_a_share_beyond_one_is_refused():
    with pytest.raises(ValueError, match="share"):
        corrupted(PASSAGES, 1.5)


def test_a_swapped_index_finds_as_before_and_shows_the_other_corpus():
    index = in_memory(PASSAGES)
    worse = swapped(index, shuffled(PASSAGES))
    clean, hits = index.search(["passage 7"])[0], worse.search(["passage 7"])[0]
    assert [(h.passage.id, h.score) for h in hits] == [(h.passage.id, h.score) for h in clean]
    shown = {p.id: p for p in shuffled(PASSAGES)}
    assert [h.passage for h in hits] == [shown[h.passage.id] for h in clean]
    for hit in hits:  # BM25 of what the id now says
        scored = in_memory(shuffled(PASSAGES)).search(["passage 7"], len(PASSAGES))[0]
        wanted = {h.passage.id: h.lexical for h in scored}
        assert hit.lexical == pytest.approx(wanted[hit.passage.id])
    assert worse.idf("7") == index.idf("7") and worse.tokens("Passages") == ["passag"]


def test_the_clean_corpus_through_a_swap_is_the_index_itself():
    index = in_memory(PASSAGES)
    assert swapped(index, PASSAGES).search(["passage 7"], 5) == index.search(["passage 7"], 5)


def test_rebuilding_an_index_over_shuffled_passages_would_prove_nothing():
    rebuilt = in_memory(shuffled(PASSAGES)).search(["passage 7"], 1)[0][0]
    assert rebuilt.passage.shown == in_memory(PASSAGES).search(["passage 7"], 1)[0][0].passage.shown


def test_every_passage_of_the_index_needs_a_replacement():
    with pytest.raises(DataError, match="p19"):
        swapped(in_memory(PASSAGES), PASSAGES[:19])
