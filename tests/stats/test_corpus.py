import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from bem.errors import DataError
from bem.stats.bootstrap import joint_bca
from bem.stats.corpus import (
    CORPUS,
    bleu_statistics,
    chrf_statistics,
    corpus_bleu,
    corpus_chrf,
)
from bem.stats.weights import Statistic, resample, weight_blocks

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "ate", "red", "fish", "in", "rain"]


def corpus(n, quality, seed=0):
    rng = np.random.default_rng(seed)
    references = [" ".join(rng.choice(WORDS, rng.integers(3, 12))) for _ in range(n)]
    answers = [
        " ".join(w if rng.random() < quality else rng.choice(WORDS) for w in ref.split())
        for ref in references
    ]
    return answers, [[ref] for ref in references]


def streams(references):
    return [[refs[i] for refs in references] for i in range(len(references[0]))]


@pytest.mark.parametrize("quality", [0.1, 0.8, 1.0])
def test_corpus_scores_equal_sacrebleu(quality):
    answers, references = corpus(50, quality)
    bleu = corpus_bleu(bleu_statistics(answers, references).sum(axis=0))
    chrf = corpus_chrf(chrf_statistics(answers, references).sum(axis=0))
    assert bleu == pytest.approx(sacrebleu.corpus_bleu(answers, streams(references)).score)
    assert chrf == pytest.approx(sacrebleu.corpus_chrf(answers, streams(references)).score)


def test_several_references_equal_sacrebleu():
    answers, references = corpus(30, 0.7)
    more = [[ref, " ".join(reversed(ref.split()[:5]))] for (ref,) in references]
    bleu = corpus_bleu(bleu_statistics(answers, more).sum(axis=0))
    chrf = corpus_chrf(chrf_statistics(answers, more).sum(axis=0))
    assert bleu == pytest.approx(sacrebleu.corpus_bleu(answers, streams(more)).score)
    assert chrf == pytest.approx(sacrebleu.corpus_chrf(answers, streams(more)).score)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.text("ab ", max_size=8), st.text("ab ", max_size=8)), min_size=1, max_size=4
    )
)
def test_odd_corpora_equal_sacrebleu(pairs):
    answers, references = [a for a, _ in pairs], [[b] for _, b in pairs]
    bleu = corpus_bleu(bleu_statistics(answers, references).sum(axis=0))
    chrf = corpus_chrf(chrf_statistics(answers, references).sum(axis=0))
    assert bleu == pytest.approx(
        sacrebleu.corpus_bleu(answers, streams(references)).score, abs=1e-9
    )
    assert chrf == pytest.approx(
        sacrebleu.corpus_chrf(answers, streams(references)).score, abs=1e-9
    )


@pytest.mark.parametrize("name", list(CORPUS))
def test_resampled_scores_equal_sacrebleu_on_the_resampled_corpus(name):
    answers, references = corpus(40, 0.6)
    table = {"corpus_bleu": bleu_statistics, "corpus_chrf": chrf_statistics}[name](
        answers, references
    )
    ours = resample([Statistic(name, table, CORPUS[name][1])], 20, seed=3)[:, 0]
    metric = getattr(sacrebleu, name)
    weights = np.concatenate([w.copy() for w in weight_blocks(40, 20, seed=3)])
    for score, row in zip(ours, weights, strict=True):
        drawn = np.repeat(np.arange(40), row)
        theirs = metric([answers[i] for i in drawn], [[references[i][0] for i in drawn]]).score
        assert score == pytest.approx(theirs, abs=1e-3)


def test_jackknife_subtracts_what_sacrebleu_would_count_anew():
    answers, references = corpus(25, 0.7)
    statistic = Statistic("bleu", bleu_statistics(answers, references), corpus_bleu)
    left_out = [
        sacrebleu.corpus_bleu(
            answers[:i] + answers[i + 1 :], streams(references[:i] + references[i + 1 :])
        ).score
        for i in range(25)
    ]
    d = np.mean(left_out) - np.array(left_out)
    bca = joint_bca([statistic], 2000)[0]
    assert bca.acceleration == pytest.approx((d**3).sum() / (6 * (d**2).sum() ** 1.5))
    assert bca.se == pytest.approx(np.sqrt(24 / 25 * (d**2).sum()))
    assert bca.lower < bca.observed < bca.upper


def test_lists_must_match():
    with pytest.raises(DataError, match="2 predictions but 1"):
        bleu_statistics(["a", "b"], [["a"]])
    with pytest.raises(DataError, match="non-empty"):
        chrf_statistics(["a"], [[]])
