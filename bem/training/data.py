"""Examples: from JSONL or a Hugging Face dataset to token ids with labels.

A row of JSONL is `{"input": str, "references": [str, ...]}` and optionally `id`, `evidence`,
`gold_evidence`, `group` (the source document: the unit of resampling), `task`, `instruction`,
`history` (earlier [user, assistant] turns), `relevance` (what a retriever knows of the evidence, in
the order of EVIDENCE_FEATURES) and `meta`. The first reference is the one trained on.

    read_jsonl / load_hf -> [Example] -> encode -> Encoded -> collate -> tensors
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bem.config import EVIDENCE_FEATURES
from bem.errors import DataError, MissingExtra

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""Label of a token that the loss must not look at."""

FIELDS = (
    "id",
    "input",
    "references",
    "evidence",
    "gold_evidence",
    "group",
    "task",
    "instruction",
    "history",
    "relevance",
    "meta",
)


@dataclass(frozen=True)
class Example:
    """One question with its acceptable answers."""

    id: str
    input: str
    references: tuple[str, ...]
    """Acceptable answers; the first is the one trained on."""
    evidence: tuple[str, ...] = ()
    gold_evidence: tuple[int, ...] = ()
    """Indices of the evidence that the answer follows from."""
    group: str = ""
    """Source document, the cluster of the statistics; empty: the row is its own."""
    task: str = ""
    instruction: str = ""
    history: tuple[tuple[str, str], ...] = ()
    """Earlier (user, assistant) turns of the same conversation."""
    relevance: tuple[float, ...] = ()
    """How good the evidence is, in the order of EVIDENCE_FEATURES; empty: nothing is known of it."""
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.group:
            object.__setattr__(self, "group", self.id)

    @property
    def prompt(self) -> str:
        """What the user says last: instruction, evidence and input, one per line."""
        return "\n".join(part for part in (self.instruction, *self.evidence, self.input) if part)


# ------------------------------------------------------------------------------------------ reading


def read_jsonl(path: str | Path, task: str = "", instruction: str = "") -> list[Example]:
    """Examples of a .jsonl or .jsonl.gz file. Nothing is returned unless every line is right.

    Args:
        task: name for rows that carry none.
        instruction: text put before the input of rows that carry none.
    Raises:
        DataError: no such file, no rows, or a line that cannot be used (named as file:line).
    """
    path = Path(path)
    rows = ((f"{path}:{n}", _parse(line, f"{path}:{n}")) for n, line in _lines(path))
    examples = examples_from_rows(rows, task=task, instruction=instruction, stem=_stem(path))
    if not examples:
        raise DataError(f"{path} holds no rows. Each line must be a JSON object.")
    return examples


def examples_from_rows(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    task: str = "",
    instruction: str = "",
    stem: str = "",
) -> list[Example]:
    """Examples of (place, row) pairs; `place` is what an error message names."""
    examples: list[Example] = []
    places: dict[str, str] = {}
    for number, (where, row) in enumerate(rows, 1):
        example = _example(row, where, task, instruction, default_id=f"{stem or 'row'}-{number}")
        if example.id in places:
            raise DataError(f"{where}: id {example.id!r} was used before, in {places[example.id]}.")
        places[example.id] = where
        examples.append(example)
    return examples


