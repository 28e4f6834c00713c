"""Streamed answers under a policy: what is shown was judged with what follows it, however the pieces fall."""

import asyncio
import random
from types import SimpleNamespace

import pytest

from bem.config.safety import SafetyPolicy
from bem.engine.request import Request, Result, TokenLogprob
from bem.safety.detector import Checked
from bem.safety.guard import PolicyGuard
from bem.safety.personal import find_personal, redact
from bem.serving.driver import Progress
from bem.serving.judged import JudgedAnswering

BAD = "turnip"
SAFE = "The library opens at nine and closes at six, tea is served in the hall for all. " * 4
CARD = "4111 1111 1111 1111"


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, ids, **options):
        return "".join(map(chr, ids))


def check(text: str) -> Checked:
    return Checked(0.0, (), tuple(find_personal(text)), {"harm": float(BAD in text)})


class Judge:
    """A policy without a process and a log."""

    def __init__(self, rules, **stream):
        given = {
            "rules": {"answers": rules},
            "stream": {"check_every": 30, "hold_back": 48, **stream},
        }
        self.policy, self.tokenizer = SafetyPolicy.model_validate(given), Letters()
        self.guard, self.notes = PolicyGuard(self.policy, check, {"harm": 0.5}), []

    async def ruled(self, text, key):
        return self.guard.rule(text, "answers", key)

    async def noted(self, id, key, text, ruling):
        self.notes.append(ruling.action)


class Written:
    """An answer that is made piece by piece, as an engine tells of it."""

    def __init__(self, text: str, sizes, stop=()):
        self.text, self.sizes, self.cancelled = text, sizes, []
        self.driver = SimpleNamespace(cancel=self.cancelled.append)
        self.jobs = [SimpleNamespace(request=Request([1, 2], stop=list(stop)), over=False)]
        self.left = self._events()

    def _events(self):
        ids, at = [ord(c) for c in self.text], 0
        logprobs = [TokenLogprob(i, -1.0) for i in ids]
        while at < len(ids):
            stop = at + next(self.sizes)
            yield Progress("v", 0, tuple(ids[at:stop]), tuple(logprobs[at:stop]), ())
            at = stop
        yield Result(0, tuple(ids), self.text, "stop", "v", 2, 0, logprobs=tuple(logprobs))

    async def next(self):
        return 0, next(self.left)

    async def results(self):
        return [event for event in self._events() if isinstance(event, Result)]


def sizes(seed: int):
    rng = random.Random(seed)
    while True:
        yield rng.randint(1, 40)


def read(text: str, judge: Judge, seed: int = 0):
    """(pieces shown, log-probabilities given, the end) as a client gets them."""
    written = Written(text, sizes(seed))
    answering = JudgedAnswering(written, judge, "id", "-")

    async def all_of_it():
        shown, logprobs, tokens = [], [], 0
        (reader,) = answering.readers(None)
        while True:
            _, news = await answering.next()
            if isinstance(news, Result):
                shown.append(reader.finish(news.text))
                logprobs += news.logprobs[tokens:]
                return shown, logprobs, news, written
            shown.append(reader.push(news.token_ids))
            logprobs += news.logprobs
            tokens += len(news.token_ids)

    return asyncio.run(all_of_it())


@pytest.mark.parametrize("seed", range(6))
def test_what_is_let_through_is_the_answer_letter_by_letter(seed):
    judge = Judge({"harm": [{"do": "refuse"}]})
    shown, logprobs, end, _ = read(SAFE, judge, seed)
    assert "".join(shown) == SAFE and len(shown) > 3
    assert [p.token_id for p in logprobs] == [ord(c) for c in SAFE]
    assert end.finish_reason == "stop" and judge.notes == ["allow"]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("place", [0, 60, 150, 300])
def test_nothing_of_what_is_refused_is_shown_and_the_engine_is_told_to_stop(seed, place):
    judge = Judge({"harm": [{"do": "refuse", "say": "No."}]})
    text = SAFE[:place] + f" {BAD} " + SAFE
    shown, _, end, written = read(text, judge, seed)
    said = "".join(shown)
    assert text.startswith(said) and BAD[:2] not in said[place:] and len(said) <= place + 1
    assert (end.finish_reason, end.error, end.text, end.logprobs) == ("filtered", "No.", said, ())
    assert judge.notes == ["refuse"]
    assert written.cancelled == [written.jobs[0]] and written.jobs[0].over


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("place", [0, 7, 71, 160])
def test_personal_data_is_redacted_wherever_the_pieces_fall(seed, place):
    judge = Judge({"personal": [{"do": "redact"}]})
    text = f"{SAFE[:place]} {CARD} and ada.lovelace@example.org {SAFE} 10.1.2.3"
    shown, logprobs, end, _ = read(text, judge, seed)
    said = "".join(shown)
    assert said == redact(text, find_personal(text)) == end.text
    assert said.count("[card]") == said.count("[email]") == said.count("[ip]") == 1
    assert end.finish_reason == "stop" and judge.notes == ["redact"]
    given = "".join(chr(p.token_id) for p in logprobs)  # none of what was redacted, or behind it
    assert SAFE[:place].startswith(given.rstrip(" "))


def test_a_text_without_blanks_goes_on_too():
    text = "x" * 2000
    shown, _, end, _ = read(text, Judge({"harm": [{"do": "refuse"}]}))
    assert "".join(shown) == text and len(shown) > 3 and end.finish_reason == "stop"


def test_a_whole_answer_is_refused_or_redacted_as_one():
    async def whole(text, rules):
        return await JudgedAnswering(Written(text, sizes(0)), Judge(rules), "id", "-").results()

    (refused,) = asyncio.run(whole(f"a {BAD}", {"harm": [{"do": "refuse", "say": "No."}]}))
    assert (refused.text, refused.finish_reason, refused.error) == ("", "filtered", "No.")
    (clean,) = asyncio.run(whole(f"a {CARD}", {"personal": [{"do": "redact"}]}))
    assert (clean.text, clean.finish_reason, clean.logprobs) == ("a [card]", "stop", ())
    (plain,) = asyncio.run(whole("a", {"personal": [{"do": "redact"}]}))
    assert plain.text == "a" and plain.logprobs
