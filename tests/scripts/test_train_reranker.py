"""How the shipped reranker is trained, without the data folder."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import reranker_pairs as rp
import train_reranker as tr

from bem.evidence.pairs import table_bm25
from bem.evidence.reading import BUCKETS, Words, query_words, read_passage
from bem.evidence.tiny_reranker import Shape, TinyReranker

POOL = [
    "The first Nobel Prize in Physics was awarded in 1901 to Wilhelm Röntgen.",
    "The Nobel Prize in Physics was founded by Alfred Nobel, who died in 1896.",
    "In 1901 Wilhelm Röntgen lived in Munich.",
    "Lighthouses are painted white and red.",
]


@pytest.fixture(scope="module")
def words() -> Words:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tr.BASE / "tokenizer.json"))
    return Words(tokenizer, np.full(BUCKETS, 5.0, dtype=np.float32))


@pytest.fixture
def pairs() -> rp.PairSet:
    asked = rp.Question("q", "who got the first nobel prize in physics", (0,), ("Röntgen",))
    return rp.PairSet("set", POOL, [asked])


def test_candidates_are_in_bm25_order_and_a_missed_right_passage_is_added(pairs):
    found = next(rp.first_stage(pairs, 20))
    assert found.rows[:2] == (0, 1) and 3 not in found.rows
    assert list(found.lexical) == sorted(found.lexical, reverse=True)
    lost = rp.PairSet("set", POOL, [rp.Question("q", "nobel prize", (3,))])
    assert 3 not in next(rp.first_stage(lost, 20)).rows
    assert next(rp.first_stage(lost, 20, with_right=True)).rows[-1] == 3


def test_a_passage_that_holds_the_answer_is_never_taken_as_wrong(pairs):
    found = rp.Candidates(pairs.questions[0], (0, 1, 2, 3), (4.0, 3.0, 2.0, 0.0))
    assert rp.wrong(pairs, found) == [1, 3]


def test_a_cloze_question_does_not_hold_its_answer():
    paragraph = (
        "The treaty that ended the long war was signed in the city hall of Münster in 1648 by "
        "envoys of many princes. It was celebrated with fireworks in several towns of the empire."
    )
    asked = [rp._cloze_question(paragraph, random.Random(seed)) for seed in range(60)]
    with_answer = [(query, answer) for query, answer in filter(None, asked) if answer]
    assert len(with_answer) > 5
    for query, answer in with_answer:
        assert answer in paragraph and answer.lower() not in query.lower()
    years = {query.split()[0].lower() for query, answer in with_answer if answer == "1648"}
    assert years <= {"when", "what", "in"}


def test_lists_of_several_queries_in_one_batch_give_the_logits_of_each_alone(words):
    torch.manual_seed(0)
    model = TinyReranker(Shape(d_model=24, n_heads=3, d_ff=32)).eval()
    torch.nn.init.normal_(model.head[2].weight)
    lists = [
        tr.pairs_of(words, POOL, "who got the first nobel prize in physics", [0, 1], [3.0, 1.0]),
        tr.pairs_of(words, POOL, "lighthouses", [3, 2, 0], [2.0, 0.0, 0.0]),
    ]
    with torch.inference_mode():
        together = model(**tr.collate(lists)).numpy()
        alone = [model(**tr.collate([one])).numpy() for one in lists]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)


def test_the_loss_by_hand():
    logits = torch.tensor([1.0, 0.0, 2.0, 2.0])
    right = torch.tensor([True, False, False, False])
    loss, parts = tr.list_loss(logits, right, [2, 2])  # the second list holds nothing right
    ce = np.log(1 + np.exp(-1))
    bce = (ce + np.log(2) + 2 * np.log(1 + np.exp(2))) / 4
    assert parts["ce"] == pytest.approx(ce) and parts["bce"] == pytest.approx(bce)
    assert loss.item() == pytest.approx(ce + tr.BCE_WEIGHT * bce)


def test_calibration_finds_the_scale_and_shift_that_made_the_labels():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 40_000)
    labels = rng.random(40_000) < 1 / (1 + np.exp(-(0.5 * logits - 1)))
    scale, shift = tr.platt({"one": (logits, labels)})
    assert scale == pytest.approx(0.5, abs=0.03) and shift == pytest.approx(-1, abs=0.05)


def test_reciprocal_rank_looks_at_ten():
    right = [False] * 9 + [True, True]
    assert tr.reciprocal_rank(-np.arange(11.0), right) == pytest.approx(0.1)
    assert tr.reciprocal_rank(-np.arange(11.0), [*right[:9], False, True]) == 0.0


def test_a_training_list_has_one_right_passage_or_none(words, pairs):
    found = rp.Candidates(pairs.questions[0], (0, 1, 2, 3), (4.0, 3.0, 2.0, 0.0))
    rng = random.Random(0)
    counts = [sum(tr.training_list(words, pairs, found, 3, rng)[1]) for _ in range(200)]
    assert set(counts) == {0, 1} and 0.8 < np.mean(counts) < 0.97


def test_saved_weights_load_and_give_the_calibrated_logits(words, tmp_path):
    from bem.evidence.rerank import load_reranker

    torch.manual_seed(0)
    model = TinyReranker(Shape()).eval()
    torch.nn.init.normal_(model.head[2].weight, std=0.1)
    model.half().float()
    tr.save(tmp_path, model, words.idf, (2.0, 1.0), step=0)
    reranker = load_reranker(tmp_path)
    query = "first nobel prize"
    asked = query_words(words, query)
    lexical = table_bm25(words, asked, [read_passage(words, asked, text) for text in POOL])
    with torch.inference_mode():
        raw = model(**tr.collate([tr.pairs_of(words, POOL, query, range(4), lexical)])).numpy()
    np.testing.assert_allclose(reranker.logits(query, POOL), 2 * raw + 1, atol=1e-4)
