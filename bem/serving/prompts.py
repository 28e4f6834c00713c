"""From what a client asked to what the engine is asked: prompts as tokens, sampling, limits.

A conversation is written as training writes it (`bem.training.data.encode`), so that the router finds its
turns where it learnt them, and the next turn finds the chunks of the one before.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bem.config import ServingConfig
from bem.engine.grammar import Grammar
from bem.engine.request import SEEDS, Request, Sampling
from bem.errors import BemError, Refused
from bem.evidence.passages import Passage
from bem.evidence.rerank import load_reranker
from bem.evidence.retriever import Evidence, Retriever
from bem.serving.schemas import Asked, ChatRequest, CompletionRequest, Message
from bem.serving.tools import Tools, call_form, has_calls, messages_of, tools_of
from bem.training.chat import turns_of_messages
from bem.training.data import encode, end_of_turn, prompt_of
from bem.training.example import Example
from bem.vision.eyes import VisionRecord

UNLIMITED = 1 << 40
CHARACTERS = 128
"""Of a token at most: vocabularies hold runs of so many spaces."""


@dataclass(frozen=True)
class Prompt:
    """One prompt as tokens."""

    ids: tuple[int, ...]
    turn_starts: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    """Tokens that end an answer, beside the model's own."""


@dataclass(frozen=True)
class Limits:
    """Of the base."""

    tokens: int
    """Of prompt and answer together."""
    vocabulary: int


@dataclass(frozen=True)
class Prepared:
    """What is to be generated for a client's request."""

    requests: tuple[Request, ...]
    """Choice by choice: the n answers to the first prompt, then those to the second."""
    prompts: tuple[Prompt, ...]
    evidence: Evidence | None
    echoed: tuple[tuple[int, ...], ...] = ()
    """The prompt of each choice, if it is to stand before the answer."""
    vision: VisionRecord | None = None
    """What is seen on the picture; None: there is none."""
    tools: Tools | None = None
    """What the answers may call."""


