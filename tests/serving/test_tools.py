"""Tools: shown as the base's template shows them, calls read back out of answers, and held to where that is asked."""

import json

import openai
import pytest

from bem.engine.grammar import Grammars
from bem.errors import Refused
from bem.serving.schemas import ChatRequest
from bem.serving.server import Server
from bem.serving.tools import Call, CallReader, Tools, call_form, messages_of, tools_of
from bem.training.chat import turns_of_messages
from bem.training.data import prompt_of
from tests.conftest import make_llama, make_tokenizer
from tests.serving.running import TEMPLATE as PLAIN
from tests.serving.running import ServingConfig, base, client

# the form of Hermes, Qwen2.5 and SmolLM2-1.7B
TEMPLATE = """
{%- if tools %}{{ 'Tools:' }}{% for t in tools %}{{ ' ' + t | tojson }}{% endfor %}{{ '\n' }}{% endif %}
{%- for m in messages %}
{%- if m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] }}
{%- for call in m['tool_calls'] or [] %}{{ '\n' if m['content'] or not loop.first }}{{ '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ eos_token }}
{%- elif m['role'] == 'tool' %}{{ 'Returned: ' + m['content'] + '\n' }}
{%- else %}{{ 'User: ' + m['content'] + '\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"""
BARE = TEMPLATE.replace("<tool_call>\n", "").replace("\n</tool_call>", "")
BARE = BARE.replace('"arguments"', '"parameters"')
CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"City": {"enum": ["Rome", "Oslo"]}},
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def speaks(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def asked(**fields) -> ChatRequest:
    fields = {"messages": [{"role": "user", "content": "x"}], "tools": [WEATHER, CLOCK], **fields}
    return ChatRequest(**fields)


def tools(template=TEMPLATE, **fields) -> Tools:
    found = tools_of(asked(**fields), speaks(template))
    assert found is not None
    return found


def read(text, size, found: Tools):
    """(text, calls) of an answer that comes in pieces of so many letters."""
    reader, said, calls = CallReader(found), "", []
    for at in range(0, len(text), size):
        piece, new = reader.push(text[at : at + size])
        said, calls = said + piece, calls + new
    piece, new = reader.push("", last=True)
    return said + piece, calls + new


# --- the form of calls ----------------------------------------------------------------------------


def test_the_form_of_a_templates_calls_is_found_by_having_it_write_one():
    marked, bare = (call_form(speaks(t), t) for t in (TEMPLATE, BARE))
    assert marked.opening == "<tool_call>\n" and marked.closing == "\n</tool_call>"
    assert marked.arguments == "arguments"
    assert (bare.opening, bare.closing, bare.arguments) == ("", "", "parameters")


LISTED = TEMPLATE.replace('\'<tool_call>\\n{"name"', '\'[{"name"').replace("}\\n</tool_call>", "}]")


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (None, "no chat template"),
        (PLAIN, "shows no tools"),
        (TEMPLATE.replace('{"name": "', "call "), "as the base's chat template writes them"),
        ("{{ raise_exception('no') }}", "fails on a call"),
    ],
)
def test_a_base_whose_template_has_no_tools_says_so(template, why):
    with pytest.raises(Refused, match=why) as refused:
        tools(template)
    assert refused.value.status == 400 and refused.value.param == "tools"


