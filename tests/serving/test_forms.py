"""Echoed prompts with their log-probabilities, and answers that must have a form."""

import json

import openai
import pytest
import torch

import bem
from bem.serving.schemas import SEEDS
from tests.serving.running import base, client, served
from tests.serving.test_api import PROMPT, chat, complete


@pytest.fixture(scope="module")
def server():
    with served() as running:
        yield running


@pytest.fixture(scope="module")
def api(server):
    return client(server)


def forward_logprobs(ids):
    """Of every token but the first, from one plain forward pass."""
    model, _ = base()
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(logprobs[i, token]) for i, token in enumerate(ids[1:])]


@pytest.mark.parametrize("new", [0, 3])
def test_an_echoed_prompt_has_the_log_probabilities_of_a_plain_forward_pass(api, new):
    _, tokenizer = base()
    ids = tokenizer(PROMPT)["input_ids"]
    for prompt in (PROMPT, ids):
        answer = complete(api, prompt=prompt, echo=True, logprobs=1, max_tokens=new, temperature=0)
        said = answer.choices[0].logprobs
        assert len(said.tokens) == len(ids) + new == len(said.top_logprobs) == len(said.text_offset)
        assert said.token_logprobs[0] is None and said.top_logprobs[0] is None
        assert said.token_logprobs[1 : len(ids)] == pytest.approx(forward_logprobs(ids), abs=1e-3)
        assert answer.choices[0].text.startswith(PROMPT)
        assert "".join(said.tokens) == answer.choices[0].text
        assert answer.usage.completion_tokens == new


def test_echo_of_several_prompts_and_without_log_probabilities(api):
    answer = complete(api, prompt=["User: a", "User: b"], echo=True, n=2, seed=1, max_tokens=2)
    assert [choice.text[:7] for choice in answer.choices] == ["User: a"] * 2 + ["User: b"] * 2
    alone = complete(api, prompt="User: b", seed=1, max_tokens=2)
    assert answer.choices[2].text == "User: b" + alone.choices[0].text


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}, "ok": {"type": "boolean"}},
    "required": ["n", "ok"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_under_a_schema_is_valid(api, stream):
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    answer = chat(api, "say it", response_format=form, max_tokens=60, seed=1, stream=stream)
    if stream:
        text = "".join(piece.choices[0].delta.content for piece in answer)
    else:
        text = answer.choices[0].message.content
    value = json.loads(text)
    assert 0 <= value["n"] <= 9 and isinstance(value["ok"], bool)


def test_a_choice_is_one_of_them(api):
    pytest.importorskip("llguidance")
    form = {"structured_outputs": {"choice": ["red", "blue"]}}
    answers = {complete(api, seed=seed, extra_body=form).choices[0].text for seed in range(4)}
    assert answers <= {"red", "blue"}


@pytest.mark.parametrize(
    "form",
    [
        {"choice": []},
        {"regex": "("},
        {"json": {"type": "nothing"}},
        {"choice": ["a"], "regex": "a"},
        {},
        {"grammar": "x" * 100_000},
    ],
)
def test_a_form_that_is_none_is_refused(api, form):
    pytest.importorskip("llguidance")
    with pytest.raises(openai.BadRequestError):
        complete(api, extra_body={"structured_outputs": form})


@pytest.mark.parametrize("seed", [-SEEDS, -1, 0, SEEDS - 1])
def test_any_seed_of_64_bits_will_do(api, seed):
    first, again = (complete(api, seed=seed, n=2) for _ in range(2))
    assert [c.text for c in first.choices] == [c.text for c in again.choices]


def test_bem_has_a_version_in_its_openapi_document(server):
    import urllib.request

    document = json.load(urllib.request.urlopen(server.url + "/openapi.json"))
    assert document["info"]["version"] == bem.__version__
    assert "/v1/chat/completions" in document["paths"]
