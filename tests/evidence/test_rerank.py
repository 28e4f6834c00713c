import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bem.errors import CheckpointError, DataError, MissingExtra
from bem.evidence.deadline import before
from bem.evidence.pairs import make_pairs, table_bm25
from bem.evidence.reading import BUCKETS, Words, query_words, read_passage
from bem.evidence.rerank import SHIPPED, load_reranker
from bem.evidence.tiny_reranker import Shape, TinyReranker
from bem.evidence.windows import around_matches, densest

QUERY = "who got the first nobel prize in physics"
RIGHT = (
    "The first Nobel Prize in Physics was awarded in 1901 to Wilhelm Conrad Röntgen, of Germany."
)
OTHERS = [
    "The lighthouse was painted white and red in the spring.",
    "Physics is the study of matter, of its motion and of energy.",
    "def close(self):\n    self.handle.close()",
]


@pytest.fixture(scope="module")
def tiny():
    return load_reranker("tiny")


@pytest.fixture(scope="module")
def words(tiny) -> Words:
    return tiny._words


def pairs_for(words, query, passages, lexical=None):
    asked = query_words(words, query)
    read = [read_passage(words, asked, passage) for passage in passages]
    scores = table_bm25(words, asked, read) if lexical is None else np.float32(lexical)
    return make_pairs(words, asked, read, scores)


def run(model, made):
    tensors = {k: torch.from_numpy(v) for k, v in vars(made).items() if k != "first"}
    with torch.inference_mode():
        return model(**tensors, first=made.first).numpy()


# ----------------------------------------------------------------------------------- shipped model


def test_the_passage_that_answers_comes_first(tiny):
    logits = tiny.logits(QUERY, [*OTHERS, RIGHT])
    assert logits.dtype == np.float32 and logits.argmax() == 3


