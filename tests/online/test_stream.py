import json

import pytest

from bem.errors import DataError
from bem.online.events import Event, Feedback, Served
from bem.online.stream import read_stream, turn_of


def write(tmp_path, *lines):
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def served(id="r1", prompt="Name a prime.", answer="9"):
    return Served(id, "v", prompt, answer, "asker", slice="maths")


def test_rows_in_any_form_with_their_source_and_slice(tmp_path):
    turns = read_stream(
        write(
            tmp_path,
            {"input": "q", "references": ["a", "b"], "user": "u1", "slice": "s"},
            {"prompt": "p", "completion": "c", "id": "mine"},
        )
    )
    assert [t.row.references for t in turns] == [("a", "b"), ("c",)]
    assert [(t.source, t.slice) for t in turns] == [("u1", "s"), ("row mine", "")]


@pytest.mark.parametrize(
    ("said", "right", "scores"),
    [
        (Feedback("e", "r1", "correction", "u1", text="7"), ("7",), {}),
        (Feedback("e", "r1", "score", "u1", score=0.4), (), {"9": 0.4}),
        (Feedback("e", "r1", "score", "u1", score=1.0), ("9",), {"9": 1.0}),
        (Feedback("e", "r1", "check", score=0.0, check="json"), (), {"9": 0.0}),
        (Feedback("e", "r1", "preference", "u1", over="r2"), ("9",), {}),
    ],
)
def test_what_feedback_says_of_the_right_answer(said, right, scores):
    turn = turn_of(Event(1, said, served(), served("r2", answer="8")))
    assert turn.row.references == right and dict(turn.scores) == scores
    assert turn.labelled == bool(right) and turn.slice == "maths"
    assert turn.row.prompt == "Name a prime."
    assert turn.source == ("check" if said.kind == "check" else "u1")


def test_messages_keep_their_history():
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name a prime."},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "Another."},
    ]
    turn = turn_of(Event(1, Feedback("e", "r1", "correction", text="5"), served(prompt=prompt)))
    assert turn.row.history == (("Name a prime.", "7"),) and turn.row.input == "Another."
    assert turn.row.system == "Be brief." and turn.row.references == ("5",)


def test_what_was_erased_is_no_turn_and_a_tombstone_is_one(tmp_path):
    assert turn_of(Event(1, None)) is None
    path = write(tmp_path, Event(1, None).to_dict(), Event(2, None, erase="u1").to_dict())
    assert [(t.row, t.erase) for t in read_stream(path)] == [(None, "u1")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ([1], "log.jsonl:1: a line must be a JSON object, found list"),
        ({"input": "q"}, "missing references"),
        ({"input": "q", "references": ["a"], "user": 7}, "log.jsonl:1: user must be text, found 7"),
        ({"sequence": 1, "feedback": {"id": "e"}}, "log.jsonl:1: "),
    ],
)
def test_lines_that_cannot_be_used_are_named(tmp_path, line, said):
    with pytest.raises(DataError) as refused:
        read_stream(write(tmp_path, line))
    assert said in str(refused.value)


def test_an_id_that_stands_twice_and_an_empty_file_are_refused(tmp_path):
    row = {"id": "x", "input": "q", "references": ["a"]}
    with pytest.raises(DataError, match="stands twice"):
        read_stream(write(tmp_path, row, row))
    with pytest.raises(DataError, match="holds no stream"):
        read_stream(write(tmp_path))


@pytest.mark.parametrize("prompt", [[3, 4], {"messages": [], "tools": []}])
def test_what_no_row_can_hold_is_passed_over(prompt):
    event = Event(1, Feedback("e", "r1", "score", "u1", score=1.0), served(prompt=prompt))
    assert turn_of(event) is None
