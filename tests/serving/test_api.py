"""The official client gets from the server what a fresh engine gives on the version that the answer names."""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.serving.running import add_router, base, client, replayed, served

PROMPT = "User: name the function\nAssistant:"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("served")
    add_router(home / "store", home / "work")
    with served(home / "store", max_body_kib=64) as running:
        yield running


@pytest.fixture(scope="module")
def api(server):
    return client(server)


def complete(api, **fields):
    return api.completions.create(**{"model": "bem", "prompt": PROMPT, "max_tokens": 12, **fields})


def chat(api, *said, **fields):
    roles = ["user", "assistant"] * len(said)
    messages = [{"role": r, "content": c} for r, c in zip(roles, said, strict=False)]
    return api.chat.completions.create(
        **{"model": "bem", "messages": messages, "max_tokens": 12, **fields}
    )


def raw(server, path, body, **headers):
    """(status, headers, body) without a client in between."""
    request = urllib.request.Request(
        server.url + path, body, {"content-type": "application/json", **headers}
    )
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


# --- answers ------------------------------------------------------------------------------------


def test_models_are_the_current_one_the_base_its_experts_and_what_the_store_keeps(server, api):
    short = server.serving.residents.current.short
    names = {model.id for model in api.models.list()}
    assert names == {"bem", "bem:base", "bem:a", "bem:b", "bem:c", f"bem@{short}"}
    assert api.models.retrieve("bem:a").id == "bem:a"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_completion_is_that_of_a_fresh_engine(server, api, temperature):
    answer = complete(api, seed=7, temperature=temperature)
    from bem.engine.request import Sampling

    sampling = Sampling(temperature=temperature, seed=7)
    version = answer.bem["version"]
    assert answer.choices[0].text == replayed(server, version, PROMPT, 12, 7, sampling=sampling)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("name", ["bem:base", "bem:a", "bem:b", "bem"])
def test_a_name_chooses_what_acts(server, api, name):
    answer = complete(api, model=name, seed=3)
    route = name.partition(":")[2] or None
    bare = server.serving.residents.bare.version
    assert (answer.bem["version"] == bare) == (name == "bem:base")
    expected = replayed(
        server, answer.bem["version"], PROMPT, 12, 3, route=None if route == "base" else route
    )
    assert answer.choices[0].text == expected
    if route in ("a", "b"):
        assert {action["expert"] for action in answer.choices[0].bem["actions"]} == {route}


def test_a_route_in_the_body_is_a_name_said_otherwise(api):
    named = complete(api, model="bem:b", seed=3)
    routed = complete(api, seed=3, extra_body={"bem": {"route": "b"}})
    assert named.choices[0].text == routed.choices[0].text


def test_a_strength_scales_what_the_experts_do_and_is_said(server, api):
    found = {}
    for strength in (0.0, 1.0, 4.0):
        answer = complete(
            api, model="bem:a", seed=3, extra_body={"bem": {"strength": strength}}, max_tokens=24
        )
        assert {a["strength"] for a in answer.choices[0].bem["actions"]} == {strength}
        found[strength] = answer.choices[0].text
        fields = {"route": "a", "strength": strength}
        assert found[strength] == replayed(server, answer.bem["version"], PROMPT, 24, 3, **fields)
    assert len(set(found.values())) > 1
    assert found[0.0] == complete(api, model="bem:base", seed=3, max_tokens=24).choices[0].text


def test_the_version_of_an_answer_can_be_asked_for_again(api):
    first = complete(api, seed=5)
    again = complete(api, model=f"bem@{first.bem['version']}", seed=5)
    assert again.choices[0].text == first.choices[0].text
    assert again.bem["version"] == first.bem["version"]


def test_headers_are_the_receipt(api):
    response = api.completions.with_raw_response.create(model="bem", prompt=PROMPT, max_tokens=2)
    body = response.parse()
    assert response.headers["x-request-id"] == body.id
    assert response.headers["x-bem-version"] == body.bem["version"]
    assert (
        int(response.headers["x-bem-cached-tokens"])
        == body.usage.prompt_tokens_details.cached_tokens
    )


