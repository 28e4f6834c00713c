from time import monotonic, sleep

import numpy as np
import pytest

from bem.errors import DataError
from bem.evidence.index import in_memory
from bem.evidence.passages import Passage
from bem.evidence.rerank import load_reranker
from bem.evidence.retriever import Retriever, idf_among
from bem.evidence.swap import shuffled, swapped

PASSAGES = [
    Passage("sea", "The sea is blue and the sea is deep."),
    Passage("moon", "The moon is far from the sea."),
    Passage("tide", "The tide of the sea follows the moon."),
    Passage("fish", "Fish swim in the deep."),
    *(Passage(f"filler {i}", f"Entry {i} of the list.") for i in range(10)),
]
INDEX = in_memory(PASSAGES)
QUERY = "what does the tide of the sea follow"


class ByTable:
    """Reads its logits off a table: what the retriever does with them is under test."""

    name = "table"

    def __init__(self, logits, seconds=0.0):
        self.table, self.seconds, self.seen = logits, seconds, []

    def logits(self, query, passages, lexical=None, deadline=None):
        self.seen.append((query, list(passages), lexical))
        until = monotonic() + self.seconds
        while monotonic() < until:
            if deadline is not None and monotonic() > deadline:
                return None
            sleep(0.001)
        return np.array([self.table.get(p, -5.0) for p in passages], np.float32)


LIKES_TIDE = {PASSAGES[2].text: 4.0, PASSAGES[1].text: 1.0}


def test_the_reranker_decides_the_order_and_the_record_describes_it():
    reranker = ByTable(LIKES_TIDE)
    evidence = Retriever(INDEX, reranker, shown=2).retrieve("deep sea and moon")
    assert [p.id for p in evidence.passages] == ["tide", "moon"]
    record = evidence.record
    assert record.sources == ("tide", "moon")
    assert record.reranked and not record.timed_out
    assert len(record.scores) == 4  # every passage that shares a word was a candidate
    query, passages, lexical = reranker.seen[0]
    hits = INDEX.search(["deep sea and moon"])[0]
    assert (query, passages) == ("deep sea and moon", [h.passage.shown for h in hits])
    assert lexical == [h.lexical for h in hits]


def test_equal_logits_keep_the_order_of_the_search():
    evidence = Retriever(INDEX, ByTable({}), shown=4).retrieve("deep sea")
    hits = INDEX.search(["deep sea"])[0]
    assert [p.id for p in evidence.passages] == [h.passage.id for h in hits][:4]


def test_past_the_time_budget_the_search_order_stands_and_the_record_says_so():
    slow = ByTable(LIKES_TIDE, seconds=10.0)
    evidence = Retriever(INDEX, slow, shown=2, timeout_ms=5).retrieve("deep sea and moon")
    hits = INDEX.search(["deep sea and moon"])[0]
    assert [p.id for p in evidence.passages] == [h.passage.id for h in hits][:2]
    assert evidence.record.timed_out and not evidence.record.reranked
    assert not any(evidence.record.features())
    assert evidence.record.sources == tuple(p.id for p in evidence.passages)
    assert 0.005 <= evidence.record.seconds < 5


def test_a_search_that_takes_all_the_time_leaves_none_for_the_reranker():
    class SlowIndex:
        tokens, idf = INDEX.tokens, INDEX.idf

        def search(self, *arguments):
            sleep(0.02)
            return INDEX.search(*arguments)

    reranker = ByTable(LIKES_TIDE)
    evidence = Retriever(SlowIndex(), reranker, timeout_ms=5).retrieve(QUERY)
    assert evidence.record.timed_out
    assert reranker.seen == []


def test_without_a_reranker_nothing_timed_out_and_there_are_no_features():
    evidence = Retriever(INDEX, timeout_ms=1000).retrieve(QUERY)
    assert evidence.passages[0].id == "tide"
    assert not evidence.record.timed_out and not evidence.record.reranked
    assert not any(evidence.record.features())


@pytest.mark.parametrize("query", ["", "?!", "Donaudampfschiff"])
def test_a_query_that_finds_nothing_gives_an_empty_record(query):
    evidence = Retriever(INDEX, ByTable(LIKES_TIDE), timeout_ms=1000).retrieve(query)
    assert evidence.passages == ()
    assert evidence.record.sources == ()
    assert not evidence.record.timed_out
    assert not any(evidence.record.features())


