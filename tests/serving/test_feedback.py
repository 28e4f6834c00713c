"""What is said of an answer is kept once, on disk, by who got the answer, and names what acted."""

import signal

import openai
import pytest

from bem.errors import Refused
from bem.online.feedback import FeedbackLog
from bem.serving.client import Client
from bem.serving.keys import add_key
from tests.online import postgres
from tests.serving.running import client, served
from tests.serving.test_api import PROMPT, chat, complete


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    home = tmp_path_factory.mktemp("feedback")
    keys = {name: add_key(home / "keys.json", name) for name in ("ada", "bob")}
    with served(keys=str(home / "keys.json"), feedback=str(home / "feedback.db")) as server:
        yield server, keys, home / "feedback.db"


def said(server, key, **fields):
    return Client(server.url, key).post("/v1/feedback", fields)


@pytest.mark.parametrize("stream", [False, True])
def test_feedback_is_joined_with_the_answer_that_was_given(homes, stream):
    server, keys, path = homes
    answer = chat(client(server, keys["ada"]), "name it", seed=1, stream=stream)
    if stream:
        pieces = list(answer)
        name, text = pieces[0].id, "".join(p.choices[0].delta.content for p in pieces)
    else:
        name, text = answer.id, answer.choices[0].message.content
    fields = {"request": name, "kind": "score", "score": 0.5, "id": f"{stream}"}
    first, again = (said(server, keys["ada"], **fields) for _ in range(2))
    assert (first["new"], again["new"], first["sequence"]) == (True, False, again["sequence"])
    event = FeedbackLog(path).read(after=first["sequence"] - 1)[0]
    assert event.feedback.score == 0.5
    assert event.request.answer == text.replace("\0", "\ufffd")
    assert event.request.prompt == [{"role": "user", "content": "name it"}]
    assert event.request.version == server.serving.residents.current.version
    assert event.request.user == event.feedback.user == "ada"


def test_each_of_several_answers_has_an_id(homes):
    server, keys, path = homes
    answer = complete(client(server, keys["ada"]), n=2, seed=1)
    better, worse = f"{answer.id}.1", f"{answer.id}.0"
    said(server, keys["ada"], request=better, over=worse, kind="preference")
    kept = FeedbackLog(path).request(better)
    assert kept.answer == answer.choices[1].text.replace("\0", "\ufffd")
    assert FeedbackLog(path).request(worse).prompt == PROMPT


def test_nobody_speaks_of_what_others_were_answered(homes):
    server, keys, _ = homes
    answer = complete(client(server, keys["ada"]))
    for key, name in ((keys["bob"], answer.id), (keys["ada"], "cmpl-none")):
        with pytest.raises(Refused) as refused:
            said(server, key, request=name, kind="score", score=1.0)
        assert refused.value.status == 404


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "score"},
        {"kind": "score", "score": 2},
        {"kind": "score", "score": 1, "text": "x"},
        {"kind": "praise", "score": 1},
        {"kind": "check", "score": 1},
    ],
)
def test_what_makes_no_sense_is_refused(homes, wrong):
    server, keys, _ = homes
    answer = complete(client(server, keys["ada"]), max_tokens=1)
    with pytest.raises(Refused) as refused:
        said(server, keys["ada"], request=answer.id, **wrong)
    assert refused.value.status == 400


def test_other_feedback_under_the_same_id_is_refused(homes):
    server, keys, _ = homes
    answer = complete(client(server, keys["ada"]), max_tokens=1)
    fields = {"request": answer.id, "kind": "score", "id": "twice"}
    said(server, keys["ada"], **fields, score=1.0)
    with pytest.raises(Refused, match="never changed"):
        said(server, keys["ada"], **fields, score=0.0)


def test_a_server_that_keeps_none_says_so():
    with served() as server:
        with pytest.raises(Refused, match="--feedback"):
            said(server, None, request="x", kind="score", score=1.0)
        with pytest.raises(openai.APIStatusError):
            client(server).post("/feedback", body={}, cast_to=object)


def test_feedback_on_postgresql_is_not_acknowledged_while_the_database_is_away():
    with postgres.running() as database, served(feedback=database.url) as server:
        answer = complete(client(server), max_tokens=2)
        fields = {"request": answer.id, "kind": "score", "score": 1.0}
        database.end(signal.SIGKILL)
        with pytest.raises(Refused) as refused:
            said(server, None, **fields)
        assert (refused.value.status, refused.value.code) == (503, "not_kept")
        with pytest.raises(openai.InternalServerError) as not_kept:  # nor is an answer given
            complete(client(server), max_tokens=2)
        assert not_kept.value.status_code == 503
        database.start()
        assert said(server, None, **fields)["new"]
        assert not said(server, None, **fields)["new"]
        (event,) = FeedbackLog(database.url).read()
        assert event.request.id == answer.id