@pytest.mark.parametrize("stop", [None, ["e"], ["ne", "zz"]])
def test_a_stream_says_what_the_whole_answer_says(api, stop):
    for seed in range(3):
        whole = complete(api, seed=seed, max_tokens=40, logprobs=1, stop=stop)
        pieces = list(complete(api, seed=seed, max_tokens=40, logprobs=1, stop=stop, stream=True))
        choices = [piece.choices[0] for piece in pieces]
        assert "".join(choice.text for choice in choices) == whole.choices[0].text
        assert choices[-1].finish_reason == whole.choices[0].finish_reason
        assert all(choice.finish_reason is None for choice in choices[:-1])
        tokens = [t for c in choices if c.logprobs for t in c.logprobs.token_logprobs]
        assert tokens == pytest.approx(whole.choices[0].logprobs.token_logprobs, abs=1e-4)
        assert pieces[-1].bem["version"] == whole.bem["version"]
        assert len(pieces) > 5 or whole.usage.completion_tokens < 6


def test_usage_comes_last_in_a_stream_that_asks_for_it(api):
    pieces = list(chat(api, "name it", stream=True, stream_options={"include_usage": True}, seed=1))
    assert pieces[-1].choices == [] and all(piece.usage is None for piece in pieces[:-1])
    whole = chat(api, "name it", seed=1)
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert pieces[0].choices[0].delta.role == "assistant"


def test_a_chat_is_written_as_training_writes_it(server, api):
    from bem.training.data import encode
    from bem.training.example import Example

    _, tokenizer = base()
    answer = chat(api, "who", "me", "why", seed=4)
    encoded = encode(
        Example("x", "why", (), history=(("who", "me"),)), tokenizer, 999, with_answer=False
    )
    starts = [i for i, start in enumerate(encoded.turn_starts) if start]
    expected = replayed(server, answer.bem["version"], encoded.input_ids, 12, 4, turn_starts=starts)
    assert answer.choices[0].message.content == expected
    assert answer.usage.prompt_tokens == len(encoded.input_ids)


def test_the_next_turn_finds_the_chunks_of_the_one_before(api):
    said = "return the value that this function describes " * 2
    first = chat(api, said, seed=1, max_tokens=30)
    answer = first.choices[0].message.content
    second = chat(api, said, answer, "more", seed=1)
    assert (
        second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens // 8 * 8 - 8
    )


def test_several_choices_have_seeds_of_their_own(api):
    together = complete(api, n=3, seed=10, prompt=[PROMPT, "User: b"])
    assert [choice.index for choice in together.choices] == list(range(6))
    for offset in range(3):
        alone = complete(api, seed=10 + offset)
        assert together.choices[offset].text == alone.choices[0].text
    assert together.usage.prompt_tokens == sum(
        complete(api, prompt=p).usage.prompt_tokens for p in (PROMPT, "User: b")
    )


def test_token_ids_are_a_prompt_too(api):
    _, tokenizer = base()
    ids = tokenizer(PROMPT)["input_ids"]
    assert (
        complete(api, prompt=ids, seed=1).choices[0].text == complete(api, seed=1).choices[0].text
    )


def test_logprobs_are_those_of_the_engine(server, api):
    answer = chat(api, "name it", logprobs=True, top_logprobs=2, temperature=0)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        assert token.logprob == token.top_logprobs[0].logprob  # greedy: the likeliest is chosen
        assert bytes(token.bytes).decode() == token.token


def test_many_clients_at_once_each_get_their_own_answer(server, api):
    def ask(i: int):
        stream = complete(
            api, prompt=f"User: {i} names\nAssistant:", seed=i, max_tokens=16, stream=i % 2
        )
        if not i % 2:
            return stream.choices[0].text, stream.bem["version"]
        pieces = list(stream)
        return "".join(p.choices[0].text for p in pieces), pieces[-1].bem["version"]

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(36)))
    for i, (text, version) in enumerate(answers):
        assert text == replayed(server, version, f"User: {i} names\nAssistant:", 16, i)


