"""What a task is: rows, and how they are asked and scored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bem.config import RetrievalConfig
from bem.evidence.passages import Passage
from bem.training.data import Example

METRIC_NAMES = ("em", "f1", "validity", "chrf", "bleu", "loss")
TEXT_METRICS = ("chrf", "bleu", "loss")
ANSWER_METRICS = ("em", "f1", "loss")
STRUCTURE_METRICS = ("em", "f1", "validity", "loss")


@dataclass(frozen=True)
class Family:
    """A kind of question with its instruction, its metrics and the form of its answers."""

    about: str
    """One line for listings."""
    form: str
    """Key of scoring.FORMS; a row's meta["form"] overrides it."""
    metrics: tuple[str, ...]
    """Of METRIC_NAMES."""
    primary: str
    """The metric that decides."""
    max_new_tokens: int
    instruction: str = ""
    """Text put before every input."""
    slice_by: tuple[str, ...] = ()
    """Keys of meta whose values are reported as named slices."""
    retrieval: RetrievalConfig | None = None
    """How evidence is found; None: what stands in the rows goes into the prompt as it is."""


@dataclass(frozen=True)
class Task:
    """Rows to train on, rows to measure on, and how to score them."""

    name: str
    train: list[Example] = field(repr=False)
    dev: list[Example] = field(repr=False)
    """Held out."""
    validation: list[Example] = field(default_factory=list, repr=False, kw_only=True)
    """Set aside for choosing: neither trained on nor reported."""
    metrics: tuple[str, ...]
    primary: str
    max_new_tokens: int
    form: str = "text"
    """Key of scoring.FORMS for rows that do not say (meta["form"])."""
    slice_by: tuple[str, ...] = ()
    retrieval: RetrievalConfig | None = None
    """How evidence is found for the rows (see `retrieval.with_evidence`); None: as it stands in them."""
    corpus: list[Passage] = field(default_factory=list, repr=False)
    """What is searched."""
    variants: dict[str, list[Example]] = field(default_factory=dict, repr=False)
    """The held-out rows with worse evidence, by condition."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Of the search for evidence: leaked rows, places of the gold passages."""

    def form_of(self, example: Example) -> str:
        return example.meta.get("form", self.form)
