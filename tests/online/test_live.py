"""The loop on a log that grows: nothing that a client sends stops it, and it stops when it is told to."""

import threading

from bem.errors import DataError
from bem.online.events import Feedback, Served
from bem.online.feedback import FeedbackLog
from bem.online.live import catch_up, follow
from tests.online.toys import SKILLS, loop


def say(log, i, prompt="skill", text=None):
    log.record(Served(f"r{i}", "", prompt, "0", f"u{i}"))
    right = f"{i % SKILLS} 1.0" if text is None else text
    log.add(Feedback(f"e{i}", f"r{i}", "correction", f"u{i}", text=right))


def short(row):
    if len(row.references[0]) > 10:
        raise DataError("its answer is too long")


def test_what_cannot_be_learned_from_is_passed_over_once_and_noted(tmp_path):
    log = FeedbackLog(tmp_path / "log.db")
    for i in range(16):
        odd = {3: {"prompt": [1, 2, 3]}, 9: {"text": "0 1.0 and much more"}}.get(i, {})
        say(log, i, **odd)
    rounds = []
    with loop(tmp_path) as made:
        assert catch_up(made, log, check=short, on_round=rounds.append) == 16
        assert catch_up(made, log, check=short) == 0
        noted = [e for e in made.desk.entries() if e["what"] == "passed over"]
    assert [e["sequence"] for e in noted] == [4, 10]
    assert "too long" in noted[1]["reason"]
    assert [r.event for r in rounds] == [7, 14] and made.sequence == 16


def test_it_follows_a_log_until_it_is_stopped_between_two_rounds(tmp_path):
    log, stopped = FeedbackLog(tmp_path / "log.db"), threading.Event()
    for i in range(40):
        say(log, i)

    def stop_after_three(done):
        if done.event == 24:
            stopped.set()

    with loop(tmp_path) as made:
        follow(made, log, stopped, wait_s=60.0, on_round=stop_after_three)
        assert made.event == 24 and made.desk.status()["event"] == 24
