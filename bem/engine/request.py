"""What the engine is asked for, and what it hands back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from bem.engine.grammar import Grammar
from bem.errors import EngineError

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error", "filtered"]
"""error: this request alone could not go on; `Result.error` says why. filtered: a server's guard took the
answer away; `Result.error` is what the client is told instead."""


SEEDS = 1 << 62


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. The defaults take the most likely one and change nothing."""

    temperature: float = 0.0
    """0: the most likely token, whatever else says."""
    top_p: float = 1.0
    """Smallest set of tokens with this probability together."""
    top_k: int = 0
    """Most likely tokens kept; 0: all."""
    min_p: float = 0.0
    """Least probability, as a share of the most likely token's."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or answer (arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token in the answer."""
    frequency_penalty: float = 0.0
    """The same, times how often it is there."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> added to its logit."""
    seed: int | None = None
    """Of this request's own random numbers; None: from the engine's. Of several answers the next one has the
    next seed."""

    def __post_init__(self) -> None:
        bounds = (
            ("temperature", self.temperature >= 0, ">= 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, ">= 0"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "> 0"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "finite"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "finite"),
            ("logit_bias", all(map(math.isfinite, self.logit_bias.values())), "finite"),
            ("seed", abs(self.seed or 0) < SEEDS, f"between -{SEEDS} and {SEEDS}"),
        )
        for name, holds, bound in bounds:
            if not holds:
                raise EngineError(f"{name} must be {bound}, got {getattr(self, name)}.")

    @property
    def plain(self) -> bool:
        """Is it the most likely token of the logits as they are?"""
        changed = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        return not (self.temperature or changed or self.logit_bias)


@dataclass(frozen=True)
class Request:
    """One prompt and what is wanted of it."""

    prompt: str | Sequence[int]
    """Text, or token ids. A chat is brought into its form by whoever asks."""
    max_new_tokens: int = 64
    """0: the prompt is only scored; see `prompt_logprobs`."""
    n: int = 1
    """Answers to this prompt. What is in the store is read once for all."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    """Strings that end the answer; what stands from there on is not part of it."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end it, beside the model's own."""
    ignore_eos: bool = False
    """The model's own ends do not count: always `max_new_tokens` tokens, unless a stop comes."""
    logprobs: int | None = None
    """Alternatives per token whose log-probabilities are wanted; 0: of the chosen tokens alone; None: of none."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens, as the model itself finds them."""
    prompt_logprobs_from: int = 1
    """Position of the first token that is scored: what stands before it is taken from the store where it can be."""
    grammar: Grammar | None = None
    """The form that the answer must have; needs the extra `grammar`."""
    turn_starts: Sequence[int] = ()
    """Positions in the prompt that predict the first token of an earlier answer: where its chunks began."""
    evidence: Sequence[float] | None = None
    """`EvidenceRecord.features()` of what the prompt shows."""
    vision: Sequence[float] | None = None
    """`VisionRecord.features()` of the picture that belongs to it."""
    route: str | int | None = None
    """Expert, by name or option (0 or "base": none), instead of the router's choice."""
    strength: float = 1.0
    """Factor on what a router's experts do in every chunk, within the trust region; 0: nothing."""
    version: str | None = None
    """What shall act, by its name (`Engine.keep`) or digest; None: what is in use when the request is begun."""
    key: str = ""
    """On whose behalf: keys are served in turn, however much each has asked."""
    tenant: str = ""
    """Chunks are shared among requests of one tenant alone."""
    kappa: float | None = None
    """The safety knob of this request; below its level it changes nothing. None: the level."""
    timeout_s: float | None = None
    """From `submit` to the last token; what was generated until then is handed out."""

    def __post_init__(self) -> None:
        least = 1 if self.prompt_logprobs is None else 0
        if self.max_new_tokens < least:
            raise EngineError(
                f"max_new_tokens must be at least {least}, got {self.max_new_tokens}. 0 is for prompts that are "
                "only scored: give prompt_logprobs."
            )
        if self.n < 1:
            raise EngineError(f"n must be at least 1, got {self.n}.")
        if isinstance(self.stop, str):
            raise EngineError(
                f"stop is a list of strings, got {self.stop!r}: write [{self.stop!r}]."
            )
        if self.grammar is not None and self.ignore_eos:
            raise EngineError("ignore_eos and a grammar contradict: the grammar ends its answers.")
        if any(not text for text in self.stop):
            raise EngineError("stop holds an empty string: every answer would end at once.")
        for name in ("logprobs", "prompt_logprobs"):
            if (wanted := getattr(self, name)) is not None and wanted < 0:
                raise EngineError(f"{name} must be at least 0, got {wanted}.")
        if not 0 <= self.strength < math.inf:
            raise EngineError(f"strength must be at least 0 and finite, got {self.strength}.")
        if self.prompt_logprobs_from < 1:
            raise EngineError(
                f"prompt_logprobs_from must be at least 1, got {self.prompt_logprobs_from}: nothing precedes token 0."
            )
        if self.kappa is not None and not 0 <= self.kappa <= 1:
            raise EngineError(f"kappa must lie in [0, 1], got {self.kappa}.")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise EngineError(f"timeout_s must be > 0, got {self.timeout_s}.")


@dataclass(frozen=True)
class ChunkAction:
    """What a router did in one chunk."""

    start: int
    """Position of its first token, counted from the prompt's first."""
    expert: str
    """"base": none."""
    rank: int
    strength: float


@dataclass(frozen=True)
class TokenLogprob:
    """Of one token of the answer, under the distribution from which it was drawn before any cut-off or grammar; of
    one of the prompt, under the model's own."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability) of the most likely ones."""


@dataclass(frozen=True)
class Result:
    """An answer."""

    id: int
    token_ids: tuple[int, ...]
    """Of the answer, without the token that ended it."""
    text: str
    """Special tokens left out, cut before a stop string."""
    finish_reason: FinishReason
    version: str
    """Digest of what acted from the first token to the last."""
    prompt_tokens: int
    cached_tokens: int
    """Tokens of the prompt that were not computed again."""
    actions: tuple[ChunkAction, ...] = ()
    """Of a router, chunk by chunk, prompt included."""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the prompt's tokens from `prompt_logprobs_from` on, one for each; nothing precedes the first token."""
    index: int = 0
    """Which one of `Request.n` answers."""
    error: str = ""
    first_token_s: float | None = None
    """From `submit`; None: there is none."""
    seconds: float = 0.0
    """From `submit` to the end."""
