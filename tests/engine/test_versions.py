"""Releases stand side by side, and a request says under which one it runs."""

import pytest
import torch

from bem.engine.engine import Engine
from bem.engine.request import Request
from bem.errors import AttachError, EngineError
from tests.engine.plain import plain, prompts
from tests.engine.test_chain import changed_expert
from tests.engine.test_engine import adapted, engine_of

NEW = 20


def asked(ids, **fields) -> Request:
    return Request(ids, max_new_tokens=NEW, ignore_eos=True, **fields)


def test_a_request_runs_under_the_release_that_it_names_whatever_is_in_use(tokenizer):
    live = adapted("router")
    stable, canary, other = live.shadow(), changed_expert(live, "a"), changed_expert(live, "c")
    texts = prompts(20, 33, 27)
    wanted = {r: [plain(r, ids, NEW) for ids in texts] for r in (stable, canary, other)}
    engine = engine_of(live, tokenizer, slots=6)
    digest = engine.keep("canary", canary)
    assert engine.versions == {"": live.version.digest, "canary": digest}
    assert digest == canary.version.digest != live.version.digest
    with torch.no_grad():  # what is trained in a shadow does not reach the engine
        for weights in canary.router.policy.parameters():
            weights += 1.0
    requests = [asked(ids, version=v) for ids in texts for v in (None, "canary", digest[:12])]
    given = engine.generate(requests)
    of = [wanted[stable], wanted[canary], wanted[canary]]
    assert [list(r.token_ids) for r in given] == [of[k][i] for i in range(3) for k in range(3)]
    assert {r.version for r in given[1::3]} == {digest}
    number = engine.submit(asked(texts[0], version="canary"))
    engine.drop("canary")  # goes on under what it named
    live.adopt(other)
    results = {}
    late = engine.submit(asked(texts[1]))
    while engine.busy:
        results |= {r.id: r for r in engine.step().finished}
    assert list(results[number].token_ids) == wanted[canary][0]
    assert list(results[late].token_ids) == wanted[other][1]
    assert results[number].cached_tokens == 19  # its own chunks, none of the others


def test_versions_that_are_not_there_are_refused_by_name(tokenizer):
    live = adapted("router")
    engine = Engine(live, tokenizer)
    engine.keep("next", live.shadow())
    for unknown in ("canary", "", live.version.digest[:5]):
        with pytest.raises(EngineError, match=r"\(in use\), next \("):
            engine.submit(asked([3, 4], version=unknown))
    with pytest.raises(EngineError, match="no version is kept as 'canary'"):
        engine.drop("canary")
    with pytest.raises(EngineError, match="needs a name"):
        engine.keep("", live.shadow())
    with pytest.raises(AttachError, match="only a shadow of this model"):
        engine.keep("other", adapted("router"))
    static = adapted("v1")
    engine = Engine(static, tokenizer)
    with pytest.raises(EngineError, match="one version at a time"):
        engine.keep("next", static)
    (result,) = engine.generate([asked([3, 4], version=static.version.digest)])
    assert result.version == static.version.digest


def test_the_digest_of_what_was_just_adopted_names_it(tokenizer):
    live = adapted("router")
    release = changed_expert(live, "a")
    engine = Engine(live, tokenizer)
    with pytest.raises(EngineError, match="no version here"):
        engine.submit(asked([3, 4], version=release.version.digest))
    live.adopt(release)
    engine.submit(asked([3, 4], version=release.version.digest))
    assert engine.versions == {"": release.version.digest}


def test_a_version_that_is_changed_in_place_while_a_request_for_it_waits_is_not_served(tokenizer):
    static = adapted("v1")
    engine = Engine(static, tokenizer)
    number = engine.submit(asked([3, 4], version=static.version.digest))
    other = engine.submit(asked([3, 4]))
    static.load_state_dict({n: t + 1 for n, t in static.state_dict().items()})
    results = {}
    while engine.busy:
        results |= {r.id: r for r in engine.step().finished}
    assert results[number].finish_reason == "error" and "changed in place" in results[number].error
    assert list(results[other].token_ids) == plain(static, [3, 4], NEW)