class Writer:
    """Writes requests for the engine. One thread uses it: tokenizers are not made for two."""

    def __init__(
        self,
        tokenizer: Any,
        config: ServingConfig,
        limits: Limits,
        retriever: Retriever | None = None,
    ):
        """retriever: finds and judges evidence; None: there is no index."""
        self.tokenizer, self.config, self.limits = tokenizer, config, limits
        self.retriever = self._judge = retriever

    def prepare(self, asked: Asked, owner: str, route: str | None) -> Prepared:
        """What is to be generated.

        Args:
            owner: on whose behalf; "": nobody's in particular.
            route: expert that the model's name asks for.
        Raises:
            Refused: something that cannot be done.
        """
        check_supported(asked)
        tools = tools_of(asked, self.tokenizer)
        evidence = self._evidence(asked)
        prompts = self._prompts(asked, evidence, tools)
        n = asked.n or 1
        if len(prompts) * n > self.config.max_choices:
            raise Refused(
                400,
                f"{len(prompts)} prompts times n {n} are more than the {self.config.max_choices} answers of one request.",
                "n",
            )
        self._check_bias(asked)
        requests = []
        for prompt in prompts:
            most = self._most(asked, prompt)
            seeds = _seeds(asked, n)
            requests += [
                self._request(asked, prompt, most, seed, owner, route, evidence, tools)
                for seed in seeds
            ]
        echo = isinstance(asked, CompletionRequest) and asked.echo
        echoed = tuple(prompt.ids for prompt in prompts for _ in range(n)) if echo else ()
        return Prepared(tuple(requests), tuple(prompts), evidence, echoed, tools=tools)

    def _request(
        self,
        asked: Asked,
        prompt: Prompt,
        most: int,
        seed: int | None,
        owner: str,
        route: str | None,
        evidence: Evidence | None,
        tools: Tools | None,
    ) -> Request:
        limit = self.config.timeout_s
        return Request(
            prompt.ids,
            max_new_tokens=most,
            sampling=_sampling(asked, seed),
            stop=(*asked.stop, *(tools.stop if tools else ())),
            stop_token_ids=(*(asked.stop_token_ids or ()), *prompt.ends),
            ignore_eos=bool(asked.ignore_eos),
            logprobs=_logprobs(asked),
            prompt_logprobs=_logprobs(asked) if _echoes(asked) else None,
            grammar=tools.grammar if tools and tools.grammar else grammar_of(asked),
            turn_starts=prompt.turn_starts,
            evidence=None if evidence is None else evidence.record.features(),
            route=asked.bem.route if route is None else route,
            strength=1.0 if asked.bem.strength is None else asked.bem.strength,
            key=owner,
            tenant=owner,
            timeout_s=min(asked.bem.timeout_s or limit, limit),
        )

    def _most(self, asked: Asked, prompt: Prompt) -> int:
        """Tokens of the answer at most."""
        if isinstance(asked, ChatRequest):
            wanted = asked.max_completion_tokens or asked.max_tokens
        else:
            wanted = asked.max_tokens if isinstance(asked, CompletionRequest) else None
        room = self.limits.tokens - len(prompt.ids)
        if wanted == 0 and _echoes(asked) and room >= 0:
            return 0
        if room < (wanted or 1):
            raise Refused(
                400,
                f"The prompt has {len(prompt.ids)} tokens and the answer may have {wanted or 1}: together more than the "
                f"{self.limits.tokens} that this model takes.",
                "messages" if isinstance(asked, ChatRequest) else "prompt",
                "context_length_exceeded",
            )
        return wanted or min(room, self.config.max_new_tokens)

    def _check_bias(self, asked: Asked) -> None:
        known = self.limits.vocabulary
        if odd := [token for token in asked.logit_bias or () if token >= known]:
            raise Refused(
                400, f"logit_bias names token {odd[0]}: the model has {known}.", "logit_bias"
            )

    # --- prompts ----------------------------------------------------------------------------------

    def _prompts(
        self, asked: Asked, evidence: Evidence | None, tools: Tools | None
    ) -> list[Prompt]:
        shown = [] if evidence is None else [p.shown for p in reversed(evidence.passages)]
        if isinstance(asked, ChatRequest):
            return [self._conversation(asked.messages, shown, tools)]
        assert isinstance(asked, CompletionRequest)
        given = asked.prompt
        if isinstance(given, str):
            return [self._text("\n".join([*shown, given]))]
        if isinstance(given[0], int):
            return [Prompt(tuple(given))]  # pyright: ignore[reportArgumentType]
        return [self._text(p) if isinstance(p, str) else Prompt(tuple(p)) for p in given]  # pyright: ignore

    def _text(self, text: str) -> Prompt:
        self._check_length(text, "prompt")
        try:
            ids = tuple(self.tokenizer(text)["input_ids"])
        except Exception as error:  # `tokenizers` raises plain Exceptions
            raise Refused(400, f"The tokenizer refuses the prompt: {error}", "prompt") from None
        if not ids:
            raise Refused(400, "The prompt has no token: give it at least one.", "prompt")
        return Prompt(ids)

    def _conversation(
        self, messages: Sequence[Message], shown: list[str], tools: Tools | None
    ) -> Prompt:
        tokenizer, schemas = self.tokenizer, list(tools.shown) if tools else None
        self._check_length("".join(message.text for message in messages), "messages")
        self._check_length(str(schemas or ""), "tools")
        try:
            if schemas or has_calls(messages):
                call_form(tokenizer, repr(tokenizer.chat_template))  # or calls would be left out
                said = messages_of(messages, shown)
                ids, starts = prompt_of(turns_of_messages(said, tokenizer, schemas), tokenizer)
            else:
                example = example_of(messages, shown)
                encoded = encode(example, tokenizer, UNLIMITED, with_answer=False)
                ids = encoded.input_ids
                starts = [i for i, start in enumerate(encoded.turn_starts) if start]
            end = end_of_turn(tokenizer)
        except Refused:
            raise
        except BemError as error:
            raise Refused(400, str(error).removeprefix("Row 'request': "), "messages") from error
        return Prompt(tuple(ids), tuple(starts), (end,))

    def _check_length(self, text: str, param: str) -> None:
        """Refuse what can never fit before it is cut into tokens, for which others would wait."""
        if len(text) > CHARACTERS * self.limits.tokens:
            raise Refused(
                400,
                f"The prompt has {len(text)} characters: more than {self.limits.tokens} tokens can hold.",
                param,
                "context_length_exceeded",
            )

    # --- evidence ---------------------------------------------------------------------------------

    def _evidence(self, asked: Asked) -> Evidence | None:
        wanted = asked.bem
        if wanted.evidence is None and not wanted.retrieve:
            return None
        query = _question(asked)
        if wanted.evidence is not None:
            if wanted.retrieve:
                raise Refused(400, "Give bem.evidence or bem.retrieve, not both.", "bem")
            passages = [Passage(str(i), text) for i, text in enumerate(wanted.evidence)]
            return self._judged(query, passages)
        if self.retriever is None or self.retriever.index is None:
            raise Refused(400, "This server has no index: start it with --index.", "bem.retrieve")
        return self.retriever.retrieve(query)

    def _judged(self, query: str, passages: list[Passage]) -> Evidence:
        if self._judge is None:
            from_config = self.config.retrieval_ms
            self._judge = Retriever(None, load_reranker("tiny"), timeout_ms=from_config)
        return self._judge.rank(query, passages)


