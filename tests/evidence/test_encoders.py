import sys

import numpy as np
import pytest
import torch

from bem.errors import ConfigError, DataError, MissingExtra
from bem.evidence.encoders import PooledStates, SentenceEncoder, load_encoder

TEXTS = ["name the function", "a", "return the value that this docstring describes " * 3]


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_pooled_states_are_the_mean_of_what_enters_the_layer(micro_base, layer):
    from bem.bases.load import load_base

    model, tokenizer = load_base(str(micro_base))
    vectors = PooledStates(str(micro_base), layer).encode(TEXTS)
    for text, vector in zip(TEXTS, vectors, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states[layer][0]
        mean = states.mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=1e-5)


def test_the_hash_is_of_weights_and_recipe(micro_base):
    encoder = PooledStates(str(micro_base))
    encoder.encode(["a"])
    assert PooledStates(str(micro_base)).hash == encoder.hash
    assert PooledStates(str(micro_base), max_tokens=8).hash != encoder.hash
    assert PooledStates(str(micro_base), layer=1).hash != encoder.hash
    assert PooledStates("bem-tiny").hash != encoder.hash


def test_ten_megabytes_cost_no_more_than_a_page(micro_base):
    encoder = PooledStates(str(micro_base), max_tokens=16)
    page = "name the function that this docstring describes " * 20
    assert np.array_equal(encoder.encode([page]), encoder.encode([page * 10_000]))


def test_names_lead_back_to_their_encoder(micro_base):
    for encoder in (PooledStates(str(micro_base)), PooledStates(str(micro_base), 2)):
        assert load_encoder(encoder.name).hash == encoder.hash
    assert load_encoder("base:bem-tiny").dimension == 192


def test_what_cannot_be_encoded_is_refused(micro_base):
    with pytest.raises(ConfigError, match="layers 0 to 4, got layer 5"):
        PooledStates(str(micro_base), layer=5)
    with pytest.raises(DataError, match="holds no token"):
        PooledStates(str(micro_base)).encode(["fine", ""])


def test_progress_ends_at_the_last_text(micro_base):
    heard = []
    encoder = PooledStates(str(micro_base), batch_size=2)
    encoder.encode(TEXTS, lambda done, total: heard.append((done, total)))
    assert heard == [(2, 3), (3, 3)]


def test_sentence_transformers_model_from_a_folder(tmp_path, micro_base):
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(str(micro_base), device="cpu")  # mean pooling is added
    model.save(str(tmp_path / "model"))
    encoder = SentenceEncoder(str(tmp_path / "model"))
    vectors = encoder.encode(TEXTS)
    assert vectors.shape == (3, encoder.dimension) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors, model.encode(TEXTS, normalize_embeddings=True), atol=1e-5)
    assert SentenceEncoder(str(tmp_path / "model")).hash == encoder.hash


def test_without_sentence_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(
        MissingExtra, match=r"sentence-transformers: pip install 'bem\[retrieval\]'"
    ):
        SentenceEncoder("some/model")


def test_an_unknown_model_is_one_message(tmp_path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(DataError, match="No sentence-transformers model"):
        SentenceEncoder(str(tmp_path / "absent"))
