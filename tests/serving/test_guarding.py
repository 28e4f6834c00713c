"""A policy in a server, as the official client sees it: refused, redacted, raised, and closed when the detector dies.

What is "harmful" here is mild: the policy's thresholds are set so that everyday words meet them.
"""

import json
import os
import signal
import time
from urllib.request import urlopen

import pytest
import yaml
from openai import BadRequestError, InternalServerError

from bem.safety.basis import read_basis
from bem.safety.detector import ViolationDetector
from bem.serving.guarding import texts_of
from bem.serving.schemas import ChatRequest, CompletionRequest
from tests.conftest import make_llama
from tests.safety.guarded import make_basis
from tests.serving.running import add_adapter, add_router, base, client, served

MILD = "how do I pick the lock of my own shed without the key"
PLAIN = "name a colour"
CARD = "4111 1111 1111 1111"


def between(low: str, high: str, category: str = "harm") -> float:
    """A threshold that one text passes and the other does not."""
    check = ViolationDetector().check
    below, above = (check(text).scores[category] for text in (low, high))
    assert below < above
    return (below + above) / 2


def scraped(server) -> str:
    with urlopen(f"{server.url}/metrics") as response:
        return response.read().decode()


def write_policy(folder, rules, **more):
    path = folder / "policy.yaml"
    path.write_text(yaml.safe_dump({"rules": rules, **more}))
    return str(path)


@pytest.fixture(scope="module")
def threshold():
    return between(PLAIN, MILD)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, threshold):
    """A server that refuses mild prompts, redacts cards, and lets `lab` ask anything."""
    home = tmp_path_factory.mktemp("guarded")
    refuse = [{"do": "refuse", "above": threshold, "say": "Not here."}]
    rules = {
        "prompts": {"harm": refuse, "personal": [{"do": "redact", "kinds": ["card"]}]},
        "feedback": {"harm": refuse, "personal": [{"do": "redact"}]},
    }
    audit = home / "audit.jsonl"
    policy = write_policy(home, rules, audit=str(audit))
    add_adapter(home / "store", home / "work", 1)
    with served(home / "store", policy=policy, feedback=str(home / "f.db")) as server:
        server.audit = audit
        yield server


def chat(server, text, **options):
    asked = [{"role": "user", "content": text}]
    options = {"model": "bem", "max_tokens": 16, "seed": 1, **options}
    return client(server).chat.completions.create(messages=asked, **options)


def noted(server) -> list[dict]:
    return [json.loads(line) for line in server.audit.read_text().splitlines()]


def test_a_refused_prompt_is_answered_as_filtered_and_never_reaches_a_model(guarded):
    before = guarded.serving.residents.chunks.stats.needed
    choice = chat(guarded, MILD).choices[0]
    assert choice.finish_reason == "content_filter"
    assert choice.message.refusal == "Not here." and choice.message.content is None
    assert guarded.serving.residents.chunks.stats.needed == before
    last = noted(guarded)[-1]
    assert (last["action"], last["place"]) == ("refuse", "prompts") and last["key"] == "-"
    assert MILD not in guarded.audit.read_text()


def test_a_refusal_is_streamed_as_filtered_too(guarded):
    pieces = list(chat(guarded, MILD, stream=True, n=2))
    ends = [c for p in pieces for c in p.choices if c.finish_reason]
    assert [c.finish_reason for c in ends] == ["content_filter"] * 2
    assert {c.delta.refusal for c in ends} == {"Not here."}


def test_an_ordinary_prompt_is_answered_as_without_a_policy(guarded, tmp_path):
    with served(guarded.config.store and tmp_path.parent / "none", slots=2) as plain:
        expected = chat(plain, PLAIN, model="bem:base", temperature=0).choices[0].message.content
    assert (
        chat(guarded, PLAIN, model="bem:base", temperature=0).choices[0].message.content == expected
    )


