"""The reader is trained on from its start only as far as left-out folds of the training rows say."""

from bem.config import CloningConfig, ReadingConfig
from bem.training import few_rows
from bem.training.fit_router import fit_router
from tests.conftest import make_llama, make_tokenizer
from tests.training.skills import labelled, write_loras


def test_training_that_does_not_help_is_left_out(tmp_path, monkeypatch):
    loras = write_loras(tmp_path)
    wild = CloningConfig(reading=ReadingConfig(epochs=2, learning_rate=1.0, dropout=0.0))
    monkeypatch.setattr(few_rows, "TUNING", wild)
    fit = fit_router(make_llama(), make_tokenizer(), loras, labelled(12))
    assert fit.learned.epochs == 0 and len(fit.learned.left_out) == 3
    assert fit.scores[0].accuracy.value > 0.7


def test_training_that_helps_is_kept(tmp_path, monkeypatch):
    """The label hangs on a word that stands two chunks before the question."""
    loras = write_loras(tmp_path)
    monkeypatch.setattr(few_rows, "GAIN", 0.0)
    rows = [
        row | {"prompt": row["prompt"] + f" return the value {i}" * 6}
        for i, row in enumerate(labelled(12))
    ]
    fit = fit_router(make_llama(), make_tokenizer(), loras, rows, chunk_size=8)
    curve = fit.learned.left_out
    assert fit.learned.epochs == curve.index(min(curve)) > 0
