"""Answers have the form that was asked for, and requests beside them do not notice."""

import json
import re
import sys

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bem.engine.engine import Engine
from bem.engine.grammar import COMPILED, LONGEST, Grammar, Grammars
from bem.engine.request import Request, Sampling
from bem.errors import EngineError, MissingExtra
from tests.conftest import make_llama, make_tokenizer

PROMPT = "name the function"
HOT = Sampling(temperature=1.5, seed=3)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(make_llama(), make_tokenizer(), slots=8, cache_gib=0.01)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(make_tokenizer(), frozenset([1]), 320)


def reads(grammars: Grammars, grammar: Grammar, text: str) -> str:
    """How a text ends under a grammar: "done", "may end", "goes on", or "refused"."""
    matcher = grammars.matcher(grammar)
    for token in make_tokenizer()(text)["input_ids"]:
        if not matcher.allowed(320)[token]:
            return "refused"
        matcher.accept(token)
    return "done" if matcher.done else "may end" if matcher.allowed(320)[1] else "goes on"


# schemas of finite answers: a model of random weights comes to an end under them
LEAVES = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 4)),
    st.builds(
        lambda a, n: {"type": "integer", "minimum": a, "maximum": a + n},
        st.integers(-99, 99),
        st.integers(0, 500),
    ),
    st.lists(st.sampled_from(["a", "né", '"', "\\", 1, None, True, 2.5]), min_size=1, unique=True).map(
        lambda values: {"enum": values}
    ),
    st.just({"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"}),
    st.just({"type": "string", "format": "date"}),
)  # fmt: skip


def _nested(inner):
    names = st.lists(
        st.sampled_from(["a", "b", "name", "x y"]), min_size=1, max_size=3, unique=True
    )
    arrays = st.builds(
        lambda items, n: {"type": "array", "items": items, "maxItems": n}, inner, st.integers(0, 2)
    )
    objects = st.builds(
        lambda keys, of, required: {
            "type": "object", "properties": dict.fromkeys(keys, of),
            "required": keys[:required], "additionalProperties": False,
        },
        names, inner, st.integers(0, 3),
    )  # fmt: skip
    return st.one_of(arrays, objects, st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner))


SCHEMAS = st.recursive(LEAVES, _nested, max_leaves=4)