def example_of(messages: Sequence[Message], evidence: Sequence[str] = ()) -> Example:
    """A conversation as training has it: a system message, turns of question and answer, a question.

    Messages of one role behind each other are one, line by line.

    Raises:
        Refused: it begins with an answer, or does not end with a question.
    """
    said: list[tuple[str, str]] = []
    if any(message.tool_calls for message in messages):
        raise Refused(400, "A conversation with calls of tools is not taken here.", "messages")
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        if said and said[-1][0] == role:
            said[-1] = role, f"{said[-1][1]}\n{message.text}"
        else:
            said.append((role, message.text))
    system = said.pop(0)[1] if said[0][0] == "system" else ""
    roles = [role for role, _ in said]
    if roles != ["user", "assistant"] * (len(said) // 2) + ["user"]:
        raise Refused(
            400,
            "messages must be, after system messages at the beginning, user and assistant in turn, and end with the "
            f"user's; got {', '.join(m.role for m in messages)[:200]}.",
            "messages",
        )
    texts = [text for _, text in said]
    history = tuple(zip(texts[:-1:2], texts[1::2], strict=True))
    shown = tuple(evidence)
    return Example("request", texts[-1], (), evidence=shown, history=history, system=system)


def check_supported(asked: Asked) -> None:
    """Refuse what cannot be done yet.

    Raises:
        Refused: names the field.
    """
    odd: dict[str, bool] = {}
    if isinstance(asked, CompletionRequest):
        odd["echo with stream"] = bool(asked.echo and asked.stream)
        odd["max_tokens 0 without echo and logprobs"] = asked.max_tokens == 0 and not _echoes(asked)
        odd["suffix"] = bool(asked.suffix)
        odd["best_of"] = asked.best_of not in (None, asked.n or 1)
    if isinstance(asked, ChatRequest):
        if asked.tools and asked.tool_choice != "none" and grammar_of(asked) is not None:
            raise Refused(400, "Give tools or a form for the answer, not both.", "tools")
        if asked.top_logprobs is not None and not asked.logprobs:
            raise Refused(400, "top_logprobs needs logprobs: true.", "top_logprobs")
    if asked.stream_options is not None and not asked.stream:
        raise Refused(400, "stream_options needs stream: true.", "stream_options")
    for name in (name for name, used in odd.items() if used):
        why = f"{name} is not supported by this server."
        raise Refused(400, why, name.partition(" ")[0], "unsupported_value")


def grammar_of(asked: Asked) -> Grammar | None:
    """The form that an answer must have.

    Raises:
        Refused: two forms, or none where one is announced.
    """
    found = [g for g in (_openai_form(asked), _vllm_form(asked)) if g is not None]
    if len(found) > 1:
        raise Refused(400, "Give one form for the answer, not several.", "structured_outputs")
    return found[0] if found else None


def _openai_form(asked: Asked) -> Grammar | None:
    form = asked.response_format if isinstance(asked, ChatRequest) else None
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return Grammar.json_schema({"type": "object"})
    if form.json_schema is None:
        raise Refused(
            400, "response_format of type json_schema needs json_schema.", "response_format"
        )
    return Grammar.json_schema(form.json_schema.schema_)


def _vllm_form(asked: Asked) -> Grammar | None:
    form = asked.structured_outputs
    if form is None:
        return None
    made = {
        "json_": Grammar.json_schema,
        "regex": Grammar.regex,
        "choice": Grammar.choice,
        "grammar": Grammar.lark,
    }
    given = {name: value for name in made if (value := getattr(form, name)) is not None}
    if len(given) != 1:
        why = "structured_outputs needs exactly one of json, regex, choice, grammar."
        raise Refused(400, why, "structured_outputs")
    ((name, value),) = given.items()
    return made[name](value)


def _echoes(asked: Asked) -> bool:
    """Are log-probabilities of the prompt wanted?"""
    return isinstance(asked, CompletionRequest) and bool(asked.echo) and asked.logprobs is not None


def _sampling(asked: Asked, seed: int | None) -> Sampling:
    one = 1.0 if asked.temperature is None else asked.temperature
    return Sampling(
        temperature=one,
        top_p=asked.top_p or 1.0,
        top_k=max(asked.top_k or 0, 0),
        min_p=asked.min_p or 0.0,
        repetition_penalty=asked.repetition_penalty or 1.0,
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        logit_bias=dict(asked.logit_bias or {}),
        seed=seed,
    )


def _seeds(asked: Asked, n: int) -> list[int]:
    """One for each answer: the first is the request's own."""
    first = secrets.randbits(61) if asked.seed is None else asked.seed % SEEDS
    return [(first + i) % SEEDS for i in range(n)]


def _logprobs(asked: Asked) -> int | None:
    if isinstance(asked, ChatRequest):
        return (asked.top_logprobs or 0) if asked.logprobs else None
    return asked.logprobs if isinstance(asked, CompletionRequest) else None


def _question(asked: Asked) -> str:
    if isinstance(asked, ChatRequest):
        return next((m.text for m in reversed(asked.messages) if m.role == "user"), "")
    assert isinstance(asked, CompletionRequest)
    if not isinstance(asked.prompt, str):
        raise Refused(400, "Evidence needs a prompt that is one text.", "prompt")
    return asked.prompt
