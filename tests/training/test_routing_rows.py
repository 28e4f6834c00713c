"""What a row may say about who should answer, and what is wrong with one that cannot be used."""

import json

import pytest

from bem.errors import DataError
from bem.training.example import Example
from bem.training.routing_rows import read_routing_rows

EXPERTS = ("sql", "support")
USER = {"role": "user", "content": "which table?"}
SAID = {"role": "assistant", "content": "orders"}


def one(row):
    (found,) = read_routing_rows([row], EXPERTS)
    return found


@pytest.mark.parametrize(
    "row",
    [
        {"input": "which table?", "label": "sql"},
        {"prompt": "which table?", "label": "sql"},
        {"prompt": [USER], "label": "sql"},
        {"messages": [USER], "label": "sql"},
        Example("e", "which table?", (), meta={"label": "sql"}),
    ],
    ids=["input", "prompt", "prompt messages", "messages", "Example"],
)
def test_a_label_needs_no_answer_in_any_form_of_a_row(row):
    found = one(row)
    assert found.row.prompt == "which table?"
    assert (found.labels, found.answered) == (("sql",), False)


@pytest.mark.parametrize(
    "row",
    [
        {"input": "which table?", "references": ["orders"]},
        {"prompt": "which table?", "completion": " orders"},
        {"messages": [USER, SAID]},
    ],
    ids=["references", "completion", "messages"],
)
def test_an_answer_needs_no_label(row):
    found = one(row)
    assert (found.row.answer, found.labels, found.answered) == ("orders", (), True)


def test_a_row_with_both_keeps_both():
    found = one({"messages": [USER, SAID], "label": "base"})
    assert (found.labels, found.answered) == (("base",), True)


def test_a_conversation_has_one_label_for_its_last_turn_or_one_for_each():
    system = {"role": "system", "content": "be brief"}
    messages = [system, USER, SAID, {"role": "user", "content": "thanks"}]
    found = one({"messages": messages, "label": "support"})
    assert found.row.history == (("which table?", "orders"),)
    assert (found.row.system, found.row.prompt) == ("be brief", "thanks")
    assert found.labels == (None, "support")
    assert one({"messages": messages, "label": ["sql", None]}).labels == ("sql", None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": "a", "label": "sqll"}, "label 'sqll' names no expert. Did you mean 'sql'?"),
        ({"input": "a", "label": 3}, "label 3 names no expert"),
        ({"input": "a"}, "neither a label nor an answer"),
        ({"messages": [USER]}, "neither a label nor an answer"),
        ({"input": "a", "label": [None]}, "names nobody"),
        ({"input": "a", "label": ["sql", "sql"]}, "has 1 turns and 2 labels"),
        ({"label": "sql"}, "missing input and references"),
        ({"prompt": [USER, SAID], "label": "sql"}, "prompt must end with what the user asks"),
        ({"messages": [USER], "history": [["a", "b"]], "label": "sql"}, "messages and history"),
        ({"messages": [SAID, USER], "label": "sql"}, "'user' belongs"),
        (["a"], "must be a JSON object, found list"),
    ],
)
def test_what_cannot_be_used_says_what_it_is(row, message):
    with pytest.raises(DataError, match=r"(example 1|Row 'row-1')") as caught:
        read_routing_rows([row], EXPERTS)
    assert message in str(caught.value)


def test_a_file_is_read_line_by_line_and_an_error_names_the_line(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "label": "sql"}\n\n{"prompt": "b", "label": "support"}\n')
    assert [e.row.id for e in read_routing_rows(path, EXPERTS)] == ["mine-1", "mine-2"]
    path.write_text('{"prompt": "a", "label": "sql"}\n{"prompt": "b", "label": "x"}\n')
    with pytest.raises(DataError, match=r"mine\.jsonl:2: label 'x' names no expert"):
        read_routing_rows(path, EXPERTS)
    path.write_text('{"prompt": "a", "label": "sql"}\n{"prompt": \n')
    with pytest.raises(DataError, match=r"mine\.jsonl:2"):
        read_routing_rows(path, EXPERTS)
    path.write_text("\n")
    with pytest.raises(DataError, match="holds no rows"):
        read_routing_rows(path, EXPERTS)
    with pytest.raises(DataError, match="No examples at"):
        read_routing_rows(tmp_path / "none.jsonl", EXPERTS)


def test_an_id_twice_is_an_error():
    rows = [{"id": "x", "prompt": json.dumps(i), "label": "sql"} for i in range(2)]
    with pytest.raises(DataError, match="id 'x' was used before, in example 1"):
        read_routing_rows(rows, EXPERTS)
