"""Pictures through the server, with OpenAI's own client: they choose who answers, or they say why not."""

import base64
import io

import numpy as np
import pytest
from openai import BadRequestError
from PIL import Image

import bem
from bem.vision.load import load_tower
from bem.vision.scenes import Thing, draw
from tests.conftest import make_llama
from tests.routing.mounted import FREE, expert
from tests.serving.running import _loud, _put, client, served

TOWER = load_tower("tiny").encoder_id
RED = ((Thing("circle", "red", 20, 20, 30),), (Thing("square", "blue", 10, 60, 20),))


def url(picture, form="png", **options) -> str:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, form, **options)
    return f"data:image/{form};base64,{base64.b64encode(out.getvalue()).decode()}"


def said(text, *pictures, role="user"):
    parts = [{"type": "image_url", "image_url": {"url": p, "detail": "auto"}} for p in pictures]
    return {"role": role, "content": [{"type": "text", "text": text}, *parts]}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("eyes")
    model = make_llama()
    experts = [
        _loud(expert(model, *each)) for each in zip("abc", (4, 4, 2), (0, 1, 2), strict=True)
    ]
    made = bem.mount(model, experts, **FREE, vision=TOWER)
    made.router.trained = True
    sight = made.router.policy.actor.sight  # a picture that is heeded: b
    sight.asked.bias.data.fill_(9.0)
    sight.vote.weight.data[1, 0], sight.vote.weight.data[2, 0] = -1e4, 1e4
    _put(made, home / "store", home / "work", "seeing", True)
    feedback = str(home / "feedback.db")
    with served(
        home / "store", vision="tiny", feedback=feedback, max_image_pixels=1 << 18
    ) as running:
        yield running


def answer(server, *messages, model="bem", **options):
    asked = {"max_tokens": 12, "temperature": 0, "seed": 1, **options}
    return client(server).chat.completions.create(model=model, messages=list(messages), **asked)


def test_a_picture_chooses_the_expert_and_the_answer_says_what_was_seen(server):
    got = answer(server, said("There is a red circle. What now?", url(draw(RED))))
    seen = got.model_extra["bem"]["vision"]
    assert seen["gate"] > 0.5 and seen["why"] == "" and seen["encoder"] == TOWER
    (claim,) = seen["claims"]
    assert claim["text"] == "there is a red circle" and claim["probability"] > 0.5
    assert {a["expert"] for a in got.choices[0].model_extra["bem"]["actions"]} == {"b"}


@pytest.mark.parametrize(
    ("text", "picture", "why"),
    [
        ("There is a green triangle.", draw(RED), "conflict"),
        ("Go on.", np.full((100, 100, 3), 211, np.uint8), "blank"),
        ("Go on.", np.random.default_rng(0).integers(0, 256, (100, 100, 3)).astype(np.uint8), ""),
    ],
)
def test_at_gate_zero_the_answer_is_that_of_the_text_alone(server, text, picture, why):
    alone = answer(server, {"role": "user", "content": text})
    got = answer(server, said(text, url(picture)))
    seen = got.model_extra["bem"]["vision"]
    assert seen["gate"] == 0 and seen["why"].startswith(why) and seen["why"]
    assert got.choices[0].message.content == alone.choices[0].message.content
    assert got.usage.prompt_tokens == alone.usage.prompt_tokens  # a picture is no token
    assert "vision" not in alone.model_extra["bem"]


def test_a_picture_of_an_earlier_turn_still_holds_and_streams_say_it_at_their_end(server):
    first = said("What is it?", url(draw(RED), "jpeg", quality=95))
    turns = [first, {"role": "assistant", "content": "so"}, {"role": "user", "content": "And now?"}]
    got = answer(server, *turns)
    assert got.model_extra["bem"]["vision"]["gate"] > 0
    pieces = list(answer(server, *turns, stream=True, stream_options={"include_usage": True}))
    (told,) = (e["bem"] for e in (p.model_extra or {} for p in pieces) if "bem" in e)
    assert told["vision"] == got.model_extra["bem"]["vision"]
    streamed = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert streamed == got.choices[0].message.content


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (said("x", "https://example.org/cat.png"), "invalid_image"),
        (said("x", "data:image/png;base64,AAAA"), "invalid_image"),
        (said("x", url(np.zeros((600, 600, 3), np.uint8))), "invalid_image"),
        (said("x", url(draw(RED)), url(draw(RED))), None),
    ],
)
def test_what_cannot_be_taken_is_refused_and_named(server, message, code):
    with pytest.raises(BadRequestError) as refused:
        answer(server, message)
    assert refused.value.param == "messages" and refused.value.code == code


def test_a_version_that_does_not_see_refuses_instead_of_ignoring(server):
    with pytest.raises(BadRequestError, match="reads no pictures"):
        answer(server, said("x", url(draw(RED))), model="bem:base")
    with pytest.raises(BadRequestError):
        answer(server, said("x", url(draw(RED)), role="system"), {"role": "user", "content": "x"})


def test_answers_to_pictures_are_not_kept_for_learning(server):
    shown = answer(server, said("x", url(draw(RED))))
    told = answer(server, {"role": "user", "content": "x"})
    ledger = server.serving.feedback
    assert ledger.log.request(told.id) is not None and ledger.log.request(shown.id) is None


def test_a_server_without_eyes_says_how_to_get_some():
    with served() as blind, pytest.raises(BadRequestError, match="--vision tiny"):
        answer(blind, said("x", url(draw(RED))))
