"""The dashboard's numbers: what was done in each five seconds, and who spoke in the last answers."""

from bem.engine.engine import StepStats
from bem.engine.request import ChunkAction, Result
from bem.serving.history import ANSWERS, ENTRIES, History


def stats(*finished, decoded=1, running=1) -> StepStats:
    return StepStats(1, 0.0, 0, 10, 5, decoded, 1, running, 0, finished)


def result(first=0.1, **changes) -> Result:
    actions = (ChunkAction(0, "a", 4, 1.0), ChunkAction(6, "base", 0, 0.0))
    values = {"token_ids": (1, 2, 3), "text": "", "finish_reason": "stop", "version": "f" * 64,
              "prompt_tokens": 7, "cached_tokens": 2, "actions": actions, "first_token_s": first}  # fmt: skip
    return Result(id=0, **{**values, **changes})


def test_steps_of_five_seconds_are_one_entry():
    now = [1000.0]
    history = History(lambda: now[0])
    history.step(stats(decoded=3))
    now[0] = 1004.9
    history.step(stats(decoded=4, running=3))
    now[0] = 1011.0
    history.step(stats(result(0.1), result(0.3), decoded=1))
    first, second = history.shown()["entries"]
    assert (first["generated"], first["prefilled"], first["reused"], first["running"]) == (
        7,
        20,
        10,
        3,
    )
    assert (first["age"], second["age"]) == (11.0, 1.0)
    assert second["experts"] == {"a": 2, "base": 2} and second["versions"] == {"f" * 12: 2}
    assert (second["first_p50_ms"], second["first_p95_ms"]) == (300.0, 300.0)
    assert first["first_p50_ms"] is None


def test_an_answer_is_shown_by_who_spoke_for_how_long_and_not_by_what_was_said():
    history = History(lambda: 0.0)
    history.step(stats(result(text="a secret")))
    (shown,) = history.shown()["answers"]
    assert shown["route"] == [
        {"expert": "a", "start": 0, "tokens": 6},
        {"expert": "base", "start": 6, "tokens": 4},  # of 7 + 3
    ]
    assert "secret" not in str(history.shown())


def test_no_more_is_kept_than_is_shown():
    now = [0.0]
    history = History(lambda: now[0])
    for _ in range(500):
        now[0] += 5.0
        history.step(stats(result(), result(version="", actions=(), first=None)))
    shown = history.shown()
    assert (len(shown["entries"]), len(shown["answers"])) == (ENTRIES, ANSWERS)
