"""What a server serves, and how much of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, model_validator

from bem.config.learning import LearningConfig
from bem.config.overrides import apply_override
from bem.config.section import Folder, Section, parse

Share = Annotated[float, Field(gt=0, lt=1)]


class ServingConfig(Section):
    """One server: a base, a version store, and limits."""

    base: str = "bem-tiny"
    """A name of `bem base list`, a folder, a .gguf file or a Hugging Face id."""
    dtype: str | None = None
    """Of the base's weights; None: float32 on CPU, bfloat16 elsewhere."""
    device: str = "cpu"
    """Torch device."""
    store: Folder | None = None
    """Folder of the version store; None: the bare base is all that there is."""
    index: Folder | None = None
    """Folder of the passages that `retrieve` searches; None: there are none."""
    vision: str | None = None
    """Tower through which pictures are looked at: `tiny`, or a folder of a CLIP or SigLIP. None: pictures are refused."""
    concepts: tuple[str, ...] = ()
    """Phrases that a CLIP or SigLIP describes pictures by, 16 at most."""
    max_image_kib: int = Field(1024, ge=1)
    """Largest picture, as it was encoded."""
    max_image_pixels: int = Field(1 << 22, ge=1)
    """Largest picture, unpacked; what its header says is checked before."""
    host: str = "127.0.0.1"
    port: int = Field(8080, ge=0, le=65535)
    """0: any that is free."""
    keys: Folder | None = None
    """File of the API keys, see `bem keys`; None: whoever reaches the port may ask."""
    feedback: str | None = None
    """Where answers and what is said of them are kept: path of an SQLite file, or a URL of SQLAlchemy. None: neither is."""
    policy: Folder | None = None
    """File of the safety policy, see docs/safety.md; None: nothing is checked."""
    learn: LearningConfig | None = None
    """A learner beside the server, which learns from the feedback and moves the store; None: there is none."""
    canary: dict[str, Share] = Field(default_factory=dict)
    """Version, by its first digits -> share of the conversations that ask for `bem` and get it instead."""

    slots: int = Field(8, ge=1)
    """Sequences of one version that run at once."""
    queue: int = Field(256, ge=1)
    """Requests to one version that may wait; who comes then is told to try again later."""
    cache_gib: float = Field(1.0, ge=0)
    """Of finished chunks, of all versions together."""
    prefill_tokens: int = Field(512, ge=1)
    """Prompt tokens that are read in one step: more, and answers that run wait longer."""
    resident: int = Field(4, ge=2)
    """Versions in memory beside the bare base, those of the canary included; the least recently used one
    goes when another is asked for."""
    watch_s: float = Field(1.0, gt=0)
    """Seconds between looks at the store's pointer."""

    max_new_tokens: int = Field(1024, ge=1)
    """Of an answer that names no limit."""
    max_body_kib: int = Field(2048, ge=1)
    """Largest request."""
    max_choices: int = Field(64, ge=1)
    """Answers to one request: its prompts times n."""
    timeout_s: float = Field(600.0, gt=0)
    """From a request to the last token of its answer; what is there by then is the answer."""
    retrieval_ms: float = Field(200.0, gt=0)
    """Of the search and the reranking of evidence, before the first token."""
    drain_s: float = Field(30.0, gt=0)
    """What runs has so long to finish after SIGTERM."""
    log_prompts: bool = False
    """Write prompts and answers to the log."""

    @model_validator(mode="after")
    def _learning_needs_feedback_and_a_store(self) -> ServingConfig:
        if self.learn and not (self.feedback and self.store):
            raise ValueError(
                "learning needs feedback to learn from, and a store for what was learned"
            )
        if self.learn and not self.keys and not self.learn.believes_one_source:
            raise ValueError(
                "without keys all feedback has one source, and no source may have so much to say that anything is "
                "learned from it: give keys; or, where only people you trust reach the port, set "
                "learn.online.max_share=1 and learn.online.events_per_source="
                f"{self.learn.online.trial_events}"
            )
        return self


def serving_config(
    values: Mapping[str, Any],
    canary: Sequence[str] | None = None,
    settings: Sequence[str] | None = None,
) -> ServingConfig:
    """A config from a command line.

    Args:
        values: of fields.
        canary: `VERSION=SHARE` each.
        settings: `KEY=VALUE` each, over the values.
    Raises:
        ConfigError: an unknown key, or a value that cannot be right.
    """
    given = dict(values)
    shares = [each.partition("=") for each in canary or ()]
    if shares:
        given["canary"] = {version: share for version, _, share in shares}
    for override in settings or ():
        apply_override(given, override)
    return parse(ServingConfig, given, "bem serve")