def load_hf(
    dataset: str,
    config: str | None = None,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    task: str = "",
    instruction: str = "",
) -> list[Example]:
    """Examples of one split of a Hugging Face dataset (needs the extra `datasets`).

    Args:
        dataset: hub id or a local folder.
        columns: our field -> its column, dots for nested ones: {"references": "answers.text"}.
            Fields that are not named are looked up under their own name.
    Raises:
        MissingExtra: the library is not installed.
        DataError: the dataset cannot be loaded, or a column is missing.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "datasets", f"Reading {dataset!r}") from None
    try:
        table = datasets.load_dataset(dataset, config, split=split)
    except Exception as error:  # the library raises dozens of kinds; the user needs the one line
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"Cannot load dataset {dataset!r}, split {split!r}: {reason}") from error
    wanted = dict(columns or {})
    unknown = sorted(set(wanted) - set(FIELDS))
    if unknown:
        raise DataError(f"columns of {dataset!r} name no field of ours: {', '.join(unknown)}.")
    rows = (
        (f"{dataset}[{split}][{i}]", _renamed(dict(row), wanted, f"{dataset}[{split}]"))
        for i, row in enumerate(table)
    )
    return examples_from_rows(rows, task=task, instruction=instruction, stem=split)


def data_hash(examples: Sequence[Example]) -> str:
    """sha256 of the rows in their order, independent of the file they came from."""
    digest = hashlib.sha256()
    for example in examples:
        row = json.dumps(asdict(example), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        digest.update(row.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank."""
    if not path.is_file():
        raise DataError(f"No data file at {path}.")
    number = 0
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}:{number + 1}: cannot be read ({error}).") from None


def _parse(line: str, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}.") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be a JSON object, found {type(row).__name__}.")
    return row


def _example(
    row: Mapping[str, Any], where: str, task: str, instruction: str, default_id: str
) -> Example:
    missing = [key for key in ("input", "references") if row.get(key) is None]
    if missing:
        known = ", ".join(sorted(row)) or "no fields"
        raise DataError(f"{where}: missing {' and '.join(missing)} (the row has {known}).")
    if not isinstance(row["input"], str):
        raise DataError(f"{where}: input must be text, found {type(row['input']).__name__}.")
    references = _texts(row["references"], "references", where)
    if not references:
        raise DataError(f"{where}: references is empty; at least one answer is needed.")
    evidence = _texts(row.get("evidence") or (), "evidence", where)
    gold = row.get("gold_evidence") or ()
    if not all(isinstance(i, int) and 0 <= i < len(evidence) for i in gold):
        raise DataError(
            f"{where}: gold_evidence {list(gold)} must be indices into {len(evidence)} evidence."
        )
    history = row.get("history") or ()
    if not all(len(t) == 2 and all(isinstance(x, str) for x in t) for t in history):
        raise DataError(f"{where}: history must hold [user, assistant] pairs of text.")
    meta = row.get("meta") or {}
    if not isinstance(meta, dict):
        raise DataError(f"{where}: meta must be an object, found {type(meta).__name__}.")
    identity = row.get("id")
    return Example(
        id=default_id if identity is None else str(identity),
        input=row["input"],
        references=references,
        evidence=evidence,
        gold_evidence=tuple(gold),
        group=str(row.get("group") or ""),
        task=str(row.get("task") or task),
        instruction=row.get("instruction") or instruction,
        history=tuple((user, assistant) for user, assistant in history),
        relevance=_relevance(row.get("relevance") or (), where),
        meta=meta,
    )


def _relevance(value: Any, where: str) -> tuple[float, ...]:
    n = len(EVIDENCE_FEATURES)
    right = isinstance(value, (list, tuple)) and len(value) in (0, n)
    if not right or not all(isinstance(v, (int, float)) and 0 <= v <= 1 for v in value):
        raise DataError(
            f"{where}: relevance must be {n} numbers from 0 to 1: {', '.join(EVIDENCE_FEATURES)}."
        )
    return tuple(float(v) for v in value)


def _texts(value: Any, name: str, where: str) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, str) for v in values):
        raise DataError(f"{where}: {name} must be a list of texts.")
    return tuple(values)


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for name in FIELDS:
        if name not in columns:
            if name in row:
                renamed[name] = row[name]
            continue
        value: Any = row
        for key in columns[name].split("."):
            if not isinstance(value, Mapping) or key not in value:
                raise DataError(
                    f"{where} has no column {columns[name]!r} for {name!r}. "
                    f"Columns: {', '.join(row)}."
                )
            value = value[key]
        renamed[name] = str(value) if isinstance(value, (int, float)) else value
    if isinstance(renamed.get("references"), list):
        renamed["references"] = [str(value) for value in renamed["references"]]
    return renamed


