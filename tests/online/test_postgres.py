"""The log of feedback on a real PostgreSQL server: the contract that it has on SQLite, and that of a server that dies."""

import signal
import subprocess
import sys
import threading

import pytest

from bem.errors import DataError, MissingExtra, OnlineError
from bem.online.events import Feedback, Served
from bem.online.feedback import FeedbackLog
from tests.online import postgres
from tests.online.test_feedback import (  # noqa: F401 - run here with the fixture `log` below
    WRITER,
    score,
    served,
    test_a_refused_event_leaves_no_hole_in_the_numbers,
    test_an_export_holds_everything_and_is_read_back,
    test_events_come_in_the_order_of_their_numbers_joined_with_their_request,
    test_the_same_id_is_one_event_however_often_it_is_sent,
    test_what_was_changed_by_hand_is_not_learned_from,
    test_whoever_was_erased_may_come_again_and_old_events_stay_gone,
)


@pytest.fixture(scope="module")
def server():
    with postgres.running() as running:
        yield running


@pytest.fixture
def url(server):
    import psycopg

    with psycopg.connect(host=str(server.folder), user="postgres", autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return server.url


@pytest.fixture
def log(url):
    log = FeedbackLog(url)
    log.record(served(1))
    yield log
    log.close()


def test_any_script_is_kept_and_nothing_is_a_statement(log):
    text = "日本語 🎉 \u2028 '; DROP TABLE bem_events; --"
    log.record(Served("r2", "v", [{"role": "user", "content": text}], text, "u1"))
    log.add(Feedback("e1", "r2", "correction", text=text))
    (event,) = log.read()
    assert event.feedback.text == event.request.answer == text
    with pytest.raises(DataError, match="no request"):
        log.add(score(2, request="' OR 1=1 --"))


def test_processes_that_open_a_new_log_at_once_and_write_leave_no_hole(url):
    made, failed = [], []

    def write(who):
        try:
            log = FeedbackLog(url)
            log.record(Served(f"r{who}", "v", "q", "a"))
            made.extend(log.add(score(f"{who}-{i}", who)).sequence for i in range(15))
        except Exception as error:  # told below: threads swallow it
            failed.append(error)

    threads = [threading.Thread(target=write, args=(w,)) for w in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and sorted(made) == list(range(1, 61))
    assert [e.sequence for e in FeedbackLog(url).read()] == sorted(made)


def test_what_was_acknowledged_survives_a_database_that_is_killed(server, url):
    log, acknowledged = FeedbackLog(url), -1
    for after in (20, 60):
        command = [sys.executable, "-c", WRITER, url, str(acknowledged + 1)]
        pipe = subprocess.PIPE
        writer = subprocess.Popen(command, stdout=pipe, text=True)
        for _ in range(after):
            acknowledged = int(writer.stdout.readline())
        server.end(signal.SIGKILL)
        rest = writer.stdout.read().split()
        acknowledged = int(rest[-1]) if rest else acknowledged
        assert writer.wait() == 1  # told that nothing is acknowledged any more
        with pytest.raises(OnlineError, match="could not be"):
            log.add(Feedback("lost", "r", "score", score=0.5))
        server.start()
        events = log.read(limit=10**6)  # by the connections that it had
        assert [e.sequence for e in events] == list(range(1, len(events) + 1))
        assert [e.feedback.id for e in events[: acknowledged + 1]] == [
            f"e{i}" for i in range(acknowledged + 1)
        ]
        acknowledged = len(events) - 1


def test_a_commit_is_on_disk_whatever_the_servers_default_is(log, url):
    with log._engine.connect() as connection:
        connection.exec_driver_sql("ALTER ROLE postgres SET synchronous_commit = off")
        connection.commit()
    try:
        fresh = FeedbackLog(url)
        for _ in range(2):  # a transaction that is rolled back does not undo it
            with fresh._engine.connect() as connection:
                shown = connection.exec_driver_sql("SHOW synchronous_commit").scalar()
                assert shown == "on"
    finally:
        with log._engine.connect() as connection:
            connection.exec_driver_sql("ALTER ROLE postgres RESET synchronous_commit")
            connection.commit()


def test_a_password_is_not_in_messages_and_a_missing_driver_is_named():
    with pytest.raises(OnlineError) as failed:
        FeedbackLog("postgresql+psycopg://ada:secret@127.0.0.1:9/x")
    assert "could not be opened" in str(failed.value) and "secret" not in str(failed.value)
    with pytest.raises(MissingExtra, match="pg8000"):
        FeedbackLog("postgresql+pg8000://127.0.0.1:9/x")
