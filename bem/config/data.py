"""Tasks, their evidence, and conversations made of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from bem.config.section import Section, Seed


class RetrievalConfig(Section):
    """Where a task's evidence comes from, and how it is judged before the model sees it."""

    source: Literal["corpus", "row"] = "corpus"
    """corpus: search all passages; row: rank the passages that each row carries."""
    index: str | None = None
    """Folder made by `bem index build`; None: an index of the rows' passages and of `corpora`."""
    corpora: list[str] = []
    """JSONL files with further passages, searched beside those of the rows."""
    method: Literal["bm25", "dense", "hybrid"] = "bm25"
    """First-stage search; dense and hybrid need an `index` with vectors."""
    candidates: int = Field(default=20, ge=1)
    """Passages that the first stage hands to the reranker."""
    shown: int = Field(default=3, ge=1)
    """Passages that go into the prompt."""
    keep_order: bool = False
    """Show passages in the order of the row instead of the best first (a story)."""
    reranker: str = "tiny"
    """tiny (shipped), none, or a sentence-transformers CrossEncoder by name or folder."""
    withheld: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training rows whose gold passages are kept from the search: evidence that fails."""
    corrupt_share: float = Field(default=0.5, gt=0, le=1)
    """Share of the sentences that the corrupt index has from other passages."""
    swap: bool = True
    """Measure the held-out rows with a corrupt, a shuffled and no index as well."""
    leak_threshold: float = Field(default=0.8, gt=0, le=1)
    """Held-out rows whose gold passage is this similar to a training one are left out
    (Jaccard of 5-word shingles)."""
    slice_threshold: float = Field(default=0.8, ge=0, le=1)
    """Slice A holds the rows whose evidence has at least this coverage and consistency."""
    seed: Seed = 0
    """Seed of withheld rows and of the worse indices."""


SPLITS = {"train": "train", "dev": "validation"}


class TaskConfig(Section):
    """One task family: where its rows come from and how they are scored."""

    name: str = Field(min_length=1, pattern=r"^\w[\w .+-]*$")
    """Name of a built-in or public task, or of your own; it names files and slices."""
    train: str | None = None
    """JSONL (or .gz) file; None: the named task's own file under `data`."""
    dev: str | None = None
    """Held-out JSONL file; no row of it may be in `train`."""
    metric: str | None = None
    """Primary metric; None: the task's own."""
    metrics: list[str] | None = None
    """Every metric to report; None: the task's own."""
    instruction: str = ""
    """Text put before every input."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest generated answer in tokens; None: the task's own, 64 for your own rows."""
    hf_dataset: str | None = None
    """A Hugging Face dataset id (extra `datasets`) instead of files."""
    hf_config: str | None = None
    """Configuration name of that dataset."""
    hf_splits: dict[Literal["train", "dev"], str] = SPLITS  # pyright: ignore
    """Which of its splits serve as train and dev."""
    columns: dict[str, str] = {}
    """Our fields (input, references, evidence, group, id ...) and the columns of the files or the dataset
    that hold them, dots for nested ones: {references: answers.text}."""
    retrieval: RetrievalConfig | None = None
    """Evidence by retrieval; None: the task's own way, for most tasks what stands in the rows."""

    @model_validator(mode="after")
    def _rows_have_one_source(self) -> TaskConfig:
        if self.columns and not (self.train or self.dev or self.hf_dataset):
            raise ValueError("`columns` need rows of your own: `train` and `dev`, or `hf_dataset`.")
        if not self.hf_dataset and (self.hf_config or self.hf_splits != SPLITS):
            raise ValueError("`hf_config` and `hf_splits` need an `hf_dataset`.")
        if self.hf_dataset and self.train and self.dev:
            raise ValueError("give `train` and `dev`, or `hf_dataset`, not both.")
        return self


def _kind_of_task(value: Any) -> str:
    return "entry" if isinstance(value, dict | TaskConfig) else "name"


class ConversationConfig(Section):
    """Conversations whose turns switch between the skills of all tasks."""

    turns: int = Field(default=4, ge=1)
    """Turns of a conversation, the row's own counted; fewer where they do not fit."""
    switch_rate: float = Field(default=0.7, ge=0, le=1)
    """Probability that the next turn asks for another skill."""
    return_rate: float = Field(default=0.5, ge=0, le=1)
    """Probability that a switch, one turn after another, goes back to the skill before."""
    sticky: bool = True
    """A cue holds until its task is asked for something else; until then it is not shown again."""
    max_characters: int = Field(default=1200, ge=1)
    """Longest conversation, answers included; the oldest turns go first."""
    turn_characters: int = Field(default=720, ge=1)
    """Rows whose own turn is longer than this, with its answer, are left out."""
    seed: Seed = 0
    """Seed of the choice of skills and of the earlier turns."""

    @model_validator(mode="after")
    def _a_turn_fits(self) -> ConversationConfig:
        if self.turn_characters > self.max_characters:
            raise ValueError(
                f"turn_characters {self.turn_characters} exceed max_characters "
                f"{self.max_characters}: a turn must fit its conversation."
            )
        return self


class DataConfig(Section):
    """Which tasks, and how much of them."""

    root: str | None = None
    """Folder of public sets; None: the suite embedded in the package."""
    tasks: list[
        Annotated[
            Annotated[str, Tag("name")] | Annotated[TaskConfig, Tag("entry")],
            Discriminator(_kind_of_task),
        ]
    ] = Field(min_length=1)
    """Names of built-in or public tasks, or full task entries."""
    train_rows: int | None = Field(default=None, ge=1)
    """Rows per task for training; None: all."""
    validation_rows: int | None = Field(default=None, ge=1)
    """Training rows per task that are set aside, with their whole groups: the learning rate and the step
    to stop at are chosen on them (`tuning`, `training.patience`), nothing is trained or reported on them."""
    dev_rows: int | None = Field(default=200, ge=1)
    """Held-out rows per task for measuring; None: all."""
    conversations: ConversationConfig | None = None
    """Every row as the last turn of a conversation; None: each row alone."""
    seed: Seed = 0
    """Seed of the choice of rows and of the training order."""
