"""Between text and tokens: prompts in, ends noticed, answers out."""

from __future__ import annotations

from collections.abc import Sequence as Row
from typing import Any

from bem.bases.limits import own_ends
from bem.engine.request import FinishReason, Result
from bem.engine.sequence import Sequence

TAIL = 16
"""Tokens decoded, beside one for each character of the longest stop string, to look for it: a character may
take several tokens, and some tokens have no text."""


def ends_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the model's own, and the tokenizer's."""
    mark = tokenizer.eos_token_id
    return frozenset([*own_ends(model), *([] if mark is None else [mark])])


class Reader:
    """A tokenizer, and where its answers end."""

    def __init__(self, tokenizer: Any, ends: frozenset[int]):
        self.tokenizer, self.ends = tokenizer, ends
        self.pad_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.name = f"{type(tokenizer).__name__} {len(tokenizer)}"
        """What gives token ids their meaning, for `ChunkKey.root`."""

    def ids_of(self, prompt: str | Row[int]) -> list[int]:
        """Token ids of a prompt."""
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        return [int(token) for token in prompt]

    def why_over(self, sequence: Sequence) -> FinishReason | None:
        """Did the answer end with its last token? Marks what of it belongs to the answer."""
        request, last = sequence.request, sequence.ids[-1]
        is_end = last in self.ends and not request.ignore_eos
        if is_end or last in request.stop_token_ids:
            sequence.ended_by_token = True
            return "stop"
        if request.stop and (text := self._cut(sequence)) is not None:
            sequence.text = text
            return "stop"
        if sequence.matcher is not None and sequence.matcher.done:
            return "stop"
        return "length" if len(sequence.ids) == sequence.most else None

    def _cut(self, sequence: Sequence) -> str | None:
        """The answer up to the first stop string; None: there is none."""
        stops = sequence.request.stop
        window = max(map(len, stops)) + TAIL
        tail = self._decode(sequence.answer[-window:])
        if not any(stop in tail for stop in stops):
            return None
        text = self._decode(sequence.answer)
        found = [at for stop in stops if (at := text.find(stop)) >= 0]
        return text[: min(found)] if found else None

    def _decode(self, ids: Row[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def result(
        self, sequence: Sequence, reason: FinishReason, now: float, actions: tuple
    ) -> Result:
        """What is handed out; now: by the engine's clock."""
        answer, first = sequence.answer, sequence.first_token
        acts, began = sequence.acts, sequence.submitted
        scored = (sequence.first or sequence).prompt_logprobs
        return Result(
            id=sequence.id,
            token_ids=tuple(answer),
            text=self._decode(answer) if sequence.text is None else sequence.text,
            finish_reason=reason,
            version="" if acts is None else acts.version.digest,
            prompt_tokens=sequence.prompt,
            cached_tokens=sequence.cached,
            actions=actions,
            logprobs=tuple(sequence.logprobs[: len(answer)]),
            prompt_logprobs=tuple(scored),
            index=sequence.sample,
            error=sequence.error,
            first_token_s=None if first is None else first - began,
            seconds=now - began,
        )