def _stem(path: Path) -> str:
    return re.sub(r"\.jsonl(\.gz)?$", "", path.name)


# ----------------------------------------------------------------------------------------- encoding


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

    def __len__(self) -> int:
        return len(self.input_ids)


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
        with_answer: append the first reference and the end-of-turn token.
        train_history: label the answers of earlier turns too.
    Raises:
        DataError: the answer and the mark that opens it are longer than `max_length`.
    """
    form = _form(tokenizer, tokenizer.chat_template)
    ids: list[int] = []
    labels: list[int] = []
    answers: list[int] = []  # position of the first token of each answer

    def add(tokens: list[int], labelled: bool = False) -> None:
        ids.extend(tokens)
        labels.extend(tokens if labelled else [IGNORED] * len(tokens))

    for number, (said, answered) in enumerate(_turns(example, tokenizer, form)):
        tokens = _ids(tokenizer, said)
        if number == 0 and form.bos is not None and tokens[:1] != [form.bos]:
            tokens = [form.bos, *tokens]
        add(tokens)
        if answered is not None:
            answers.append(len(ids))
            add([*_ids(tokenizer, answered), form.end], labelled=train_history)
    prompt_length = len(ids)
    options = _options(example, len(answers) + 1)
    if with_answer:
        answer = [*_ids(tokenizer, form.opening + example.references[0]), form.end]
        answers.append(len(ids))
        add(answer, labelled=True)
        room = max_length - form.mark_length
        if len(answer) > room:
            raise DataError(
                f"Row {example.id!r}: its answer has {len(answer)} tokens, but only {room} fit "
                f"(max_length {max_length} less the mark that opens an answer). "
                "Raise training.max_length or drop the row."
            )
    starts = [False] * len(ids)
    for first in answers:
        starts[max(0, first - 1)] = True
    route = _spread(
        options, [max(0, a - 1) for a in [*answers, prompt_length][: len(options)]], len(ids)
    )
    surplus = len(ids) - max_length
    if surplus > 0:
        lead = [] if form.bos is None else [form.bos]
        first = surplus + len(lead)
        cut_open = labels[first] != IGNORED  # its beginning is gone: the rest is only context
        ids, labels, starts = ids[first:], labels[first:], starts[first:]
        route = [*route[:1] * len(lead), *route[first:]]
        if cut_open:
            stop = next((i for i, label in enumerate(labels) if label == IGNORED), len(labels))
            labels[:stop] = [IGNORED] * stop
        ids = [*lead, *ids]
        labels, starts = [IGNORED] * len(lead) + labels, [False] * len(lead) + starts
        prompt_length = max(0, prompt_length - surplus)
    return Encoded(ids, labels, prompt_length, starts, example.relevance, route)


def _options(example: Example, turns: int) -> list[int]:
    """Expert option of each turn, from meta["route"]; [] if the row names none."""
    options = example.meta.get("route") or []
    if options and (len(options) != turns or not all(isinstance(o, int) for o in options)):
        raise DataError(
            f"Row {example.id!r}: meta.route must name one expert option for each of {turns} turns, got {options}."
        )
    return options


def _spread(options: list[int], starts: list[int], length: int) -> list[int]:
    """A turn's option from its start to the next one's; nothing is asked for before the first."""
    if not options:
        return []
    route = [-1] * length
    for option, start, stop in zip(options, starts, [*starts[1:], length], strict=True):
        route[start:stop] = [option] * (stop - start)
    return route


def collate(
    batch: Sequence[Encoded], pad_id: int, side: Literal["left", "right"] = "left"
) -> dict[str, Tensor]:
    """Tensors [batch, longest]: input_ids, attention_mask, position_ids, labels, turn_starts; route
    if any row has one (-1 elsewhere); and evidence [batch, features] if anything is known of any
    row's (zeros: nothing)."""
    import torch

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
    if any(e.route for e in batch):
        if not all(e.route for e in batch):
            raise DataError(
                "some rows of a batch have a route and some have none: give each row one, or none."
            )
        hold = [pad(e.route, -1) for e in batch]
        tensors["route"] = torch.tensor(hold)
    if any(e.relevance for e in batch):
        nothing = [0.0] * len(EVIDENCE_FEATURES)
        tensors["evidence"] = torch.tensor([e.relevance or nothing for e in batch])
    return tensors