def test_many_questions_equal_one_by_one_and_report_progress():
    retriever, heard = Retriever(INDEX, ByTable(LIKES_TIDE)), []
    queries = [QUERY, "deep fish", "nothing known"] * 50
    many = retriever.retrieve_many(queries, lambda done, total: heard.append((done, total)))
    assert many == [retriever.retrieve(query) for query in queries]
    assert heard == [(i, 150) for i in range(1, 151)]


def test_given_passages_are_ranked_without_an_index():
    reranker = ByTable(LIKES_TIDE)
    evidence = Retriever(reranker=reranker, shown=2).rank(QUERY, PASSAGES[:4])
    assert [p.id for p in evidence.passages] == ["tide", "moon"]
    assert evidence.record.coverage > 0.8
    assert reranker.seen[0][2] is None  # no first-stage scores
    assert Retriever(reranker=reranker).rank(QUERY, []).passages == ()


def test_given_passages_without_a_reranker_stay_in_order():
    evidence = Retriever(shown=2).rank(QUERY, PASSAGES)
    assert evidence.passages == tuple(PASSAGES[:2])


def test_with_an_index_given_passages_are_weighed_by_its_corpus():
    alone = Retriever(reranker=ByTable(LIKES_TIDE)).rank("moon entry", PASSAGES[1:2])
    of_corpus = Retriever(INDEX, ByTable(LIKES_TIDE)).rank("moon entry", PASSAGES[1:2])
    weight = INDEX.idf("moon") / (INDEX.idf("moon") + INDEX.idf("entri"))
    assert of_corpus.record.coverage == pytest.approx(weight)
    assert alone.record.coverage < of_corpus.record.coverage


def test_a_swapped_index_scores_what_its_passages_now_say():
    reranker = ByTable(LIKES_TIDE)
    worse = swapped(INDEX, shuffled(PASSAGES))
    Retriever(worse, reranker).retrieve(QUERY)
    assert reranker.seen[0][2] == [h.lexical for h in worse.search([QUERY], 20)[0]]


@pytest.mark.parametrize("logit", [np.nan, np.inf])
def test_a_reranker_that_gives_no_number_is_refused_by_name(logit):
    with pytest.raises(DataError, match="Reranker table"):
        Retriever(INDEX, ByTable({PASSAGES[0].text: logit})).retrieve(QUERY)


def test_a_retriever_without_an_index_cannot_search():
    with pytest.raises(DataError, match="no index"):
        Retriever().retrieve(QUERY)


def test_one_string_is_not_a_list_of_questions():
    with pytest.raises(DataError, match="one string"):
        Retriever(INDEX).retrieve_many(QUERY)


@pytest.mark.parametrize("options", [{"shown": 0}, {"shown": 30}, {"timeout_ms": 0}])
def test_options_that_cannot_work_are_refused(options):
    with pytest.raises(ValueError):
        Retriever(INDEX, **options)


def test_idf_among_texts_is_that_of_an_index_over_them():
    texts = [p.shown for p in PASSAGES]
    idf = idf_among(texts, INDEX.tokens)
    for term in ("sea", "moon", "unknown"):
        assert idf(term) == pytest.approx(INDEX.idf(term))


def test_the_shipped_reranker_sees_that_a_swapped_index_no_longer_answers():
    facts = {"gold": "Au", "iron": "Fe", "tin": "Sn", "lead": "Pb", "silver": "Ag", "zinc": "Zn"}
    passages = [
        Passage(name, f"The chemical symbol of the metal {name} is {symbol}.")
        for name, symbol in facts.items()
    ]
    index, reranker = in_memory(passages), load_reranker("tiny")
    queries = [f"what is the chemical symbol of {name}" for name in facts]
    best = {}
    for condition, corpus in (("clean", passages), ("shuffled", shuffled(passages))):
        # One passage per question, so that the shuffled corpus cannot bring the right one back.
        found = Retriever(swapped(index, corpus), reranker, candidates=1, shown=1)
        evidence = found.retrieve_many(queries)
        assert [e.passages[0].id for e in evidence] == list(facts)
        assert all(e.record.reranked for e in evidence)
        best[condition] = np.array([e.record.best for e in evidence])
    assert (best["clean"] > best["shuffled"]).all()