def test_a_logit_does_not_depend_on_the_other_passages_or_their_order(tiny):
    passages = [*OTHERS, RIGHT]
    together = tiny.logits(QUERY, passages, [0.0, 2.0, 0.0, 9.0])
    alone = [tiny.logits(QUERY, [p], [s])[0] for p, s in zip(passages, [0, 2, 0, 9.0], strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-4)
    np.testing.assert_allclose(
        tiny.logits(QUERY, passages[::-1], [9.0, 0, 2, 0])[::-1], together, atol=1e-4
    )


def test_batches_of_any_size_give_the_same_logits(tiny):
    passages = [RIGHT, *OTHERS] * 6
    whole = tiny.logits(QUERY, passages)
    size, tiny.batch_size = tiny.batch_size, 5
    try:
        np.testing.assert_allclose(tiny.logits(QUERY, passages), whole, atol=1e-4)
    finally:
        tiny.batch_size = size


def test_an_answer_deep_in_a_long_passage_is_found(tiny):
    filler = "The lighthouse was painted white and red in the spring. " * 2000
    buried = filler + RIGHT + " " + filler
    logits = tiny.logits(QUERY, [filler, buried])
    assert logits[1] > logits[0] + 1


@pytest.mark.parametrize("query", ["", "???", "ノーベル物理学賞", "नोबेल पुरस्कार", QUERY])
def test_any_query_and_any_passage_give_finite_logits(tiny, query):
    passages = ["", "…", "\x00", "第一回ノーベル物理学賞は1901年", "x" * 50_000, RIGHT]
    assert np.isfinite(tiny.logits(query, passages)).all()


def test_no_passages_give_no_logits(tiny):
    assert tiny.logits(QUERY, []).shape == (0,)


def test_lexical_scores_that_do_not_fit_are_refused(tiny):
    with pytest.raises(DataError, match="for 2 passages"):
        tiny.logits(QUERY, [RIGHT, RIGHT], [1.0])
    with pytest.raises(DataError, match="1 values that are NaN"):
        tiny.logits(QUERY, [RIGHT, RIGHT], [1.0, float("nan")])


def test_more_bm25_never_makes_a_passage_worse_at_the_start_of_training(words):
    untrained = TinyReranker(Shape()).eval()
    lexical = [3.0, 1.0, 2.0, 0.0]
    logits = run(untrained, pairs_for(words, QUERY, [*OTHERS, RIGHT], lexical))
    assert np.argsort(-logits).tolist() == np.argsort(-np.array(lexical)).tolist()
    np.testing.assert_allclose(logits, 3.0 * np.array(lexical) / 10 - 4.0, atol=1e-6)


def test_loading_and_judging_leave_the_random_state_alone():
    before_it = torch.get_rng_state()
    load_reranker("tiny").logits(QUERY, [RIGHT])
    assert torch.equal(torch.get_rng_state(), before_it)


def test_the_shipped_files_stay_small():
    assert sum(f.stat().st_size for f in SHIPPED["tiny"].iterdir()) < 3_000_000


def test_the_name_follows_the_weights(tiny, tmp_path):
    shutil.copytree(SHIPPED["tiny"], tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["calibration"]["shift"] += 1.0
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    other = load_reranker(tmp_path / "other")
    assert other.name != tiny.name
    np.testing.assert_allclose(
        other.logits(QUERY, [RIGHT]), tiny.logits(QUERY, [RIGHT]) + 1.0, atol=1e-5
    )


# --------------------------------------------------------------------------------- what it is shown


def test_words_match_by_stem_and_carry_the_place_in_the_query(words):
    made = pairs_for(words, "running dogs", ["Dogs ran; the dog runs."])
    # columns: start | running dogs | Dogs ran the dog runs
    assert made.codes[0].tolist() == [0, 1, 2, 2, 0, 0, 2, 1]
    assert made.segments[0].tolist() == [1, 2, 2, 3, 3, 3, 3, 3]
    assert made.features[0, :, 0].tolist() == [0, 1, 1, 1, 0, 0, 1, 1]


def test_a_short_passage_is_padded_with_nothing(words):
    made = pairs_for(words, "dogs", ["a dog ran home", "dog"])
    assert made.segments[1].tolist() == [1, 2, 3, 0, 0, 0]
    assert not made.features[1, 3:].any() and not made.words[1, 3:].any()


def test_table_bm25_is_the_formula_by_hand(words):
    asked = query_words(words, "the zebra")  # a function word is not searched for
    read = [read_passage(words, asked, text) for text in ("zebra zebra the", "the the")]
    idf = words.idf[asked[1].stem % BUCKETS]
    expected = idf * 2 / (2 + 0.9 * (0.6 + 0.4 * 3 / 100))
    np.testing.assert_allclose(table_bm25(words, asked, read), [expected, 0.0], rtol=1e-5)


def test_the_window_lies_around_most_of_the_query():
    text = "x " * 3000 + "apple " + "y " * 3000 + "apple and pears " + "z " * 3000
    found = around_matches("apples with pears", text, 400)
    assert len(found) == 400 and "apple and pears" in found
    assert densest({"quince": 1.0}, text, 400) == 0
    assert densest({}, text, 400) == 0


# -------------------------------------------------------------------------------------- time budget


def test_past_the_deadline_there_are_no_logits(tiny):
    assert tiny.logits(QUERY, [RIGHT], deadline=time.monotonic() - 1) is None
    assert tiny.logits(QUERY, [RIGHT], deadline=time.monotonic() + 60) is not None


def test_the_caller_goes_on_at_the_deadline_whatever_the_work_does():
    begun = time.monotonic()
    assert before(begun + 0.05, lambda: time.sleep(3)) is None
    assert time.monotonic() - begun < 2


def test_work_between_batches_sees_the_deadline(tiny):
    tiny._logits(QUERY, [RIGHT], None, None)  # warm
    assert tiny._logits(QUERY, [RIGHT] * 64, None, time.monotonic()) is None


def test_an_error_in_the_thread_reaches_the_caller():
    def broken():
        raise DataError("broken passage")

    with pytest.raises(DataError, match="broken passage"):
        before(time.monotonic() + 10, broken)


# -------------------------------------------------------------------------------- foreign and broken


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A random CrossEncoder of 2 layers with a word-piece tokenizer made on the spot."""
    pytest.importorskip("sentence_transformers")
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    pieces = BertWordPieceTokenizer()
    pieces.train_from_iterator([QUERY, RIGHT, *OTHERS] * 3, vocab_size=300, show_progress=False)
    pieces.save_model(str(folder))
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=128).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        num_labels=1,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_a_cross_encoder_folder_gives_its_own_logits(bert):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    reranker = load_reranker(bert)
    reranker.batch_size = 2
    passages = [*OTHERS, RIGHT]
    tokenizer = AutoTokenizer.from_pretrained(bert)
    model = AutoModelForSequenceClassification.from_pretrained(bert).eval()
    with torch.inference_mode():
        expected = [
            model(**tokenizer(QUERY, p, return_tensors="pt", truncation=True)).logits[0, 0].item()
            for p in passages
        ]
    np.testing.assert_allclose(reranker.logits(QUERY, passages), expected, atol=1e-5)
    assert reranker.logits(QUERY, passages, deadline=time.monotonic() - 1) is None
    assert reranker.logits(QUERY, []).shape == (0,)


def test_a_cross_encoder_reads_the_part_of_a_long_passage_that_matches(bert):
    reranker = load_reranker(bert)
    filler = "the lighthouse was painted white and red " * 400
    window = around_matches(QUERY, filler + RIGHT + filler, 4 * 128)
    assert RIGHT in window
    np.testing.assert_allclose(
        reranker.logits(QUERY, [filler + RIGHT + filler]),
        reranker.logits(QUERY, [window]),
        atol=1e-5,
    )


def test_a_model_without_a_trained_score_is_refused(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "plain")
    config = json.loads((bert / "config.json").read_text())
    config["architectures"] = ["BertModel"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="single trained score"):
        load_reranker(tmp_path / "plain")


def test_an_unknown_name_is_refused():
    pytest.importorskip("sentence_transformers")
    with pytest.raises(CheckpointError, match="No reranker"):
        load_reranker("no/such-model-anywhere")


def test_without_sentence_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtra, match=r"bem\[retrieval\]"):
        load_reranker("some/model")


def test_damaged_or_foreign_files_are_refused(tmp_path):
    shutil.copytree(SHIPPED["tiny"], tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="no usable reranker"):
        load_reranker(tmp_path / "cut")
    save_file({"idf": torch.zeros(BUCKETS)}, weights)
    with pytest.raises(CheckpointError, match="no usable reranker"):
        load_reranker(tmp_path / "cut")
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    (tmp_path / "cut" / "config.json").write_text(json.dumps({**config, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        load_reranker(tmp_path / "cut")