def test_a_completion_says_its_refusal_as_text(guarded):
    choice = client(guarded).completions.create(model="bem", prompt=MILD).choices[0]
    assert (choice.finish_reason, choice.text) == ("content_filter", "Not here.")
    ids = base()[1](MILD)["input_ids"]
    assert guarded.serving.guard._decoded(ids)  # what is given as token ids is read as text


def test_history_system_evidence_and_another_turn_are_judged_too(guarded):
    create = client(guarded).chat.completions.create
    user, assistant = {"role": "user", "content": MILD}, {"role": "assistant", "content": "yes"}
    more = {"role": "user", "content": "go on"}
    for messages, bem in (
        ([user, assistant, more], {}),
        ([{"role": "system", "content": MILD}, more], {}),
        ([more], {"evidence": [MILD]}),
    ):
        answer = create(model="bem", messages=messages, max_tokens=4, extra_body={"bem": bem})
        assert answer.choices[0].finish_reason == "content_filter"
    half = len(MILD) // 2  # two messages of one speaker are one text
    cut = [{"role": "user", "content": t} for t in (MILD[:half], MILD[half:])]
    joined = MILD[:half] + "\n" + MILD[half:]
    score = ViolationDetector().check(joined).scores["harm"]
    refused = create(model="bem", messages=cut, max_tokens=4).choices[0].finish_reason
    limit = guarded.serving.guard.policy.rules.prompts["harm"][0].above
    assert (refused == "content_filter") == (score > limit)


def test_tools_calls_and_token_ids_are_read_too():
    function = {"name": "look", "description": MILD}
    call = {"id": "c1", "function": {"name": "look", "arguments": '{"at": "my shed"}'}}
    said = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "what it returned"},
    ]
    tools = [{"type": "function", "function": function}]
    texts = texts_of(ChatRequest.model_validate({"messages": said, "tools": tools}), str)
    assert len(texts) == 4 and texts[0] == "ab" and MILD in texts[3]
    assert "my shed" in texts[1] and texts[2].startswith("what it returned")
    prompts = CompletionRequest.model_validate({"prompt": [[1, 2], [3]]})
    assert texts_of(prompts, str) == ["[1, 2]", "[3]"]


def test_what_is_redacted_never_reaches_the_model(guarded):
    asked = f"my card is {CARD}, name it"
    answer = client(guarded).completions.create(
        model="bem:base", prompt=asked, max_tokens=4, echo=True
    )
    assert CARD not in answer.choices[0].text and "[card]" in answer.choices[0].text
    parts = [{"type": "text", "text": f"card {CARD}"}, {"type": "text", "text": " is it"}]
    assert chat(guarded, parts).choices[0].finish_reason != "content_filter"
    split = [
        {"type": "text", "text": "card 4111 1111"},
        {"type": "text", "text": " 1111 1111 is it"},
    ]
    assert chat(guarded, split).choices[0].finish_reason == "content_filter"


def test_feedback_is_redacted_or_refused_before_it_is_kept(guarded):
    answer = chat(guarded, PLAIN)
    post = client(guarded).post
    said = {"request": answer.id, "kind": "correction", "text": f"red, and mail a@b.org or {CARD}"}
    assert post("/feedback", body=said, cast_to=object)["new"]
    kept = [event.feedback.text for event in guarded.serving.feedback.log.events()]
    assert kept[-1] == "red, and mail [email] or [card]"
    with pytest.raises(BadRequestError) as refused:
        post("/feedback", body={**said, "text": MILD}, cast_to=object)
    assert refused.value.code == "content_filter"


def test_nothing_can_be_said_of_a_refused_answer(guarded):
    refused = chat(guarded, MILD)
    said = {"request": refused.id, "kind": "score", "score": 1.0}
    with pytest.raises(Exception, match="on record"):
        client(guarded).post("/feedback", body=said, cast_to=object)


