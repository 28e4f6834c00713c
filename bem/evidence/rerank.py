"""Rerankers: how probable is it that a passage answers the query?

    reranker = load_reranker("tiny")
    reranker.logits("who won in 1901", ["In 1901 the prize went to ...", "Prizes are given in ..."])

`tiny` is shipped (its card: tiny-reranker/README.md); any cross-encoder of sentence-transformers
goes by its name or folder. With a deadline the work runs in a thread: it looks at the clock between
batches and gives up, and whoever waits for it stops waiting at the deadline whatever it does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load
from tokenizers import Tokenizer

from bem.bases.load import find_base
from bem.errors import CheckpointError
from bem.evidence.cross_encoder import CrossEncoderReranker
from bem.evidence.deadline import before, passed
from bem.evidence.pairs import checked_lexical, make_pairs, table_bm25
from bem.evidence.reading import Words, query_words, read_passage
from bem.evidence.tiny_reranker import Shape, TinyReranker

SHIPPED = {"tiny": Path(__file__).parent / "tiny-reranker"}
FORMAT = 1


class Reranker(Protocol):
    """Judges passages for a query, each by itself: no logit depends on the other passages."""

    @property
    def name(self) -> str:
        """Names the weights: another model has another name."""
        ...

    def logits(
        self,
        query: str,
        passages: Sequence[str],
        lexical: Sequence[float] | None = None,
        deadline: float | None = None,
    ) -> NDArray[np.float32] | None:
        """[passages] log-odds that the passage answers or supports the query.

        Args:
            query: any text; only its first words may be read.
            passages: texts as the prompt shows them; of long ones the part that matches is read.
            lexical: BM25 score of each passage, as an index gives it; None: computed from the text.
            deadline: in seconds of `time.monotonic()`; None: take the time it needs.
        Returns:
            float32, or None if the deadline passed first.
        Raises:
            DataError: `lexical` does not fit the passages, or holds NaN or inf.
        """
        ...


def load_reranker(name: str | Path = "tiny", device: str = "cpu") -> Reranker:
    """A reranker by name.

    Args:
        name: `tiny`, the folder of one trained by scripts/train_reranker.py, or the folder or
            Hugging Face id of a sentence-transformers CrossEncoder.
        device: torch device.
    Raises:
        MissingExtra: sentence-transformers is needed and not installed.
        CheckpointError: nothing of that name, damaged files, or a model without a scoring head.
    """
    folder = SHIPPED.get(str(name), Path(name))
    if _is_ours(folder):
        return Tiny(folder, device)
    if str(name) in SHIPPED:
        raise CheckpointError(f"{folder} lacks its files: install the package again.")
    return CrossEncoderReranker(str(name), device)


class Tiny:
    """The cross-encoder of `tiny_reranker.py`, calibrated: sigmoid(logit) is a probability.

    Args:
        folder: model.safetensors and config.json.
        device: torch device.
        batch_size: pairs per forward pass; the deadline is looked at in between.
    """

    def __init__(self, folder: Path, device: str = "cpu", batch_size: int = 16):
        self.device, self.batch_size = device, batch_size
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.scale = float(config["calibration"]["scale"])
        self.shift = float(config["calibration"]["shift"])
        self._model, self._words, digest = _load_tiny(folder, config, device)
        self.name = f"tiny@{digest[:8]}"
        self.logits("warm", ["up: the first call sets up threads and caches"])

    def logits(
        self,
        query: str,
        passages: Sequence[str],
        lexical: Sequence[float] | None = None,
        deadline: float | None = None,
    ) -> NDArray[np.float32] | None:
        """See `Reranker.logits`."""
        scores = checked_lexical(lexical, len(passages))
        return before(deadline, lambda: self._logits(query, passages, scores, deadline))

    def _logits(
        self,
        query: str,
        passages: Sequence[str],
        lexical: NDArray[np.float32] | None,
        deadline: float | None,
    ) -> NDArray[np.float32] | None:
        words, asked, read = self._words, query_words(self._words, query), []
        for passage in passages:
            if passed(deadline):
                return None
            read.append(read_passage(words, asked, passage))
        scores = table_bm25(words, asked, read) if lexical is None else lexical
        out = np.zeros(len(read), dtype=np.float32)
        by_length = np.argsort([len(passage.words) for passage in read], kind="stable")
        for start in range(0, len(read), self.batch_size):
            if passed(deadline):
                return None
            rows = by_length[start : start + self.batch_size]
            made = make_pairs(words, asked, [read[row] for row in rows], scores[rows])
            tensors = {
                name: torch.from_numpy(value).to(self.device)
                for name, value in vars(made).items()
                if name != "first"
            }
            with torch.inference_mode():
                found = self._model(**tensors, first=made.first).cpu().numpy()
            out[rows] = self.scale * found + self.shift
        return out


# ------------------------------------------------------------------------------------------ loading


def _is_ours(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return "calibration" in config and "shape" in config


def _load_tiny(
    folder: Path, config: dict[str, Any], device: str
) -> tuple[TinyReranker, Words, str]:
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} is a reranker of format {config.get('format')}; this version reads {FORMAT}. "
            "Train it again with scripts/train_reranker.py."
        )
    try:
        data = (folder / "model.safetensors").read_bytes()
        tensors = {name: tensor.float() for name, tensor in load(data).items()}
        idf = tensors.pop("idf").numpy()
        with torch.device("meta"):  # no initial weights: the caller's random state stays as it is
            model = TinyReranker(Shape(**config["shape"]))
        model.load_state_dict(tensors, assign=True)
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder} holds no usable reranker: {str(error).splitlines()[0]} "
            "Copy the folder again, or train it with scripts/train_reranker.py."
        ) from error
    tokenizer = Tokenizer.from_file(str(Path(find_base(config["base"])) / "tokenizer.json"))
    digest = sha256(data + json.dumps(config, sort_keys=True).encode()).hexdigest()
    return model.to(device).eval(), Words(tokenizer, idf), digest
