"""Answers that are judged before they are sent, whole or piece by piece.

While an answer is made, its end is held back: what a reader gets was judged together with at least
`hold_back` characters that follow it. From the first piece that is refused on nothing is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from bem.config.safety import SafetyPolicy
from bem.engine.request import ChunkAction, Result, TokenLogprob
from bem.safety.guard import Met, Ruling
from bem.safety.personal import redact
from bem.serving.detokenizer import Detokenizer
from bem.serving.driver import Progress
from bem.serving.generation import Answering

PATIENCE = 4
"""Without a blank for so many windows, a text is cut between two letters."""


class Judge(Protocol):
    """What judges: `Guarding`."""

    policy: SafetyPolicy | None
    tokenizer: Any

    async def ruled(self, text: str, key: str) -> Ruling: ...

    async def noted(self, id: str, key: str, text: str, ruling: Ruling) -> None: ...


@dataclass
class _Shown:
    """One answer on its way to its reader."""

    detokenizer: Detokenizer
    text: str = ""
    """As it was made."""
    sent: int = 0
    """Of these characters, as they were made."""
    seen: int = 0
    """Judged so far."""
    piece: str = ""
    """What the next event shows."""
    out: str = ""
    """All that was shown."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    """Of each token that was not told yet: characters of the text up to its end."""
    actions: list[ChunkAction] = field(default_factory=list)
    told: int = 0
    """Tokens told."""
    redacted: bool = False
    met: dict[str, Met] = field(default_factory=dict)
    """The worst of each category so far."""
    over: bool = False

    def push(self, ids: Sequence[int]) -> str:
        """As `Detokenizer.push`: what may be shown with the event that is being read."""
        return self._take()

    def finish(self, text: str) -> str:
        """As `Detokenizer.finish`."""
        return self._take()

    def _take(self) -> str:
        piece, self.piece = self.piece, ""
        return piece


class JudgedAnswering:
    """All choices of one request, as their reader may have them."""

    def __init__(self, inner: Answering, judge: Judge, id: str, key: str):
        assert judge.policy is not None
        self.inner, self.judge, self.id, self.key = inner, judge, id, key
        self.rules = judge.policy.stream
        self.driver, self.jobs = inner.driver, inner.jobs
        self.shown = [_Shown(Detokenizer(judge.tokenizer, j.request.stop)) for j in inner.jobs]

    def give_up(self) -> None:
        """Nobody waits any more."""
        self.inner.give_up()

    def readers(self, tokenizer: Any) -> list[Any]:
        """What was judged is text already."""
        return list(self.shown)

    # --- whole ------------------------------------------------------------------------------------

    async def results(self) -> list[Result]:
        """All of them, in order, each judged as a whole."""
        return [await self._whole(result) for result in await self.inner.results()]

    async def _whole(self, result: Result) -> Result:
        ruling = await self.judge.ruled(result.text, self.key)
        await self.judge.noted(self.id, self.key, result.text, ruling)
        if ruling.action == "refuse":
            return filtered(result, "", ruling.say)
        clean = ruling.text == result.text
        return result if clean else replace(result, text=ruling.text, logprobs=())

    # --- piece by piece ---------------------------------------------------------------------------

    async def next(self) -> tuple[int, Progress | Result]:
        """(choice, what may be shown of it)."""
        while True:
            index, news = await self.inner.next()
            shown = self.shown[index]
            if shown.over:
                continue
            if isinstance(news, Result):
                return index, await self._last(index, news)
            self._take_in(shown, news)
            if len(shown.text) - shown.seen < self.rules.check_every:
                continue
            ruling, stopped = await self._look(shown, last=False)
            if stopped:
                return index, await self._stop(index, news, ruling)
            if shown.piece:
                return index, self._progress(shown, news)

    def _take_in(self, shown: _Shown, news: Progress) -> None:
        for token in news.token_ids:
            shown.text += shown.detokenizer.push([token])
            shown.tokens.append(token)
            shown.ends.append(len(shown.detokenizer.text))
        shown.logprobs += news.logprobs
        shown.actions += news.actions

    async def _look(self, shown: _Shown, last: bool) -> tuple[Ruling, bool]:
        """Judge what was not sent, with what came before it; (ruling, must it end here?)."""
        begin = max(0, shown.sent - self.rules.remembered)
        ruling = await self.judge.ruled(shown.text[begin:], self.key)
        shown.seen = len(shown.text)
        for met in ruling.met:
            if met.category not in shown.met or met.score > shown.met[met.category].score:
                shown.met[met.category] = met
        if ruling.action == "refuse":
            return ruling, True
        self._release(shown, ruling, begin, last)
        return ruling, False

    def _release(self, shown: _Shown, ruling: Ruling, begin: int, last: bool) -> None:
        """Show what is settled: up to a blank before the held end, and up to data that reaches into it."""
        stop = len(shown.text) if last else self._cut(shown)
        spans = [replace(p, start=p.start + begin, end=p.end + begin) for p in ruling.redacted]
        for span in spans:
            stop = span.start if span.start < stop < span.end else stop
        stop = max(stop, shown.sent)
        inside = [
            replace(p, start=max(p.start, shown.sent) - shown.sent, end=p.end - shown.sent)
            for p in spans
            if p.end > shown.sent and p.start < stop
        ]
        shown.piece = redact(shown.text[shown.sent : stop], inside)
        shown.redacted = shown.redacted or bool(inside)
        shown.out += shown.piece
        shown.sent = stop

    def _cut(self, shown: _Shown) -> int:
        stop = len(shown.text) - self.rules.hold_back
        if stop <= shown.sent:
            return shown.sent
        blank = max(shown.text.rfind(c, shown.sent, stop) for c in " \n\t") + 1
        waits = stop - shown.sent
        return blank if blank or waits < PATIENCE * self.rules.hold_back else stop

    def _progress(self, shown: _Shown, news: Progress) -> Progress:
        count = sum(end <= shown.sent for end in shown.ends)
        ids, logprobs = shown.tokens[:count], shown.logprobs[:count]
        del shown.tokens[:count], shown.logprobs[:count], shown.ends[:count]
        shown.told += count
        actions, shown.actions = tuple(shown.actions), []
        given = () if shown.redacted else tuple(logprobs)
        return replace(news, token_ids=tuple(ids), logprobs=given, actions=actions)

    # --- the end ----------------------------------------------------------------------------------

    async def _last(self, index: int, result: Result) -> Result:
        """The end of an answer, judged."""
        shown = self.shown[index]
        shown.text += shown.detokenizer.finish(result.text)
        ruling, stopped = await self._look(shown, last=True)
        shown.over = True
        await self._note(shown, ruling)
        if stopped:
            shown.piece = ""
            return filtered(result, shown.out, ruling.say)
        logprobs = () if shown.redacted else result.logprobs
        return replace(result, text=shown.out, logprobs=logprobs)

    async def _stop(self, index: int, news: Progress, ruling: Ruling) -> Result:
        """The end of an answer that is taken away while it is made."""
        shown, job = self.shown[index], self.jobs[index]
        shown.over = job.over = True
        self.driver.cancel(job)
        await self._note(shown, ruling)
        made = shown.told + len(shown.tokens)
        result = Result(
            index,
            (0,) * made,  # counted, never shown
            "",
            "filtered",
            news.version,
            len(job.request.prompt),
            news.cached_tokens,
            tuple(shown.actions),
        )
        return filtered(result, shown.out, ruling.say)

    async def _note(self, shown: _Shown, ruling: Ruling) -> None:
        """One note for one answer: the strictest of all looks."""
        met = tuple(shown.met.values())
        worst = "refuse" if ruling.action == "refuse" else "redact" if shown.redacted else None
        if worst is None:
            worst = "flag" if any(m.action == "flag" for m in met) else "allow"
        await self.judge.noted(
            self.id, self.key, shown.text, replace(ruling, action=worst, met=met)
        )


def filtered(result: Result, text: str, say: str) -> Result:
    """A result that was taken away: what was shown of it, and what the client is told."""
    return replace(result, text=text, finish_reason="filtered", error=say, logprobs=())