def test_counters_stand_in_metrics_and_on_the_dashboard(guarded):
    chat(guarded, MILD)
    text = scraped(guarded)
    assert 'action="refuse",category="harm"' in text and "bem_guard_detector_up" in text
    rows = guarded.serving.guard.shown()["counts"]
    assert any(r["action"] == "refuse" and r["texts"] >= 1 for r in rows)


def test_a_request_cannot_raise_what_is_not_there(guarded):
    with pytest.raises(BadRequestError, match="needs a safety basis"):
        chat(guarded, PLAIN, extra_body={"bem": {"kappa": 0.5}})


# --- answers ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """A server whose answers are all refused above probability 0, streamed in small windows."""
    home = tmp_path_factory.mktemp("strict")
    rules = {"answers": {"harm": [{"do": "refuse", "above": 0.0}]}}
    stream = {"check_every": 20, "hold_back": 48}
    with served(policy=write_policy(home, rules, stream=stream)) as server:
        yield server


def test_an_answer_that_is_refused_shows_nothing_whole_or_streamed(strict):
    whole = chat(strict, PLAIN, logprobs=True).choices[0]
    assert whole.finish_reason == "content_filter" and whole.message.content is None
    assert whole.logprobs is None
    pieces = list(chat(strict, PLAIN, stream=True, max_tokens=64, logprobs=True))
    assert not any(c.delta.content or c.logprobs for p in pieces for c in p.choices)
    assert [c.finish_reason for p in pieces for c in p.choices][-1] == "content_filter"


def test_a_taken_answer_stops_being_computed(strict):
    generated = strict.serving.metrics.generated._value
    before = generated.get()
    list(chat(strict, PLAIN, stream=True, max_tokens=64, extra_body={"ignore_eos": True}))
    time.sleep(0.2)
    assert generated.get() - before < 64


def test_a_streamed_answer_that_is_let_through_is_the_whole_one(tmp_path):
    rules = {"answers": {"harm": [{"do": "flag", "above": 0.0}]}}
    policy = write_policy(tmp_path, rules, stream={"check_every": 10, "hold_back": 48})
    with served(policy=policy) as server, served() as plain:
        options = {
            "max_tokens": 60,
            "temperature": 0,
            "logprobs": True,
            "extra_body": {"ignore_eos": True},
        }
        expected = chat(plain, PLAIN, **options).choices[0]
        pieces = [c for p in chat(server, PLAIN, stream=True, **options) for c in p.choices]
        assert "".join(c.delta.content or "" for c in pieces) == expected.message.content
        tokens = [t.token for c in pieces if c.logprobs for t in c.logprobs.content]
        assert tokens == [t.token for t in expected.logprobs.content]
        assert pieces[-1].finish_reason == expected.finish_reason


# --- the knob --------------------------------------------------------------------------------------


def first_logprob(answer) -> float:
    return answer.choices[0].logprobs.content[0].logprob


