"""What turns texts into vectors: the base model's own states, or a sentence-transformers model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from bem.bases.load import find_encoder, load_base
from bem.errors import ConfigError, DataError, MissingExtra

OWN = "base:"
"""Prefix of the names of encoders that pool a base model's states."""
MOST_CHARACTERS_PER_TOKEN = 32
"""Longer texts are cut before they are split into tokens: ten megabytes cost as much as a page."""

OnProgress = Callable[[int, int], None]  # texts encoded, of how many


class Encoder(Protocol):
    """Texts to unit vectors; an index records `name` and `hash` and accepts no other encoder."""

    name: str
    hash: str  # of everything that a vector depends on
    dimension: int
    whiten: bool  # the index equalises all directions, fitted on its corpus (see dense.py)

    def encode(
        self, texts: Sequence[str], on_progress: OnProgress | None = None
    ) -> NDArray[np.float32]:
        """Vectors [len(texts), dimension], each of norm 1."""
        ...


class PooledStates:
    """Mean over a text's tokens of the hidden states that enter one layer of a base model.

    Needs no download. Layer 0, the token embeddings, is the default because it found most
    (benchmarks/results/retrieval_choices.md). BM25 finds far more than that, and a hybrid of the two
    less than BM25 alone (benchmarks/results/retrieval.md): where words do not decide, give a
    sentence-transformers model instead (`minilm`; benchmarks/results/retrieval_encoders.md).

    Args:
        base: `bem-tiny`, a folder or a Hugging Face id.
        layer: the layer whose input is pooled; 0 needs no forward pass.
        max_tokens: what is read of a text; the rest is left to BM25.
        batch_size: texts per forward pass (layers above 0).
        device: torch device.
    Raises:
        ConfigError: the base has no such layer.
        AttachError: there is no such base.
    """

    whiten = True

    def __init__(
        self,
        base: str = "bem-tiny",
        layer: int = 0,
        max_tokens: int = 256,
        batch_size: int = 32,
        device: str = "cpu",
    ):
        self._model, self._tokenizer = load_base(base, device)
        self._embeddings: Any = self._model.get_input_embeddings()
        layers: int = self._model.config.num_hidden_layers
        if not 0 <= layer <= layers:
            raise ConfigError(f"{base} has layers 0 to {layers}, got layer {layer}.")
        self.name = f"{OWN}{base}" + (f":{layer}" if layer else "")
        self.dimension: int = self._embeddings.weight.shape[1]
        self._layer, self._max_tokens, self._batch_size = layer, max_tokens, batch_size
        recipe = f"mean of states entering layer {layer}, first {max_tokens} tokens"
        used = self._model if layer else self._embeddings
        self.hash = _hash(recipe, used.state_dict(), self._tokenizer)

    def encode(
        self, texts: Sequence[str], on_progress: OnProgress | None = None
    ) -> NDArray[np.float32]:
        """Unit vectors [n, dimension]; a text without a single token is refused (DataError)."""
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        ids = self._ids(texts)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # little padding in a batch
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            with torch.inference_mode():
                pooled = self._pool([ids[i] for i in batch])
                vectors[batch] = torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()
            if on_progress:
                on_progress(start + len(batch), len(order))
        return vectors

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        heads = [text[: self._max_tokens * MOST_CHARACTERS_PER_TOKEN] for text in texts]
        limits = {"truncation": True, "max_length": self._max_tokens}
        ids = self._tokenizer(heads, add_special_tokens=False, **limits)["input_ids"]
        for text, found in zip(texts, ids, strict=True):
            if not found:
                raise DataError(f"The text {text[:40]!r} holds no token, so it has no vector.")
        return ids

    def _pool(self, ids: list[list[int]]) -> torch.Tensor:
        """Mean states [len(ids), dimension], float32."""
        device = self._model.device
        if self._layer == 0:  # no padding, no forward pass
            flat = torch.tensor([token for row in ids for token in row], device=device)
            starts = np.cumsum([0, *(len(row) for row in ids[:-1])])
            return torch.nn.functional.embedding_bag(
                flat,
                self._embeddings.weight.float(),
                torch.as_tensor(starts, device=device),
                mode="mean",
            )
        padded = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long, device=device)
        mask = torch.zeros_like(padded)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)] = torch.tensor(tokens, device=device)
            mask[row, : len(tokens)] = 1
        states = self._model.base_model(
            input_ids=padded, attention_mask=mask, output_hidden_states=True, use_cache=False
        ).hidden_states[self._layer]
        weights = mask[..., None].float()
        return (states.float() * weights).sum(1) / weights.sum(1)


class SentenceEncoder:
    """Any sentence-transformers model: `minilm`, a folder or a hub id (extra `retrieval`).

    Raises:
        MissingExtra: sentence-transformers is not installed.
        DataError: there is no such model.
    """

    whiten = False  # trained so that cosines mean something as they are

    def __init__(self, name: str, device: str = "cpu", batch_size: int = 32):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise MissingExtra("sentence-transformers", "retrieval", f"Encoder {name}") from None
        try:
            self._model = SentenceTransformer(find_encoder(name), device=device)
        except (OSError, ValueError) as error:
            raise DataError(
                f"No sentence-transformers model {name!r}: {str(error).splitlines()[0]} Give a "
                f"folder or a Hugging Face id, or use the base's own states ({OWN}bem-tiny)."
            ) from error
        self.name = name
        self.dimension: int = self._model.encode(["a"], show_progress_bar=False).shape[1]
        self._batch_size = batch_size
        recipe = f"sentence-transformers, {self._model.max_seq_length} tokens, {self._model}"
        self.hash = _hash(recipe, self._model.state_dict(), self._model.tokenizer)

    def encode(
        self, texts: Sequence[str], on_progress: OnProgress | None = None
    ) -> NDArray[np.float32]:
        """Unit vectors [n, dimension]."""
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        size = self._batch_size * 16  # it sorts by length, within what it is given
        for start in range(0, len(texts), size):
            block = list(texts[start : start + size])
            vectors[start : start + size] = self._model.encode(
                block,
                batch_size=self._batch_size,
                normalize_embeddings=True,
                show_progress_bar=False,
            )
            if on_progress:
                on_progress(start + len(block), len(texts))
        return vectors


def load_encoder(name: str, device: str = "cpu") -> Encoder:
    """The encoder that has this name: `base:bem-tiny`, `base:bem-tiny:2`, or a model's own name."""
    if not name.startswith(OWN):
        return SentenceEncoder(name, device)
    base, _, layer = name.removeprefix(OWN).rpartition(":")
    if base and layer.isdigit():
        return PooledStates(base, int(layer), device=device)
    return PooledStates(name.removeprefix(OWN), device=device)


def _hash(recipe: str, state: dict[str, Any], tokenizer: Any) -> str:
    """sha256 of a recipe, of weights and of a tokenizer."""
    digest = hashlib.sha256(recipe.encode())
    for name, weight in sorted(state.items()):
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.update((backend.to_str() if backend else repr(tokenizer)).encode())
    return digest.hexdigest()
