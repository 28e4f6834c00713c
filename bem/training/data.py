"""Examples to token ids with labels, to tensors.

    read_jsonl / load_hf -> [Example] -> encode -> Encoded -> check_fits -> collate -> tensors

Rows of files and datasets are read in `bem.training.rows`; the first reference is the one trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from bem.bases.limits import context_length
from bem.config import EVIDENCE_FEATURES, VISION_FEATURES
from bem.errors import BemError, DataError, TrainingError
from bem.training.chat import ChatForm, chat_form, end_of_turn, token_ids, turns_of
from bem.training.example import Example, data_hash
from bem.training.rows import examples_from_rows, load_hf, read_jsonl

__all__ = [
    "IGNORED",
    "Encoded",
    "Example",
    "check_fits",
    "check_routes",
    "collate",
    "context_length",
    "data_hash",
    "encode",
    "end_of_turn",
    "examples_from_rows",
    "load_hf",
    "prompt_of",
    "read_jsonl",
]

IGNORED = -100
"""Label of a token that the loss must not look at."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example."""

    input_ids: list[int]
    labels: list[int]
    """The token itself where it is (part of) an answer, IGNORED elsewhere; not shifted."""
    prompt_length: int
    """Position of the first token of the last answer."""
    turn_starts: list[bool]
    """True at the position that predicts the first token of an answer, where a chunk begins."""
    relevance: tuple[float, ...] = ()
    """As in Example."""
    route: list[int] = field(default_factory=list)
    """Expert option of each token for a routed model, -1: hold; empty: the router decides."""
    vision: tuple[float, ...] = ()
    """As in Example."""

    def __len__(self) -> int:
        return len(self.input_ids)


# --- encoding -----------------------------------------------------------------------------------


def encode(
    example: Example,
    tokenizer: Any,
    max_length: int,
    with_answer: bool = True,
    train_history: bool = True,
) -> Encoded:
    """Tokens of the conversation as the base model knows it (its chat template, if it has one).

    A prompt that is too long loses its beginning (the mark that opens the answer stays, and so does
    a leading BOS).

    Args:
        max_length: longest result in tokens.
        with_answer: append the first reference ("" if there is none) and the end-of-turn token.
        train_history: label the answers of earlier turns too.
    Raises:
        DataError: the answer and the mark that opens it are longer than `max_length`, the tokenizer or
            its chat template cannot write the row, or meta.route is not one option per turn.
    """
    try:
        form = chat_form(tokenizer)
        if max_length < form.mark_length:
            raise DataError(
                f"max_length {max_length} is less than the {form.mark_length} tokens that open an answer."
            )
        draft = _draft(turns_of(example, tokenizer), tokenizer, form, train_history)
        options = _options(example, len(draft.answers) + 1)
        prompt_length = len(draft.ids)
        if with_answer:
            _append_answer(draft, example, tokenizer, form, max_length)
    except DataError as error:
        raise DataError(f"Row {example.id!r}: {error}") from error
    starts = [False] * len(draft.ids)
    for first in draft.answers:
        starts[max(0, first - 1)] = True
    turns = [max(0, first - 1) for first in [*draft.answers, prompt_length][: len(options)]]
    route = _spread(options, turns, len(draft.ids))
    seen = example.relevance, route, example.vision
    whole = Encoded(draft.ids, draft.labels, prompt_length, starts, *seen)
    return _cut(whole, max_length, form.bos)


