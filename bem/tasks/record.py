"""What a task family is: how it is asked and how its answers are scored."""

from __future__ import annotations

from dataclasses import dataclass

from bem.config import RetrievalConfig


@dataclass(frozen=True)
class Family:
    """A kind of question with its instruction, its metrics and the form of its answers."""

    about: str
    """One line for listings."""
    form: str
    """Key of scoring.FORMS; a row's meta["form"] overrides it."""
    metrics: tuple[str, ...]
    """em, f1, validity, chrf, bleu, loss."""
    primary: str
    """The metric that decides."""
    max_new_tokens: int
    instruction: str = ""
    """Text put before every input."""
    slice_by: tuple[str, ...] = ()
    """Keys of meta whose values are reported as named slices."""
    retrieval: RetrievalConfig | None = None
    """How evidence is found; None: what stands in the rows goes into the prompt as it is."""


TEXT_METRICS = ("chrf", "bleu", "loss")
ANSWER_METRICS = ("em", "f1", "loss")
STRUCTURE_METRICS = ("em", "f1", "validity", "loss")