def test_marks_that_are_special_tokens_are_not_read():
    tokenizer = speaks(TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>"]})
    with pytest.raises(Refused, match="between special tokens"):
        tools_of(asked(), tokenizer)


ROME = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
CASES = [
    ("plain words <b> and < more", "plain words <b> and < more", []),
    (ROME, "", ["Rome"]),
    (f"Let me look.\n{ROME}", "Let me look.", ["Rome"]),
    (f"{ROME}\n{ROME.replace('Rome', 'Oslo')}\n", "", ["Rome", "Oslo"]),
    (ROME.removesuffix("\n</tool_call>"), "", ["Rome"]),  # ended before the mark
    (f"a {ROME} b", "a b", ["Rome"]),
    (ROME.replace("weather", "unknown"), ROME.replace("weather", "unknown"), []),
    (ROME.replace('"}', ""), ROME.replace('"}', ""), []),
    ("<tool_call>[1]</tool_call> ", "<tool_call>[1]</tool_call> ", []),
    ("<tool_call>", "<tool_call>", []),
    ("ends with <tool_", "ends with <tool_", []),
    ("two\n\n", "two\n\n", []),
]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(("text", "said", "cities"), CASES)
def test_calls_are_told_from_text_however_the_answer_is_cut(text, said, cities, size):
    expected = [Call("weather", json.dumps({"city": city})) for city in cities]
    assert read(text, size, tools()) == (said, expected)


@pytest.mark.parametrize("size", [1, 1000])
def test_without_marks_the_whole_answer_is_the_call(size):
    found = tools(BARE)
    call = '{"name": "clock", "parameters": {}}'
    assert read(f" {call} ", size, found) == ("", [Call("clock", "{}")])
    assert read(f"say {call}", size, found) == (f"say {call}", [])
    assert read('{"a": 1}', size, found) == ('{"a": 1}', [])


# --- conversations --------------------------------------------------------------------------------

CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    ],
}  # fmt: skip
HISTORY = [
    {"role": "developer", "content": "be brief"},
    {"role": "user", "content": "how is it"},
    CALLED,
    {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    {"role": "assistant", "content": "Sunny."},
    {"role": "user", "content": "thanks"},
]


def test_a_conversation_with_calls_is_what_the_template_writes_with_turns_where_answers_begin():
    tokenizer = speaks(TEMPLATE)
    said = messages_of(asked(messages=HISTORY).messages, ["It rains."])
    assert said[-1]["content"] == "It rains.\nthanks" and said[3]["name"] == "weather"
    shown = [WEATHER]
    ids, starts = prompt_of(turns_of_messages(said, tokenizer, shown), tokenizer)
    whole = tokenizer.apply_chat_template(
        said, tools=shown, tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(ids) == whole
    behind = [tokenizer.decode(ids[start + 1 :]) for start in starts]
    assert [text[:11] for text in behind] == ["<tool_call>", "Sunny.<eos>"]


@pytest.mark.parametrize(
    "messages",
    [
        HISTORY[2:],
        [*HISTORY[:4], HISTORY[4]],
        [*HISTORY[:2], {"role": "tool", "tool_call_id": "1", "content": "sunny"}],
        [*HISTORY, {"role": "system", "content": "x"}, HISTORY[1]],
        [HISTORY[0]],
        [
            HISTORY[1],
            {**CALLED, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "[1"}}]},
            HISTORY[3],
        ],
    ],
)
def test_a_conversation_that_makes_no_sense_is_refused(messages):
    with pytest.raises(Refused) as refused:
        messages_of(asked(messages=messages).messages, [])
    assert refused.value.status == 400 and refused.value.param == "messages"


# --- what is held to ------------------------------------------------------------------------------


def follows(found: Tools, text: str) -> bool:
    """Does the grammar let an answer be this?"""
    tokenizer = speaks(TEMPLATE)
    grammars = Grammars(tokenizer, frozenset([1]), 320)
    matcher = grammars.matcher(found.grammar)
    for token in tokenizer(text)["input_ids"]:
        if not matcher.allowed(320)[token]:
            return False
        matcher.accept(token)
    return matcher.done or bool(matcher.allowed(320)[1])