def end_of_turn(tokenizer: Any) -> int:
    """Id of the token that ends an answer: the chat template's own mark, else EOS."""
    return _form(tokenizer, tokenizer.chat_template).end


@dataclass(frozen=True)
class _Form:
    """What a tokenizer puts around the turns; probed once."""

    end: int
    """Token that ends an answer."""
    bos: int | None
    """Token that opens a conversation, if there is one."""
    opening: str
    """Text between the mark that opens an answer and the answer."""
    mark_length: int
    """Tokens that any prompt must keep: BOS and the mark that opens the answer."""


@lru_cache(maxsize=8)
def _form(tokenizer: Any, template: str | None) -> _Form:
    end, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if template:
        probe = [{"role": "user", "content": "x"}]
        opened = _render(tokenizer, probe, opens=True)
        asked = _render(tokenizer, probe, opens=False)
        closed = _render(tokenizer, [*probe, {"role": "assistant", "content": "x"}], opens=False)
        mark = opened[len(asked) :] if opened.startswith(asked) else ""
        if closed.startswith(opened + "x"):
            special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
            end = next(
                (i for i in _ids(tokenizer, closed[len(opened) + 1 :])[:1] if i in special), end
            )
        if bos is not None and not opened.startswith(tokenizer.bos_token):
            bos = None
    else:
        mark = "\nAssistant:"
        if bos is not None and tokenizer("x")["input_ids"][0] != bos:
            bos = None
    if end is None:
        raise DataError(
            "The tokenizer has no end-of-text token (eos_token); answers could not end."
        )
    mark_length = max(1, len(_ids(tokenizer, mark))) + (bos is not None)
    return _Form(end, bos, "" if template else " ", mark_length)


def _turns(example: Example, tokenizer: Any, form: _Form) -> list[tuple[str, str | None]]:
    """(text that is said, answer or None for the one to come), in order."""
    if not tokenizer.chat_template:
        said = [*(user for user, _ in example.history), example.prompt]
        answers = [*(form.opening + assistant for _, assistant in example.history), None]
        return [(f"User: {s}\nAssistant:", a) for s, a in zip(said, answers, strict=True)]
    messages: list[dict[str, str]] = []
    turns: list[tuple[str, str | None]] = []
    shown = ""
    told_apart = True
    for user, assistant in example.history:
        messages.append({"role": "user", "content": user})
        opened = _render(tokenizer, messages, opens=True)
        messages.append({"role": "assistant", "content": assistant})
        closed = _render(tokenizer, messages, opens=False)
        told_apart &= opened.startswith(shown) and closed.startswith(opened + assistant)
        turns.append((opened[len(shown) :], assistant))
        shown = opened + assistant + tokenizer.convert_ids_to_tokens(form.end)
        shown = shown if closed.startswith(shown) else closed
    messages.append({"role": "user", "content": example.prompt})
    final = _render(tokenizer, messages, opens=True)
    if not (told_apart and final.startswith(shown)):
        return [(final, None)]  # the template rewrites earlier turns: they are context only
    return [*turns, (final[len(shown) :], None)]


def _render(tokenizer: Any, messages: list[dict[str, str]], opens: bool) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
