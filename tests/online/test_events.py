import json

import pytest

from bem.errors import DataError
from bem.online.events import (
    Event,
    Feedback,
    Served,
    event_from_dict,
    feedback_from_dict,
    read_export,
    served_from_dict,
)

SERVED = Served("r1", "v" * 64, "Name a prime.", "7", "u1", ({"start": 0},), (0.5, 1.0), "maths")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "score", "score": 1.5}, "score must be a number in [0, 1], got 1.5"),
        ({"kind": "score", "score": float("nan")}, "score must be a number in [0, 1], got nan"),
        ({"kind": "score", "score": True}, "got True"),
        ({"kind": "score", "score": "0.5"}, "got '0.5'"),
        ({"kind": "score"}, "needs score alone, got nothing"),
        ({"kind": "score", "score": 1, "text": "x"}, "needs score alone, got score, text"),
        ({"kind": "correction", "text": 7}, "text must be text, found int"),
        ({"kind": "correction", "text": "\ud800"}, "half a character"),
        ({"kind": "correction", "text": "x" * 200_001}, "200,001 characters"),
        ({"kind": "preference", "over": "r1"}, "cannot be better than itself"),
        ({"kind": "check", "score": 1.0}, "a check has a name"),
        ({"kind": "score", "score": 1.0, "check": "json"}, "nothing else has one"),
        ({"kind": "praise", "score": 1.0}, "kind 'praise' is none of score"),
        ({"kind": "score", "score": 1.0, "id": " "}, "id is empty"),
        ({"kind": "score", "score": 1.0, "user": "a\0b"}, "NUL"),
        ({"kind": "score", "score": 1.0, "stars": 5}, "unknown field 'stars'"),
    ],
)
def test_malformed_feedback_is_refused_with_its_value(values, said):
    with pytest.raises(DataError) as refused:
        feedback_from_dict({"id": "e1", "request": "r1", **values})
    assert said in str(refused.value)


@pytest.mark.parametrize("values", [None, [], "x", {}, {"id": "e1"}, {"id": "e", "request": "r"}])
def test_what_is_no_feedback_is_refused(values):
    with pytest.raises(DataError):
        feedback_from_dict(values)


def test_requests_that_json_cannot_hold_are_refused():
    for prompt in ({1, 2}, float("nan"), "\ud800"):
        with pytest.raises(DataError, match="cannot be written as JSON"):
            Served("r1", "", prompt, "a")
    with pytest.raises(DataError, match="share"):
        Served("r1", "", "q", "a", share=1.0)


def test_records_survive_json():
    said = Feedback("e1", "r1", "check", "u1", score=1, check="json", at="yesterday")
    event = Event(3, said, SERVED)
    again = event_from_dict(json.loads(json.dumps(event.to_dict())))
    assert again == event and again.feedback.digest == said.digest
    assert served_from_dict(json.loads(json.dumps(SERVED.to_dict()))) == SERVED
    tombstone = Event(4, None, erase="u1")
    assert event_from_dict(tombstone.to_dict()) == tombstone


def test_an_export_names_the_line_that_is_damaged(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"sequence": 1, "erase": "u"}\n{"sequence": "2"}\n')
    with pytest.raises(DataError, match=r"log\.jsonl:2: an event is an object"):
        list(read_export(path))