@pytest.mark.parametrize("kind", ["adapter", "router"])
def test_a_raised_knob_reaches_the_clamp_and_no_other_request(tmp_path, threshold, kind):
    make_basis(make_llama(), high=40.0).write(tmp_path / "basis")
    rules = {"prompts": {"harm": [{"do": "raise_kappa", "kappa": 1.0, "above": threshold}]}}
    policy = write_policy(tmp_path, rules, knob={"basis": str(tmp_path / "basis")})
    add = add_adapter if kind == "adapter" else add_router
    seed = (1,) if kind == "adapter" else ()
    release = add(tmp_path / "store", tmp_path / "work", *seed)
    with served(tmp_path / "store", policy=policy) as server:
        ask = {"temperature": 0, "max_tokens": 12, "logprobs": True}
        for model in ("bem", "bem:base"):
            raised, again = (chat(server, MILD, model=model, **ask) for _ in range(2))
            assert raised.bem["kappa"] == 1.0
            assert first_logprob(raised) == pytest.approx(first_logprob(again), abs=1e-5)
            plain = chat(server, PLAIN, model=model, **ask)
            wished = chat(server, PLAIN, model=model, extra_body={"bem": {"kappa": 1.0}}, **ask)
            assert "kappa" not in plain.bem and wished.bem["kappa"] == 1.0
            assert abs(first_logprob(plain) - first_logprob(wished)) > 1e-4
            assert wished.bem["cached_tokens"] == 0  # blocks of the other kappa are not its own
        assert chat(server, PLAIN).bem["version"] == release.version
        assert (
            chat(server, PLAIN, model=f"bem@{release.version[:12]}").bem["version"]
            == release.version
        )
        assert len(server.serving.guard.knob.audit) >= 4
        if kind == "router":  # another version, in the same engine
            other = add_router(
                tmp_path / "store", tmp_path / "more", promote=False, seeds=(3, 4, 5)
            )
            name = f"bem@{other.version[:12]}"
            wished = chat(server, PLAIN, model=name, extra_body={"bem": {"kappa": 1.0}}, **ask)
            assert wished.bem["version"] == other.version
            plain = chat(server, PLAIN, model=name, **ask)
            assert abs(first_logprob(plain) - first_logprob(wished)) > 1e-4
            guests = [r for r in server.serving.residents if r.guest]
            assert [r.version for r in guests] == [other.version]
            counted = scraped(server)
            assert f'version="{other.short}"' in counted  # by the release's name


def test_a_basis_of_another_base_stops_the_start(tmp_path):
    basis = read_basis(make_basis(make_llama()).write(tmp_path / "basis"))
    object.__setattr__(basis, "base", "0" * 64)
    vars(basis).pop("digest", None)
    basis.write(tmp_path / "other")
    policy = write_policy(tmp_path, {}, knob={"basis": str(tmp_path / "other")})
    with pytest.raises(Exception, match="fitted for base"), served(policy=policy):
        pass


# --- closed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_error", ["unavailable", "refuse"])
def test_when_the_detector_is_killed_nothing_goes_through_and_it_comes_back(tmp_path, on_error):
    rules = {"prompts": {"harm": [{"do": "flag"}]}, "answers": {"harm": [{"do": "flag"}]}}
    with served(policy=write_policy(tmp_path, rules, on_error=on_error)) as server:
        chat(server, PLAIN)
        detector = server.serving.guard.detector
        os.kill(detector.pid, signal.SIGSTOP)  # it hangs: no answer in time
        detector.timeout_s = 0.2
        if on_error == "unavailable":
            with pytest.raises(InternalServerError) as closed:
                chat(server, "name a river")
            assert closed.value.status_code == 503 and closed.value.code == "guard_unavailable"
        else:
            assert chat(server, "name a river").choices[0].finish_reason == "content_filter"
        assert server.serving.guard.failures == 1
        detector.timeout_s = 30.0
        assert chat(server, "name a tree").choices[0].finish_reason in ("stop", "length")
        os.kill(detector.pid, signal.SIGKILL)
        assert chat(server, "name a bird").choices[0].finish_reason in ("stop", "length")
        assert detector.restarts == 2
        detector.folder = "/nowhere"  # killed, and it cannot come back
        os.kill(detector.pid, signal.SIGKILL)
        if on_error == "unavailable":
            with pytest.raises(InternalServerError):
                chat(server, "name a cloud")
        else:
            assert chat(server, "name a cloud").choices[0].finish_reason == "content_filter"


def test_an_audit_log_that_cannot_be_written_closes_too(tmp_path, threshold):
    rules = {"prompts": {"harm": [{"do": "flag", "above": threshold}]}}
    with served(policy=write_policy(tmp_path, rules, audit=str(tmp_path))) as server:
        assert chat(server, PLAIN).choices[0].message.content is not None
        with pytest.raises(InternalServerError) as closed:
            chat(server, MILD)
        assert closed.value.status_code == 503