NOW = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize(
    ("fields", "right", "wrong"),
    [
        ({"tool_choice": "required"}, [ROME, NOW, f"{ROME}\n{NOW}"], ["hello", "", ROME.replace("Rome", "Bonn")]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [ROME, NOW], [f"{ROME}\n{NOW}"]),
        ({"tool_choice": NAMED}, [ROME], [NOW, f"{ROME}\n{ROME}"]),
        ({"tools": [{**WEATHER, "function": {**WEATHER["function"], "strict": True}}, CLOCK]},
         ["hello <b>", "", f"so {ROME}", NOW.replace("{}", '{"a": 1}'), f"{ROME}\nand {NOW} ."],
         [ROME.replace("Rome", "Bonn"), "a <tool_call> b"]),
    ],
)  # fmt: skip
def test_calls_are_held_to_their_schemas_where_that_is_asked(fields, right, wrong):
    found = tools(**fields)
    assert [text for text in right if not follows(found, text)] == []
    assert [text for text in wrong if follows(found, text)] == []


# --- the server -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def api():
    config = ServingConfig(port=0, slots=4, max_new_tokens=64)
    server = Server(config, (make_llama(), speaks(TEMPLATE))).start()
    yield client(server)
    server.stop()


def chat(api, messages=({"role": "user", "content": "how is it"},), **fields):
    fields = {"model": "bem", "max_tokens": 100, "tools": [WEATHER], "seed": 3, **fields}
    return api.chat.completions.create(messages=list(messages), **fields)


def test_a_call_comes_back_and_its_result_goes_in(api):
    choice = chat(api, tool_choice="required", parallel_tool_calls=False).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    history = [{"role": "user", "content": "how is it"}, choice.message, result]
    for last in (history, [history[0], choice.message.model_dump(), result]):
        answer = chat(api, last, max_tokens=4)
        assert answer.usage.prompt_tokens > 60 and answer.choices


def test_a_streamed_call_is_the_whole_one_in_pieces(api):
    whole = chat(api, tool_choice=NAMED, logprobs=True).choices[0]
    pieces = [p.choices[0] for p in chat(api, tool_choice=NAMED, logprobs=True, stream=True)]
    said = [c for p in pieces for c in p.delta.tool_calls or ()]
    assert [(c.index, c.function.name, c.type) for c in said] == [(0, "weather", "function")]
    assert said[0].function.arguments == whole.message.tool_calls[0].function.arguments
    assert not any(p.delta.content for p in pieces)
    assert [p.finish_reason for p in pieces] == [None] * (len(pieces) - 1) + ["tool_calls"]
    tokens = [t.logprob for p in pieces if p.logprobs for t in p.logprobs.content]
    assert tokens == pytest.approx([t.logprob for t in whole.logprobs.content], abs=1e-4)


def test_the_clients_own_stream_reader_puts_the_call_together(api):
    with api.chat.completions.stream(
        model="bem", messages=[{"role": "user", "content": "x"}], tools=[WEATHER], seed=1,
        tool_choice=NAMED, max_tokens=100,
    ) as stream:  # fmt: skip
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.name == "weather"


def test_no_call_is_text_and_none_shows_no_tools(api):
    free, none = chat(api, max_tokens=8), chat(api, max_tokens=8, tool_choice="none")
    without = chat(api, max_tokens=8, tools=openai.NOT_GIVEN)
    assert free.choices[0].message.tool_calls is None and free.choices[0].message.content
    assert none.choices[0].message.content == without.choices[0].message.content
    assert free.usage.prompt_tokens > none.usage.prompt_tokens == without.usage.prompt_tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "clock"}}}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "tools"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
    ],
)
def test_tools_that_cannot_be_used_are_refused_with_their_field(api, fields, param):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(api, **fields)
    assert refused.value.body["param"] == param


def test_a_base_without_tools_refuses_them_over_http():
    server = Server(ServingConfig(port=0), base()).start()
    try:
        for fields in ({}, {"messages": HISTORY, "tools": openai.NOT_GIVEN}):
            with pytest.raises(openai.BadRequestError, match="shows no tools"):
                chat(client(server), **fields)
    finally:
        server.stop()
