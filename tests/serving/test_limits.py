"""Clients that go away, come too often, say too much, or have no key."""

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from bem.serving.keys import add_key
from tests.serving.running import client, served
from tests.serving.test_api import PROMPT, complete, raw
from tests.serving.test_versions import wait_for

LONG = {"max_tokens": 400, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def server():
    with served(slots=2, queue=3, max_body_kib=8) as running:
        yield running


def idle(server):
    jobs = server.serving.driver._jobs
    return lambda: not any(jobs.values()) and not any(r.users for r in server.serving.residents)


def test_a_stream_that_nobody_reads_any_more_is_cancelled(server):
    stream = complete(client(server), stream=True, **LONG)
    next(stream)
    stream.close()
    began = time.monotonic()
    wait_for(idle(server))
    assert server.serving.residents.bare.engine.running == ()
    assert time.monotonic() - began < 30


def test_a_client_that_does_not_wait_for_its_answer_cancels_it(server):
    host = server.url.removeprefix("http://")
    connection = http.client.HTTPConnection(host)
    body = json.dumps({"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    engine = server.serving.residents.bare.engine
    wait_for(lambda: engine.running)
    connection.close()
    wait_for(idle(server))
    assert server.serving.metrics.success.labels  # the server lives
    assert complete(client(server), max_tokens=1).choices


def test_a_full_queue_says_when_to_come_again(server):
    def ask(i):
        try:
            complete(client(server), seed=i, max_tokens=60, extra_body={"ignore_eos": True})
        except openai.RateLimitError as refused:
            return refused
        return None

    with ThreadPoolExecutor(12) as pool:
        refused = [answer for answer in pool.map(ask, range(12)) if answer]
    assert refused and len(refused) < 12
    assert int(refused[0].response.headers["retry-after"]) >= 1
    assert refused[0].body["code"] == "queue_full"
    wait_for(idle(server))


def test_a_body_that_is_too_large_is_refused_whatever_it_says_of_its_length(server):
    large = json.dumps({"prompt": "x" * 9000}).encode()
    assert raw(server, "/v1/completions", large)[0] == 413
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    chunks = (large[i : i + 1000] for i in range(0, len(large), 1000))
    headers = {"content-type": "application/json", "transfer-encoding": "chunked"}
    connection.request("POST", "/v1/completions", chunks, headers, encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 413
    assert "larger than the 8 KiB" in json.load(response)["error"]["message"]


def test_an_answer_stops_at_its_deadline(server):
    late = complete(
        client(server), **{**LONG, "extra_body": {"ignore_eos": True, "bem": {"timeout_s": 0.2}}}
    )
    assert late.choices[0].finish_reason == "length"
    assert late.choices[0].bem["finish_reason"] == "deadline"
    assert late.usage.completion_tokens < 400


def test_health_readiness_and_metrics_say_what_happened(server):
    assert raw(server, "/health", None)[0] == 200
    status, _, state = raw(server, "/ready", None)
    assert status == 200 and json.loads(state)["ready"]
    complete(client(server), max_tokens=3, extra_body={"ignore_eos": True})
    text = raw(server, "/metrics", None)[2].decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert float(values['vllm:generation_tokens_total{model_name="bem-tiny"}']) >= 3
    assert float(values['bem_requests_refused_total{model_name="bem-tiny",status="413"}']) >= 1
    assert any(name.startswith("vllm:time_to_first_token_seconds_bucket") for name in values)
    assert any(name.startswith("bem_version_current{") for name in values)


def test_a_server_with_keys_lets_in_who_has_one_and_keeps_their_chunks_apart(tmp_path):
    path = tmp_path / "keys.json"
    ada, bob = add_key(path, "ada"), add_key(path, "bob", requests_per_minute=2)
    with served(keys=str(path)) as server:
        with pytest.raises(openai.AuthenticationError):
            complete(client(server, "wrong"))
        assert raw(server, "/v1/models", None)[0] == 401
        assert raw(server, "/metrics", None)[0] == raw(server, "/health", None)[0] == 200
        prompt = "User: return the value that this function describes " * 4
        for _ in range(2):
            warm = complete(client(server, ada), prompt=prompt)
        assert warm.usage.prompt_tokens_details.cached_tokens > 0
        other = complete(client(server, bob), prompt=prompt)
        assert other.usage.prompt_tokens_details.cached_tokens == 0
        complete(client(server, bob))
        with pytest.raises(openai.RateLimitError) as refused:
            complete(client(server, bob))
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 30


def test_an_engine_that_fails_ends_its_requests_and_goes_on():
    with served() as server:
        engine = server.serving.residents.bare.engine
        step = engine._decode
        engine._decode = lambda: 1 / 0
        with pytest.raises(openai.InternalServerError):
            complete(client(server))
        engine._decode = step
        assert complete(client(server)).choices
        assert raw(server, "/health", None)[0] == 200