@dataclass
class _Draft:
    """A conversation while it is being written."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)  # position of the first token of each answer

    def add(self, tokens: list[int], labelled: bool = False) -> None:
        self.ids += tokens
        self.labels += tokens if labelled else [IGNORED] * len(tokens)

    def answer(self, tokens: list[int], labelled: bool) -> None:
        self.answers.append(len(self.ids))
        self.add(tokens, labelled)


def prompt_of(
    turns: Sequence[tuple[str, str | None]], tokenizer: Any
) -> tuple[list[int], list[int]]:
    """(token ids, positions that predict the first tokens of its answers) of a conversation, as `encode` writes it.

    Args:
        turns: see `turns_of_messages`.
    Raises:
        DataError: the tokenizer cannot write it.
    """
    draft = _draft(turns, tokenizer, chat_form(tokenizer), train_history=False)
    return draft.ids, [max(0, first - 1) for first in draft.answers]


def _draft(
    turns: Sequence[tuple[str, str | None]], tokenizer: Any, form: ChatForm, train_history: bool
) -> _Draft:
    """The prompt, earlier turns included."""
    draft = _Draft()
    for text, answer in turns:
        tokens = token_ids(tokenizer, text)
        if not draft.ids and form.bos is not None and tokens[:1] != [form.bos]:
            tokens = [form.bos, *tokens]
        draft.add(tokens)
        if answer is not None:
            draft.answer([*token_ids(tokenizer, answer), form.end], labelled=train_history)
    if not draft.ids:
        raise DataError("the base's chat template writes nothing for its prompt.")
    return draft


def _append_answer(
    draft: _Draft, example: Example, tokenizer: Any, form: ChatForm, max_length: int
) -> None:
    answer = [*token_ids(tokenizer, form.opening + example.answer), form.end]
    room = max_length - form.mark_length
    if len(answer) > room:
        raise DataError(
            f"its answer has {len(answer)} tokens, but only {room} fit "
            f"(max_length {max_length} less the mark that opens an answer). "
            "Raise training.max_length or drop the row."
        )
    draft.answer(answer, labelled=True)


def _cut(encoded: Encoded, max_length: int, bos: int | None) -> Encoded:
    """The last `max_length` tokens, behind a BOS if there was one."""
    surplus = len(encoded) - max_length
    if surplus <= 0:
        return encoded
    lead = [] if bos is None else [bos]
    first = surplus + len(lead)
    labels = encoded.labels[first:]
    if encoded.labels[first] != IGNORED:  # an answer without its beginning is only context
        stop = next((i for i, label in enumerate(labels) if label == IGNORED), len(labels))
        labels[:stop] = [IGNORED] * stop
    return Encoded(
        lead + encoded.input_ids[first:],
        [IGNORED] * len(lead) + labels,
        max(0, encoded.prompt_length - surplus),
        [False] * len(lead) + encoded.turn_starts[first:],
        encoded.relevance,
        encoded.route[:1] * len(lead) + encoded.route[first:],
        encoded.vision,
    )


def _options(example: Example, turns: int) -> list[int]:
    """Expert option of each turn, from meta["route"]; [] if the row names none."""
    options = example.meta.get("route") or []
    is_list = isinstance(options, list | tuple)
    if (
        not is_list
        or (options and len(options) != turns)
        or any(type(o) is not int for o in options)
    ):
        raise DataError(
            f"meta.route must name one expert option for each of {turns} turns, got {options!r:.60}."
        )
    return list(options)


def _spread(options: list[int], starts: list[int], length: int) -> list[int]:
    """A turn's option from its start to the next one's; nothing is asked for before the first."""
    if not options:
        return []
    route = [-1] * length
    for option, start, stop in zip(options, starts, [*starts[1:], length], strict=True):
        route[start:stop] = [option] * (stop - start)
    return route


# --- what a model can take ----------------------------------------------------------------------


def check_fits(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Encoded],
    new_tokens: int = 0,
    error: type[BemError] = TrainingError,
) -> None:
    """Refuse rows before the first step that would end it in an IndexError, or go unseen.

    Args:
        rows: everything that the model will read.
        new_tokens: tokens that it may write after each row.
        error: TrainingError, or MeasurementError where nothing is trained.
    Raises:
        error: a row and its answer are longer than the model's positions, or a token has no
            embedding; names both numbers.
    """
    if not rows:
        return
    limit, longest = context_length(model), max(len(row) for row in rows)
    if limit is not None and longest + new_tokens > limit:
        made = f"{longest} tokens" + (f" and {new_tokens} new ones" if new_tokens else "")
        lower = "max_length or max_new_tokens" if new_tokens else "max_length"
        raise error(
            f"the longest row has {made}, the model has {limit} positions (max_position_embeddings). "
            f"Lower {lower}, or drop rows that are too long."
        )
    entries = model.get_input_embeddings().weight.shape[0]
    highest = max(max(row.input_ids, default=0) for row in rows)
    if highest >= entries:
        raise error(
            f"token {highest} ({tokenizer.convert_ids_to_tokens(highest)!r}) has no embedding: the model "
            f"has {entries} entries, the tokenizer {len(tokenizer)}. Use the model's own tokenizer, or "
            f"call model.resize_token_embeddings({len(tokenizer)}) before an adapter is attached."
        )


def check_routes(batch: Sequence[Encoded]) -> None:
    """Raise DataError if some rows have a route and some have none."""
    if len({bool(e.route) for e in batch}) > 1:
        raise DataError(
            "some rows of a batch have a route and some have none: give each row one, or none."
        )


# --- batches ------------------------------------------------------------------------------------


def collate(
    batch: Sequence[Encoded], pad_id: int, side: Literal["left", "right"] = "left"
) -> dict[str, Tensor]:
    """Tensors [batch, longest]: input_ids, attention_mask, position_ids, labels, turn_starts; route
    if any row has one (-1 elsewhere); and evidence and vision [batch, features] if anything is known
    of any row's (zeros: nothing).

    Raises:
        DataError: some rows have a route and some have none.
    """
    longest = max(len(encoded) for encoded in batch)

    def pad(values: Sequence[int], filler: int) -> list[int]:
        missing = [filler] * (longest - len(values))
        return [*missing, *values] if side == "left" else [*values, *missing]

    mask = torch.tensor([pad([1] * len(e), 0) for e in batch])
    tensors = {
        "input_ids": torch.tensor([pad(e.input_ids, pad_id) for e in batch]),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
        "labels": torch.tensor([pad(e.labels, IGNORED) for e in batch]),
        "turn_starts": torch.tensor([pad(e.turn_starts, 0) for e in batch], dtype=torch.bool),
    }
    check_routes(batch)
    if any(e.route for e in batch):
        tensors["route"] = torch.tensor([pad(e.route, -1) for e in batch])
    told = ("evidence", "relevance", EVIDENCE_FEATURES), ("vision", "vision", VISION_FEATURES)
    for name, field_name, features in told:
        known = [getattr(e, field_name) for e in batch]
        if any(known):
            tensors[name] = torch.tensor([values or (0.0,) * len(features) for values in known])
    return tensors