# --- refusals -----------------------------------------------------------------------------------

REFUSED = [
    ({"model": "gpt-4"}, openai.NotFoundError, "model"),
    ({"model": "bem:nobody"}, openai.NotFoundError, "model"),
    ({"model": "bem@abcdef"}, openai.NotFoundError, "model"),
    ({"model": "bem@../../etc"}, openai.NotFoundError, "model"),
    ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
    ({"max_tokens": 100_000}, openai.BadRequestError, "prompt"),
    ({"prompt": "word " * 600}, openai.BadRequestError, "prompt"),
    ({"prompt": ""}, openai.BadRequestError, "prompt"),
    ({"prompt": []}, openai.BadRequestError, "prompt"),
    ({"prompt": [99999]}, openai.BadRequestError, None),
    ({"prompt": ["a"] * 65}, openai.BadRequestError, "n"),
    ({"temperature": -1}, openai.BadRequestError, "temperature"),
    ({"logit_bias": {"99999": 1}}, openai.BadRequestError, "logit_bias"),
    ({"echo": True, "stream": True}, openai.BadRequestError, "echo"),
    ({"best_of": 3}, openai.BadRequestError, "best_of"),
    ({"stop": [""]}, openai.BadRequestError, "stop.0"),
    ({"extra_body": {"colour": "red"}}, openai.BadRequestError, "colour"),
    ({"extra_body": {"bem": {"route": "nobody"}}}, openai.BadRequestError, None),
    ({"extra_body": {"bem": {"strength": 5.0}}}, openai.BadRequestError, "bem.strength"),
    (
        {"model": "bem:base", "extra_body": {"bem": {"strength": 0.5}}},
        openai.BadRequestError,
        "bem.strength",
    ),
    ({"extra_body": {"bem": {"retrieve": True}}}, openai.BadRequestError, "bem.retrieve"),
    ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "stream_options"),
    (
        {"extra_body": {"structured_outputs": {"json": 3}}},
        openai.BadRequestError,
        "structured_outputs.json",
    ),
]


@pytest.mark.parametrize(("fields", "kind", "param"), REFUSED)
def test_what_cannot_be_done_is_refused_with_its_field(api, fields, kind, param):
    for stream in (False, True):
        if stream and "stream_options" in fields:
            continue
        fields = {"stream": stream, **fields}
        with pytest.raises(kind) as refused:
            complete(api, **fields)
        assert refused.value.body["param"] == param
        assert refused.value.body["message"] and "Traceback" not in refused.value.body["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema"}},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"top_logprobs": 2},
        {"messages": []},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
        {"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
    ],
)
def test_a_chat_that_cannot_be_answered_is_refused(api, fields):
    with pytest.raises(openai.BadRequestError):
        chat(api, "x", **fields)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "seed": 1e400}',
        b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"prompt": "x", "max_tokens": "many"}',
        b"\xff\xfe",
    ],
)
def test_a_body_that_makes_no_sense_is_400_in_openais_form(server, body):
    status, _, answer = raw(server, "/v1/completions", body)
    assert status == 400
    assert set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}


def test_an_unknown_address_is_404_in_openais_form(server):
    status, _, answer = raw(server, "/v1/nothing", b"{}")
    assert status == 404 and json.loads(answer)["error"]["message"]


def test_text_of_any_script_passes(api):
    for text in ("\u0000", "日本語 🎉", "‮", "a" * 300):
        assert complete(api, prompt=text, max_tokens=2).choices


def test_fresh_engines_differ_between_versions(server):
    """Or the tests above would show nothing."""
    front, bare = server.serving.residents.current.version, server.serving.residents.bare.version
    assert replayed(server, front, PROMPT, 12, 3) != replayed(server, bare, PROMPT, 12, 3)
