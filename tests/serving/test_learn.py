"""A server that learns: corrections come in over HTTP, and what was learned from them answers, or nothing changes."""

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from bem.config import LearningConfig, OnlineConfig, ServingConfig
from bem.online.desk import Desk
from bem.runs.store import Store
from bem.serving.client import Client
from bem.serving.learner import LearnerProcess
from bem.serving.server import Server
from tests.serving.test_versions import wait_for

ONLINE = OnlineConfig(
    round_size=8, batch_size=8, learning_rate=0.05, largest_step=1.0, largest_distance=100.0,
    candidate_every=16, margin=0.3, tolerance=0.3, drift_window=200, held_share=0.3, max_length=64,
    watch_events=16, steps_per_round=8, snapshot_every=2, max_share=1.0, events_per_source=400,
)  # fmt: skip
WORDS = ["function", "value", "docstring", "return"]


def config_of(home, base):
    """Of a server that learns."""
    learn = LearningConfig(folder=str(home / "online"), score="tokens", rank=4, niceness=0, wait_s=0.1, online=ONLINE)  # fmt: skip
    where = {"store": str(home / "store"), "feedback": str(home / "feedback.db"), "learn": learn}
    return ServingConfig(base=str(base), port=0, watch_s=0.1, max_new_tokens=2, **where)


@contextmanager
def learning(home, base):
    """A server on its own port, whose learner is another process."""
    server = Server(config_of(home, base)).start()
    try:
        yield server
    finally:
        server.stop()


def taught(server, i, text=None):
    """Ask, and say what would have been right; the version that answered."""
    asked = Client(server.url)
    prompt = f"name the {WORDS[i % 4]} {i}"
    answer = asked.post("/v1/completions", {"model": "bem", "prompt": prompt, "max_tokens": 1})
    right = WORDS[i % 4] if text is None else text
    said = {"request": answer["id"], "kind": "correction", "text": right, "id": f"said {i}"}
    asked.post("/v1/feedback", said)
    return answer["bem"]["version"]


def told(server):
    return Client(server.url).get("/dashboard/online")


def metrics(server):
    from urllib.request import urlopen

    with urlopen(f"{server.url}/metrics") as response:
        return response.read().decode()


@pytest.mark.slow
def test_corrections_become_a_version_that_answers_and_a_killed_learner_takes_nothing_along(
    tmp_path, micro_base
):
    with learning(tmp_path, micro_base) as server:
        bare = server.serving.residents.bare.version
        with ThreadPoolExecutor(4) as pool:
            first = set(pool.map(lambda i: taught(server, i), range(160)))
        assert first == {bare}
        learner = server.serving.learner
        wait_for(lambda: (told(server)["status"] or {}).get("rounds", 0) >= 2, 600)
        pid = learner.pid
        os.kill(pid, signal.SIGKILL)
        assert taught(server, 160) in {bare, server.serving.residents.current.version}
        wait_for(lambda: learner.pid not in (None, pid) and learner.restarts == 1, 600)
        wait_for(lambda: told(server)["moves"]["promoted"], 900)
        wait_for(lambda: server.serving.residents.current.version != bare, 30)
        version = taught(server, 161)  # a quick learner may have made more than one by now
        moves = Store(tmp_path / "store").journal.ledger().moves()
        promoted = next(move for move in moves if move.version == version)
        assert promoted.event == "promote" and promoted.by == "bem serve --learn"
        page = told(server)
        made = next(c for c in page["candidates"] if c["version"] == version)
        assert made["metrics"] and version in [move["version"] for move in page["ledger"]]
        assert page["scores"] and page["restarts"] == 1 and page["ended"] == "signal 9"
        text = metrics(server)
        (count,) = re.findall(r'^bem_online_moves_total\{move="promoted"\} (\S+)$', text, re.M)
        assert page["moves"]["promoted"] <= float(count) <= told(server)["moves"]["promoted"]
        assert "bem_online_restarts_total 1.0" in text and "bem_online_up 1.0" in text
    desk = Desk(tmp_path / "online")
    with desk.writing():  # the learner ended with its server
        pass


def test_a_learner_that_cannot_begin_leaves_the_server_alone(tmp_path, micro_base):
    (tmp_path / "online").mkdir()
    (tmp_path / "online" / "start").write_text("no checkpoint")
    with learning(tmp_path, micro_base) as server:
        wait_for(lambda: server.serving.learner.ended, 600)
        assert taught(server, 0) == server.serving.residents.bare.version
        page = told(server)
        assert page["status"] is None and page["waiting"] == 1 and page["ended"]
        assert "bem_online_up 0.0" in metrics(server)


@pytest.mark.slow
def test_a_learner_ends_when_its_server_does_however_that_ends(tmp_path, micro_base):
    """The kernel closes a killed server's end of the pipe."""
    learner = LearnerProcess(config_of(tmp_path, micro_base))
    process = learner._start()
    wait_for((tmp_path / "online" / "status.json").is_file, 600)
    process.stdin.close()
    assert process.wait(600) == 0


def test_learning_without_feedback_or_a_store_is_refused():
    for given in ({}, {"store": "s"}, {"feedback": "f"}):
        with pytest.raises(ValueError, match="needs feedback to learn from, and a store"):
            ServingConfig(learn=LearningConfig(), **given)
    with pytest.raises(ValueError, match=r"give keys.*max_share=1"):
        ServingConfig(learn=LearningConfig(), store="s", feedback="f")


def test_a_server_without_a_learner_says_so(tmp_path, micro_base):
    server = Server(ServingConfig(base=str(micro_base), port=0)).start()
    try:
        assert told(server) == {"on": False, "ledger": []}
        assert "bem_online" not in metrics(server)
    finally:
        server.stop()
