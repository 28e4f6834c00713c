"""The audit log: whole lines, no texts unless asked for, and nothing goes on without it."""

import json
from datetime import UTC, datetime

import pytest

from bem.errors import DataError, SafetyError
from bem.safety.audit import AuditLog, counted
from bem.safety.guard import Met, Ruling

RULING = Ruling(
    "refuse", "a text", (Met("harm", "refuse", 0.9, "harm 0.90"), Met("abuse", "flag", 0.6, ""))
)
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


def test_a_line_says_who_where_what_and_not_the_text(tmp_path):
    path = tmp_path / "new" / "audit.jsonl"
    AuditLog(path, clock=lambda: NOON).note("id-1", "ada", "prompts", "a text", RULING)
    assert "a text" not in path.read_text() and path.stat().st_mode & 0o077 == 0
    line = json.loads(path.read_text())
    assert line["at"] == "2026-01-02T12:00:00.000+00:00" and line["characters"] == 6
    assert (line["id"], line["key"], line["place"], line["action"]) == (
        "id-1",
        "ada",
        "prompts",
        "refuse",
    )
    AuditLog(path, keep_text=True).note("id-2", "ada", "prompts", "a\ntext \ud800", RULING)
    assert json.loads(path.read_text().splitlines()[1])["text"] == "a\ntext \ud800"


def test_a_torn_line_harms_no_other_and_is_counted(tmp_path):
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.note("1", "-", "prompts", "x", RULING)
    with path.open("a") as file:
        file.write('{"at": "2026')  # the server was killed here
    log.note("2", "-", "answers", "x", RULING)
    counts, torn = counted(path)
    assert (
        torn == 1
        and counts["prompts", "harm", "refuse"] == counts["answers", "harm", "refuse"] == 1
    )
    assert counts["prompts", "abuse", "flag"] == 1


def test_what_cannot_be_written_or_read_is_an_error(tmp_path):
    with pytest.raises(SafetyError, match="Nothing goes on unaudited"):
        AuditLog(tmp_path).note("1", "-", "prompts", "x", RULING)
    AuditLog(None).note("1", "-", "prompts", "x", RULING)
    with pytest.raises(DataError):
        counted(tmp_path / "none")
