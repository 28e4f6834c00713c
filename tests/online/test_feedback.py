import json
import signal
import subprocess
import sys
import threading

import pytest
import sqlalchemy as sa

from bem.errors import ConfigError, DataError, OnlineError
from bem.online.events import Feedback, Served, read_export
from bem.online.feedback import FeedbackLog


def served(number, user="u1", **more):
    return Served(f"r{number}", "version", f"question {number}", f"answer {number}", user, **more)


def score(number, request=1, user="u1", value=0.5):
    return Feedback(f"e{number}", f"r{request}", "score", user, score=value)


@pytest.fixture
def log(tmp_path):
    log = FeedbackLog(tmp_path / "feedback.db")
    log.record(served(1))
    return log


def test_events_come_in_the_order_of_their_numbers_joined_with_their_request(log):
    asked = served(2, actions=({"expert": "sql", "start": 0},), evidence=(0.5,))
    log.record(asked)
    assert [log.add(score(i, 2)).sequence for i in (1, 2, 3)] == [1, 2, 3]
    assert log.add(Feedback("e4", "r1", "preference", over="r2")).sequence == 4
    events = log.read()
    assert [e.sequence for e in events] == [1, 2, 3, 4] and log.last() == 4
    assert events[0].request == asked and events[0].feedback == score(1, 2)
    assert (events[3].request, events[3].over) == (served(1), asked)
    assert [e.sequence for e in log.read(after=2, limit=1)] == [3]


def test_the_same_id_is_one_event_however_often_it_is_sent(log):
    first = log.add(score(1))
    again = [log.add(score(1)) for _ in range(3)]
    assert first.new and not any(r.new for r in again)
    assert {r.sequence for r in again} == {first.sequence} and log.last() == 1
    with pytest.raises(DataError, match="says something else: events are never changed"):
        log.add(score(1, value=0.9))
    assert log.record(served(1)) is False
    with pytest.raises(DataError, match="ids must be unique"):
        log.record(served(1, user="u2"))


def test_a_refused_event_leaves_no_hole_in_the_numbers(log):
    with pytest.raises(DataError, match="no request 'r9' is on record"):
        log.add(score(1, request=9))
    assert log.add(score(2)).sequence == 1


def test_erasing_takes_the_content_out_of_the_files_and_leaves_a_tombstone(tmp_path):
    log = FeedbackLog(tmp_path / "feedback.db")
    log.record(Served("r1", "v", "the secret question", "a", "u1"))
    log.record(served(2, "u2"))
    log.add(Feedback("e1", "r1", "correction", "u1", text="the secret answer"))
    log.add(score(2, 1, "u2"))
    log.add(score(3, 2, "u1"))
    log.add(score(4, 2, "u2"))
    receipt = log.erase("u1", "erase-1")
    assert receipt.new and log.erase("u1", "erase-1") == type(receipt)(receipt.sequence, False)
    said = [(e.feedback.id if e.feedback else None, e.request and e.request.id) for e in log.read()]
    assert said == [(None, None), ("e2", None), (None, "r2"), ("e4", "r2"), (None, None)]
    assert log.read()[4].erase == "u1" and log.request("r1") is None
    files = b"".join(p.read_bytes() for p in tmp_path.iterdir())
    assert b"secret" not in files and b"question 2" in files


def test_whoever_was_erased_may_come_again_and_old_events_stay_gone(log):
    log.add(score(1))
    log.erase("u1", "x")
    assert log.add(score(1)).new is False and log.read()[0].feedback is None
    log.record(served(5))
    assert log.add(score(7, 5)).new and log.read(after=2)[0].request == served(5)


def test_an_export_holds_everything_and_is_read_back(log, tmp_path):
    log.add(score(1))
    log.add(Feedback("e2", "r1", "correction", "u2", text="ähm\u2028"))
    log.erase("u2", "x")
    path = tmp_path / "out" / "log.jsonl"
    assert log.export(path) == 3
    assert list(read_export(path)) == log.read()
    assert [json.loads(line)["sequence"] for line in path.read_text().split("\n")[:-1]] == [1, 2, 3]


def test_writers_at_once_leave_no_hole_and_a_reader_misses_nothing(tmp_path):
    path, seen, done = tmp_path / "feedback.db", [], threading.Event()
    FeedbackLog(path).record(served(1))

    def write(who):
        log = FeedbackLog(path)
        for i in range(15):
            log.add(score(f"{who}-{i}"))

    def read():
        log = FeedbackLog(path)
        while not (done.is_set() and (not seen or seen[-1] == log.last())):
            seen.extend(e.sequence for e in log.read(after=seen[-1] if seen else 0, limit=7))

    writers = [threading.Thread(target=write, args=(w,)) for w in range(4)]
    reader = threading.Thread(target=read)
    for thread in (*writers, reader):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert seen == list(range(1, 61))


WRITER = """
import sys
from bem.online.events import Feedback, Served
from bem.online.feedback import FeedbackLog
log = FeedbackLog(sys.argv[1])
log.record(Served("r", "v", "q", "a"))
for i in range(int(sys.argv[2]), 10**6):
    log.add(Feedback(f"e{i}", "r", "score", score=0.5))
    print(i, flush=True)
"""


def test_what_was_acknowledged_survives_a_kill(tmp_path):
    path, acknowledged = tmp_path / "feedback.db", -1
    for after in (1, 40, 120):
        command = [sys.executable, "-c", WRITER, str(path), str(acknowledged + 1)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for _ in range(after):
            acknowledged = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
        acknowledged = int(rest[-1]) if rest else acknowledged
        process.wait()
        events = FeedbackLog(path).read(limit=10**6)
        assert [e.sequence for e in events] == list(range(1, len(events) + 1))
        assert len(events) >= acknowledged + 1
        assert all(e.feedback.id == f"e{i}" for i, e in enumerate(events))
        acknowledged = len(events) - 1


def test_what_was_changed_by_hand_is_not_learned_from(log, tmp_path):
    log.add(score(1))
    with sa.create_engine(log.url).begin() as connection:
        connection.exec_driver_sql("UPDATE bem_events SET body = replace(body, '0.5', '0.9')")
    with pytest.raises(OnlineError, match="event 1 was changed after it was written"):
        log.read()


def test_places_that_cannot_hold_a_log_are_named(tmp_path):
    with pytest.raises(ConfigError, match="in memory"):
        FeedbackLog("sqlite://")
    with pytest.raises(ConfigError, match="neither a path nor a URL"):
        FeedbackLog("://")
    (tmp_path / "text.db").write_text("this is no database, but text " * 100)
    with pytest.raises(OnlineError, match="could not be opened"):
        FeedbackLog(tmp_path / "text.db")


def test_a_full_disk_acknowledges_nothing(log):
    with log._engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
    sa.event.listen(
        log._engine, "connect", lambda c, _: c.execute(f"PRAGMA max_page_count={pages + 1}")
    )
    log.close()
    kept = []

    def fill():
        for i in range(1000):
            kept.append(log.add(Feedback(f"e{i}", "r1", "correction", text="x" * 500)).sequence)

    with pytest.raises(OnlineError, match="full"):
        fill()
    assert [e.sequence for e in log.read(limit=10**4)] == kept and kept
