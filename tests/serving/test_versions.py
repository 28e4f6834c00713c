"""Versions change while answers run: each is, from its first token to its last, of the one that it names."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from bem.errors import BaseMismatch
from bem.runs.store import Store
from tests.conftest import make_llama
from tests.serving.running import add_adapter, add_router, client, replayed, served
from tests.serving.test_api import PROMPT, complete, raw


def wait_for(condition, seconds=60.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.02)


def in_front(server, version):
    return lambda: server.serving.residents.current.version == version


@pytest.fixture
def homes(tmp_path):
    return tmp_path / "store", tmp_path / "work"


def test_promotion_and_rollback_are_followed_under_load_and_versions_never_mix(homes):
    first = add_adapter(*homes, seed=1)
    with served(homes[0]) as server:
        api, asking = client(server), threading.Event()
        answers = []

        def ask(worker: int):
            i = 0
            while not asking.is_set():
                seed = worker * 1000 + (i := i + 1)
                answer = complete(api, prompt=f"User: {seed % 3}\nAssistant:", seed=seed)
                answers.append((seed, answer.bem["version"], answer.choices[0].text))

        with ThreadPoolExecutor(4) as pool:
            workers = [pool.submit(ask, worker) for worker in range(4)]

            def seen(version):
                return lambda: any(v == version for _, v, _ in answers)

            wait_for(seen(first.version))
            second = add_adapter(*homes, seed=2)
            wait_for(seen(second.version))
            Store(homes[0]).rollback(reason="back")
            wait_for(in_front(server, first.version))
            Store(homes[0]).rollback("base", reason="all of it")
            bare = server.serving.residents.bare.version
            wait_for(seen(bare))
            asking.set()
            for worker in workers:
                worker.result()
        assert {version for _, version, _ in answers} == {first.version, second.version, bare}
        for seed, version, text in answers[:: max(1, len(answers) // 12)]:
            prompt = f"User: {seed % 3}\nAssistant:"
            assert text == replayed(server, version, prompt, 12, seed), version


def test_an_answer_that_runs_ends_on_the_version_with_which_it_began(homes):
    first = add_adapter(*homes, seed=1)
    with served(homes[0]) as server:
        options = {"max_tokens": 200, "seed": 1, "extra_body": {"ignore_eos": True}}
        stream = complete(client(server), stream=True, **options)
        pieces = [next(stream)]
        second = add_adapter(*homes, seed=2)
        wait_for(in_front(server, second.version))
        pieces += list(stream)
        assert pieces[-1].bem["version"] == first.version
        text = "".join(piece.choices[0].text for piece in pieces)
        assert text == replayed(server, first.version, PROMPT, 200, 1, ignore_eos=True)


def test_a_damaged_release_is_not_served_and_the_good_one_goes_on(homes):
    good = add_adapter(*homes, seed=1)
    with served(homes[0]) as server:
        bad = add_adapter(*homes, seed=2, promote=False)
        weights = Store(homes[0]).shelf.objects / bad.files["adapter_model.safetensors"]
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.chmod(0o600)
        weights.write_bytes(content)
        with pytest.raises(openai.InternalServerError, match="cannot be loaded"):
            complete(client(server), model=f"bem@{bad.short}")
        assert complete(client(server)).bem["version"] == good.version


def test_a_store_that_is_overwritten_leaves_what_is_served(homes):
    good = add_adapter(*homes, seed=1)
    with served(homes[0]) as server:
        (homes[0] / "current.json").write_text("{}")
        (homes[0] / "ledger.jsonl").write_text("")
        wait_for(lambda: server.serving.residents.problems)
        assert complete(client(server)).bem["version"] == good.version
        assert json.loads(raw(server, "/ready", None)[2])["problems"] > 0


def test_a_store_of_another_base_is_refused_at_the_start(homes):
    add_adapter(*homes, seed=1)
    from bem.config import ServingConfig
    from bem.serving.server import Server
    from tests.serving.running import base

    other = make_llama(hidden_size=64), base()[1]
    with pytest.raises(BaseMismatch):
        Server(ServingConfig(store=str(homes[0]), port=0), other)


def test_a_store_may_come_later(homes):
    with served(homes[0]) as server:
        bare = complete(client(server)).bem["version"]
        assert bare == server.serving.residents.bare.version
        release = add_adapter(*homes, seed=1)
        wait_for(in_front(server, release.version))
        assert complete(client(server)).bem["version"] == release.version


def test_a_canary_gets_its_share_of_conversations_and_each_stays_where_it_is(homes):
    front = add_adapter(*homes, seed=1)
    canary = add_adapter(*homes, seed=2, promote=False)
    with served(homes[0], canary={canary.short: 0.3}) as server:
        api = client(server)

        def version(conversation: str) -> str:
            return complete(api, max_tokens=1, user=conversation).bem["version"]

        names = [f"conversation {i}" for i in range(60)]
        with ThreadPoolExecutor(8) as pool:
            first, again = list(pool.map(version, names)), list(pool.map(version, names))
        assert first == again
        assert set(first) == {front.version, canary.version}
        assert 8 <= first.count(canary.version) <= 28  # 18 of 60 are expected
        assert complete(api, model=f"bem@{front.short}").bem["version"] == front.version


def test_a_canary_that_is_damaged_leaves_its_conversations_to_the_version_in_front(homes):
    front = add_adapter(*homes, seed=1)
    canary = add_adapter(*homes, seed=2, promote=False)
    with served(homes[0], canary={canary.short: 0.9}) as server:
        weights = Store(homes[0]).shelf.objects / canary.files["adapter_model.safetensors"]
        weights.chmod(0o600)
        weights.write_bytes(b"")
        answers = [complete(client(server), max_tokens=1, user=str(i)) for i in range(6)]
        assert {answer.bem["version"] for answer in answers} == {front.version}
        assert not server.serving.residents.canaries


def test_no_more_versions_than_allowed_stay_in_memory(homes):
    releases = [add_adapter(*homes, seed=seed) for seed in range(1, 5)]
    with served(homes[0], resident=2) as server:
        api = client(server)
        for release in (*releases, *releases[::-1]):
            answer = complete(api, model=f"bem@{release.short}", seed=1)
            assert answer.bem["version"] == release.version
            assert len(list(server.serving.residents)) <= 3  # the bare base beside them
        assert replayed(server, release.version, PROMPT, 12, 1) == answer.choices[0].text


def test_routers_over_experts_of_the_same_ranks_share_an_engine_and_answer_as_alone(homes):
    first = add_router(*homes, seeds=(0, 1, 2))
    second = add_router(*homes, seeds=(0, 1, 5), promote=False)
    with served(homes[0], canary={second.short: 0.5}) as server:
        api = client(server)

        def ask(i: int):
            answer = complete(api, prompt=f"User: {i}\nAssistant:", user=str(i), seed=i)
            return answer.bem["version"], answer.choices[0].text

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(24)))
        assert {version for version, _ in answers} == {first.version, second.version}
        residents = {r.version: r for r in server.serving.residents}
        assert residents[second.version].guest and not residents[first.version].guest
        for i in (*range(4), *range(20, 24)):
            version, text = answers[i]
            assert text == replayed(server, version, f"User: {i}\nAssistant:", 12, i)


def test_versions_that_share_an_expert_share_its_chunks_and_a_rollback_is_warm(homes):
    add_router(*homes)
    with served(homes[0]) as server:
        api, long = (
            client(server),
            "User: return the value that this function describes\nAssistant:",
        )
        cold = complete(api, model="bem:a", prompt=long, seed=1)
        add_adapter(*homes, seed=1)
        wait_for(lambda: complete(api, max_tokens=1).bem["version"] != cold.bem["version"])
        Store(homes[0]).rollback(reason="back")
        wait_for(in_front(server, cold.bem["version"]))
        warm = complete(api, model="bem:a", prompt=long, seed=1)
        assert warm.usage.prompt_tokens_details.cached_tokens > 0
        assert warm.choices[0].text == cold.choices[0].text
