"""Any cross-encoder of sentence-transformers as a reranker (extra `retrieval`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch.nn import Identity

from bem.errors import CheckpointError, MissingExtra
from bem.evidence.deadline import before, passed
from bem.evidence.pairs import checked_lexical
from bem.evidence.windows import around_matches

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

CHARACTERS_PER_TOKEN = 4
"""Of English text, for cutting long passages before a foreign tokenizer sees them."""


class CrossEncoderReranker:
    """A sentence-transformers CrossEncoder with one output, taken as log-odds.

    Its probabilities are as calibrated as its authors made them. `lexical` is not used.
    """

    def __init__(self, name: str, device: str = "cpu", batch_size: int = 16):
        self.name, self.batch_size = name, batch_size
        self._model = _load_cross_encoder(name, device)

    def logits(
        self,
        query: str,
        passages: Sequence[str],
        lexical: Sequence[float] | None = None,
        deadline: float | None = None,
    ) -> NDArray[np.float32] | None:
        """See `Reranker.logits`."""
        checked_lexical(lexical, len(passages))
        return before(deadline, lambda: self._logits(query, passages, deadline))

    def _logits(
        self, query: str, passages: Sequence[str], deadline: float | None
    ) -> NDArray[np.float32] | None:
        room = CHARACTERS_PER_TOKEN * int(self._model.max_length or 512)
        cut = [around_matches(query, passage, room) for passage in passages]
        out = np.zeros(len(cut), dtype=np.float32)
        by_length = np.argsort([len(passage) for passage in cut], kind="stable")
        for start in range(0, len(cut), self.batch_size):
            if passed(deadline):
                return None
            rows = by_length[start : start + self.batch_size]
            out[rows] = self._model.predict(
                [(query, cut[row]) for row in rows],
                batch_size=self.batch_size,
                activation_fn=Identity(),
                show_progress_bar=False,
            )
        return out


def _load_cross_encoder(name: str, device: str) -> CrossEncoder:
    try:
        from sentence_transformers import CrossEncoder
    except ImportError:
        raise MissingExtra("sentence-transformers", "retrieval", f"The reranker {name!r}") from None
    try:
        model = CrossEncoder(name, device=device)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"No reranker {name!r}: {str(error).splitlines()[0]} "
            f"Give the folder or id of a CrossEncoder, or `tiny`."
        ) from error
    kinds = getattr(model.config, "architectures", None) or []
    if model.num_labels != 1 or not any("ForSequenceClassification" in kind for kind in kinds):
        raise CheckpointError(
            f"{name!r} ({', '.join(kinds) or 'no architecture'}, {model.num_labels} outputs) has no "
            "single trained score: take a CrossEncoder made for reranking."
        )
    return model