@settings(
    max_examples=4, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(schemas=st.lists(SCHEMAS, min_size=8, max_size=8), seed=st.integers(0, 99))
def test_every_finished_answer_under_a_schema_parses_and_validates(engine, schemas, seed):
    asked = [
        Request(
            PROMPT,
            max_new_tokens=120,
            grammar=Grammar.json_schema(schema),
            sampling=Sampling(temperature=[0.0, 1.5][i % 2], seed=seed),
        )
        for i, schema in enumerate(schemas)
    ]
    given = engine.generate(asked)
    for schema, result in zip(schemas, given, strict=True):
        if result.finish_reason == "length":  # white space takes its turns
            continue
        assert result.finish_reason == "stop"
        jsonschema.validate(json.loads(result.text), schema)
    assert sum(r.finish_reason == "stop" for r in given) >= 6


def test_a_pattern_is_matched_whole_and_a_choice_letter_by_letter(engine):
    texts = ["yes", "no", "né 😀", 'a "b"\n', "a", "ab"]
    patterns = [r"[a-c]{3,5}", r"\d\d:\d\d", r"(?:ab|c)+d"]
    asked = [
        Request(PROMPT, max_new_tokens=60, grammar=grammar, sampling=sampling)
        for sampling in (HOT, Sampling())
        for grammar in (Grammar.choice(texts), *map(Grammar.regex, patterns))
    ]
    given = engine.generate(asked)
    for asked_, result in zip(asked, given, strict=True):
        if asked_.grammar.kind == "choice":
            assert result.finish_reason == "stop" and result.text in texts
        elif result.finish_reason == "stop":
            assert re.fullmatch(asked_.grammar.text, result.text)
    # what nothing can follow ends without another token
    fixed = [r for a, r in zip(asked, given, strict=True) if a.grammar.text == r"\d\d:\d\d"]
    assert [r.finish_reason for r in fixed] == ["stop", "stop"]


def test_requests_without_a_grammar_are_the_same_to_the_bit_beside_one(engine):
    free = [
        Request(PROMPT, max_new_tokens=12, ignore_eos=True, logprobs=2),
        Request("return", max_new_tokens=12, ignore_eos=True, logprobs=2, sampling=HOT),
    ]
    beside = {"prompt": PROMPT, "max_new_tokens": 12, "logprobs": 2}
    engine.store.clear()
    alone = engine.generate([*free, Request(**beside, ignore_eos=True)])
    engine.store.clear()
    under = engine.generate([*free, Request(**beside, grammar=Grammar.regex("[xyz]{40}"))])
    for a, b in zip(alone[:2], under[:2], strict=True):
        assert a.token_ids == b.token_ids and a.logprobs == b.logprobs
    assert re.fullmatch("[xyz]{12}", under[2].text) and under[2].finish_reason == "length"
    # a token's log-probability is the model's own, whatever the grammar leaves of its rivals
    assert under[2].logprobs[0].top == alone[2].logprobs[0].top


def test_a_stop_string_ends_an_answer_before_its_grammar_does(engine):
    (result,) = engine.generate(
        [PROMPT], max_new_tokens=30, grammar=Grammar.regex("ab{9}c"), stop=("bbb",)
    )
    assert result.text == "a" and result.finish_reason == "stop"


def test_json_has_room_between_its_tokens_but_not_without_end(grammars):
    schema = Grammar.json_schema(
        {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    )
    value = {"a": 1, "b": [1, {"c": None}]}
    for text in (json.dumps(value), json.dumps(value, indent=2), '{"a":-0}'):
        assert reads(grammars, schema, text) == "done"
    for text in ('{"a":  1}', '{"b": 1}', '{"a": 1.5}', '{"a": 1, "a": 1}', "{}"):
        assert reads(grammars, schema, text) == "refused"
    own = Grammar.json_schema({"type": "boolean", "x-guidance": {"whitespace_flexible": False}})
    assert reads(grammars, own, "true") == "done"


def test_an_answer_may_end_where_its_grammar_may(grammars):
    assert reads(grammars, Grammar.regex("[ab]+"), "ab") == "may end"
    assert reads(grammars, Grammar.regex("[ab]{4}"), "ab") == "goes on"
    assert reads(grammars, Grammar.choice(["a", "ab"]), "a") == "may end"
    assert reads(grammars, Grammar.choice(["a", "ab"]), "ab") == "done"
    assert reads(grammars, Grammar.lark('start: "(" start ")" | "x"'), "((x))") == "done"


def test_one_answer_does_not_move_another_under_the_same_grammar(grammars):
    one, other = (grammars.matcher(Grammar.regex("[ab]{2}")) for _ in range(2))
    a = make_tokenizer()("a")["input_ids"][0]
    one.accept(a), one.accept(a)
    assert one.done and not other.done and other.allowed(320)[a]
    for number in range(COMPILED + 5):
        grammars.matcher(Grammar.regex(f"a{{{number}}}b"))
    assert len(grammars._known) == COMPILED


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar.regex("("), "unclosed group"),
        (Grammar.regex("(?=a)b"), "look-around"),
        (Grammar.json_schema({"not": {"type": "null"}}), 'Unimplemented keys: \\["not"\\]'),
        (Grammar.json_schema("{"), "json_schema"),
        (Grammar.json_schema({"enum": []}), "Unsatisfiable"),
        (Grammar.json_schema("false"), "Expecting object schema"),
        (Grammar.lark("start: x"), 'unknown name: "x"'),
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused_when_it_is_asked_for(engine, grammar, message):
    with pytest.raises(EngineError, match=message):
        engine.submit(Request(PROMPT, grammar=grammar))
    assert not engine.busy


def test_what_makes_no_sense_is_refused():
    with pytest.raises(EngineError, match="There is: json_schema, regex, choice, lark"):
        Grammar("json", "{}")  # type: ignore[arg-type]
    for texts in ([], "yes", [1]):
        with pytest.raises(EngineError, match="a list of at least one text"):
            Grammar.choice(texts)
    with pytest.raises(EngineError, match=f"longer than {LONGEST}"):
        Grammar.regex("a" * (LONGEST + 1))
    with pytest.raises(EngineError, match="the grammar ends its answers"):
        Request(PROMPT, grammar=Grammar.regex("a"), ignore_eos=True)
    with pytest.raises(EngineError, match="needs a token that ends an answer"):
        Grammars(make_tokenizer(), frozenset(), 320).matcher(Grammar.regex("a"))


def test_a_grammar_that_outgrows_its_limits_ends_its_own_request_alone(engine):
    greedy = Grammar.regex("((a{1,100}){1,100}){1,100}")
    bad, good = engine.generate(
        [
            Request(PROMPT, max_new_tokens=60, grammar=greedy),
            Request(PROMPT, max_new_tokens=60, ignore_eos=True),
        ]
    )
    assert bad.finish_reason == "error" and "too many expressions" in bad.error
    assert set(bad.text) <= {"a"} and "<state>" not in bad.error
    assert good.finish_reason == "length" and len(good.token_ids) == 60 and not good.error
    assert engine._rows == [None] * engine.slots


def test_without_the_library_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtra, match=r"pip install 'bem\[grammar\]'"):
        Grammars(make_tokenizer(), frozenset([1]), 320).matcher(Grammar.regex("a"))
