from hashlib import sha256

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import entropy

from bem.config import EVIDENCE_FEATURES
from bem.errors import DataError
from bem.evidence.index import in_memory
from bem.evidence.passages import Passage
from bem.evidence.record import EvidenceRecord, digest_of, make_record, unranked_record

PASSAGES = [
    Passage("a", "The moon is 384,400 km away."),
    Passage("b", "The moon is 400,000 km away.", title="Moon"),
    Passage("c", "Fish swim in the sea."),
]
INDEX = in_memory(PASSAGES)
LOGITS = np.array([-2.0, 3.0, 1.0, -0.5, -4.0])


def record(query="how far away is the moon", shown=PASSAGES, logits=LOGITS, **changes):
    return make_record(query, shown, logits, tokens=INDEX.tokens, idf=INDEX.idf, **changes)


def test_scores_are_probabilities_best_first_and_the_margin_is_to_their_median():
    found = record()
    assert found.scores == pytest.approx(expit([3.0, 1.0, -0.5, -2.0, -4.0]))
    assert found.best == pytest.approx(expit(3.0))
    assert found.margin == pytest.approx(expit(3.0) - expit(-0.5))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_entropy_is_of_the_softmax_and_relative_to_its_maximum(temperature):
    p = np.exp(LOGITS / temperature)
    expected = entropy(p / p.sum()) / np.log(len(LOGITS))
    assert record(temperature=temperature).entropy == pytest.approx(expected)


def test_entropy_is_one_for_equal_logits_and_zero_for_a_single_one():
    assert record(logits=np.full(4, 2.0)).entropy == pytest.approx(1.0)
    one = record(shown=PASSAGES[:1], logits=[2.0])
    assert (one.entropy, one.margin, one.contradiction) == (0.0, 0.0, 0.0)
    assert one.consistency == pytest.approx(1.0)


def test_huge_logits_do_not_overflow():
    found = record(logits=[1e5, 0.0, -1e5])
    assert found.scores == (1.0, 0.5, 0.0)
    assert found.entropy == 0.0


def test_features_stand_in_the_declared_order_and_in_the_unit_interval():
    found = record()
    features = dict(zip(EVIDENCE_FEATURES, found.features(), strict=True))
    assert features["present"] == 1.0
    assert features["count"] == 0.3
    for name in ("best", "margin", "entropy", "contradiction", "coverage", "consistency"):
        assert features[name] == getattr(found, name)
    assert all(0 <= value <= 1 for value in features.values())
    assert features["contradiction"] > 0  # a and b give two distances


def test_more_than_ten_passages_count_as_ten():
    many = [Passage(str(i), "word") for i in range(12)]
    assert record(shown=many, logits=np.zeros(12)).features()[-1] == 1.0


def test_without_a_reranker_or_passages_the_features_are_zero():
    zero = (0.0,) * len(EVIDENCE_FEATURES)
    late = unranked_record("q", PASSAGES, timed_out=True)
    assert late.features() == zero
    assert late.timed_out and not late.reranked
    assert late.sources == ("a", "b", "c")
    assert record(shown=[], logits=[]).features() == zero
    assert EvidenceRecord("q").features() == zero


def test_the_digest_is_over_ids_and_texts_in_order():
    assert record().digest == digest_of(PASSAGES) == unranked_record("q", PASSAGES).digest
    different = [
        PASSAGES[::-1],
        PASSAGES[:2],
        [Passage("a", PASSAGES[0].text + " "), *PASSAGES[1:]],
        [Passage("z", PASSAGES[0].text), *PASSAGES[1:]],
        [Passage("a", PASSAGES[0].text, "title"), *PASSAGES[1:]],
    ]
    digests = [digest_of(passages) for passages in [PASSAGES, *different]]
    assert len(set(digests)) == len(digests)
    assert digest_of([Passage("ab", "c")]) != digest_of([Passage("a", "bc")])
    assert digest_of([]) == sha256().hexdigest()


def test_records_of_the_same_evidence_are_equal_however_long_they_took():
    assert record(seconds=1.0) == record(seconds=2.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_refused(bad):
    with pytest.raises(DataError, match="how far"):
        record(logits=[1.0, bad, 0.0])


def test_more_shown_than_scored_is_refused():
    with pytest.raises(DataError, match="3 passages are shown, but only 2"):
        record(logits=[1.0, 0.0])


def test_a_temperature_must_be_positive():
    with pytest.raises(ValueError, match="temperature"):
        record(temperature=0.0)


def test_words_of_any_script_are_covered():
    passages = [Passage("ru", "Луна серая"), Passage("zh", "月亮是灰色的")]
    index = in_memory(passages)
    for query, shown in [("луна", passages[:1]), ("月亮", passages[1:])]:
        found = make_record(query, shown, [50.0], tokens=index.tokens, idf=index.idf)
        assert found.coverage == pytest.approx(1.0)
