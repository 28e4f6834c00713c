"""Answers that must have a form: a JSON schema, a regular expression, one of some choices, a grammar.

What may come next is llguidance's to say (the extra `grammar`); what is likely stays the model's.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from bem.errors import EngineError, MissingExtra

Kind = Literal["json_schema", "regex", "choice", "lark"]
COMPILED = 64
"""Grammars kept compiled."""
LONGEST = 1 << 16
"""Characters of the longest grammar: compiling takes half a second then, and many times that of twice as many."""
WHITESPACE = r"(?:\x20|\n\x20{0,32})?"
"""Between two tokens of JSON: one space, or a new line and its indentation. Without a bound a model may go on
with spaces for ever."""


@dataclass(frozen=True)
class Grammar:
    """The form of an answer."""

    kind: Kind
    text: str
    """choice: a JSON list of strings."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            kinds = ", ".join(get_args(Kind))
            raise EngineError(f"no kind of grammar is called {self.kind!r}. There is: {kinds}.")
        if len(self.text) > LONGEST:
            raise EngineError(
                f"a {self.kind} grammar of {len(self.text)} characters is longer than {LONGEST}: use a simpler one."
            )

    @staticmethod
    def json_schema(schema: str | Mapping[str, Any]) -> Grammar:
        """JSON that validates. Keywords that cannot be held to (`uniqueItems`, `not`, `if`, ...) are refused when it
        is used; what the schema's own `x-guidance` says of white space goes before `WHITESPACE`."""
        return Grammar("json_schema", schema if isinstance(schema, str) else json.dumps(schema))

    @staticmethod
    def regex(pattern: str) -> Grammar:
        """The whole answer matches, in the syntax of Rust's `regex`: no look-around, no back-references."""
        return Grammar("regex", pattern)

    @staticmethod
    def choice(texts: Sequence[str]) -> Grammar:
        """One of these, letter by letter.

        Raises:
            EngineError: there is nothing to choose, or not from texts.
        """
        if isinstance(texts, str) or not texts or not all(isinstance(t, str) for t in texts):
            raise EngineError(f"a choice needs a list of at least one text, got {texts!r}.")
        return Grammar("choice", json.dumps(list(texts), ensure_ascii=False))

    @staticmethod
    def lark(grammar: str) -> Grammar:
        """A context-free grammar in Lark's syntax, as llguidance reads it; it begins at `start`."""
        return Grammar("lark", grammar)


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, inner: Any):
        self._inner = inner

    @property
    def done(self) -> bool:
        """Can nothing follow?"""
        return self._inner.is_stopped()

    @property
    def error(self) -> str:
        """Why it cannot go on; empty: it can."""
        return self._inner.get_error().partition("\n<state>")[0]

    def allowed(self, entries: int) -> Bool[Tensor, " entries"]:
        """Which tokens may come next, on the host; none, once there is an error.

        Args:
            entries: of the model's vocabulary.
        """
        bits = np.frombuffer(self._inner.compute_bitmask(), np.uint8)
        known = np.unpackbits(bits, bitorder="little")[:entries].astype(bool)
        mask = torch.zeros(entries, dtype=torch.bool)
        if not self._inner.is_error():
            mask[: len(known)] = torch.from_numpy(known)
        return mask

    def accept(self, token: int) -> None:
        """This one came."""
        self._inner.consume_token(token)


class Grammars:
    """Compiles grammars for one tokenizer, each once."""

    def __init__(self, tokenizer: Any, ends: frozenset[int], entries: int):
        """
        Args:
            ends: tokens that end an answer: they may come where the grammar may end.
            entries: of the model's vocabulary.
        """
        self._tokenizer, self._ends = tokenizer, ends
        self._entries = max(entries, len(tokenizer))
        self._known: OrderedDict[Grammar, Any] = OrderedDict()
        self._vocabulary: Any = None

    def matcher(self, grammar: Grammar) -> Matcher:
        """At the beginning of an answer.

        Raises:
            MissingExtra: llguidance is not installed.
            EngineError: the grammar cannot be used, or there is no token that ends an answer.
        """
        compiled = self._known.pop(grammar, None)
        if compiled is None:
            compiled = self._compile(grammar)
        self._known[grammar] = compiled
        if len(self._known) > COMPILED:
            self._known.popitem(last=False)
        return Matcher(compiled.deep_copy())

    def _compile(self, grammar: Grammar) -> Any:
        try:
            from llguidance import LLMatcher
            from llguidance.hf import from_tokenizer
        except ImportError:
            raise MissingExtra("llguidance", "grammar", "Answers under a grammar") from None
        if not self._ends:
            raise EngineError(
                "a grammar needs a token that ends an answer, and neither model nor tokenizer names one: set "
                "model.generation_config.eos_token_id and make a new engine."
            )
        try:
            if self._vocabulary is None:
                ends = sorted(self._ends)
                self._vocabulary = from_tokenizer(self._tokenizer, self._entries, ends)
            compiled = LLMatcher(self._vocabulary, _source(grammar, LLMatcher), log_level=0)
        except ValueError as error:
            raise EngineError(f"no {grammar.kind} grammar can be used: {error}.") from error
        if compiled.is_error():
            raise EngineError(
                f"this {grammar.kind} grammar cannot be used: {compiled.get_error()}. Leave out what is not "
                f"supported: {_shortened(grammar.text)}"
            )
        return compiled


def _source(grammar: Grammar, compiler: Any) -> str:
    """In llguidance's own form."""
    if grammar.kind == "json_schema":
        spaces = {"whitespace_pattern": WHITESPACE}
        return compiler.grammar_from_json_schema(grammar.text, defaults=spaces)
    if grammar.kind == "regex":
        return compiler.grammar_from_regex(grammar.text)
    if grammar.kind == "lark":
        return compiler.grammar_from_lark(grammar.text)
    texts = (json.dumps(text, ensure_ascii=False) for text in json.loads(grammar.text))
    return compiler.grammar_from_lark(f"start: {' | '.join(texts)}")


def _shortened(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
