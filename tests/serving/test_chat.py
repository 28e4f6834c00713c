"""`bem chat` against a real server: what is typed is answered, and says who spoke."""

import json

import pytest

from bem.cli.chat import Chat, shown
from bem.cli.console import Terminal
from bem.errors import Refused, Unreachable
from bem.serving.client import Client
from tests.serving.running import add_router, served
from tests.serving.test_api import raw


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("chat")
    add_router(home / "store", home / "work")
    with served(home / "store") as running:
        yield running


def typed(server, capsys, *lines, model="bem"):
    chat = Chat(Client(server.url), model, {"max_tokens": 24, "seed": 1}, Terminal())
    for line in lines:
        chat.take(line)
    return chat, capsys.readouterr().out


def test_a_question_is_answered_and_remembered(server, capsys):
    chat, said = typed(server, capsys, "name it", "and again")
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    assert shown(chat.messages[1]["content"]) in said
    assert chat.answer["version"] == server.serving.residents.current.version


def test_a_terminal_obeys_nothing_that_a_model_writes():
    assert shown("a\x1b[2Jb\x07\x00c\n\td\u202e") == "a[2Jbc\n\td"


def test_the_route_of_the_last_answer_is_that_of_every_chunk(server, capsys):
    chat, said = typed(server, capsys, "name it", "/route", model="bem:b")
    assert said.count("■ b") == len(chat.answer["actions"]) >= 3


def test_why_says_what_the_router_thought(server, capsys):
    _, said = typed(server, capsys, "name it", "/why")
    assert "the conversation begins: nothing was read yet" in said


def test_why_of_a_version_without_a_router_is_refused_in_words(server, capsys):
    _, said = typed(server, capsys, "name it", "/why", model="bem:base")
    assert "no router" in said


def test_versions_models_and_commands(server, capsys):
    chat, said = typed(
        server,
        capsys,
        "/version",
        "/model bem:a",
        "/system be brief",
        "/history",
        "/nothing",
        "/new",
    )
    assert "bem:base" in said and "system: be brief" in said and "no command /nothing" in said
    assert chat.model == "bem:a" and chat.messages == []


def test_an_unknown_model_is_said_and_the_conversation_stays(server, capsys):
    chat, said = typed(server, capsys, "name it", "/model bem:nobody", "more")
    assert "does not exist" in said and len(chat.messages) == 2


def test_nobody_there_and_no_key_are_said():
    with pytest.raises(Unreachable, match="does `bem serve` run there"):
        Client("http://127.0.0.1:9").get("/v1/models")
    with pytest.raises(Unreachable):
        Client("no address").get("/v1/models")


def test_the_dashboard_is_one_page_that_names_nothing_from_elsewhere(server):
    status, headers, page = raw(server, "/dashboard", None)
    assert status == 200 and headers["content-security-policy"].startswith("default-src 'none'")
    assert b"http://" not in page.replace(b"http://www.w3.org/2000/svg", b"")
    assert b"https://" not in page and b"src=" not in page
    data = json.loads(raw(server, "/dashboard/data", None)[2])
    assert data["ready"] and data["history"]["answers"][0]["route"]
    assert [v["current"] for v in data["versions"]].count(True) == 1


def test_explaining_takes_a_conversation_with_or_without_its_answer(server):
    client = Client(server.url)
    asked = [{"role": "user", "content": "name it"}]
    open_end = client.post("/v1/bem/explain", {"messages": asked})
    whole = [*asked, {"role": "assistant", "content": "return the value"}]
    closed = client.post("/v1/bem/explain", {"messages": whole})
    assert len(closed["chunks"]) >= len(open_end["chunks"])
    assert closed["chunks"][-1]["stop"] > open_end["chunks"][-1]["stop"]
    with pytest.raises(Refused):
        client.post("/v1/bem/explain", {"messages": [{"role": "user", "content": "x " * 2000}]})
