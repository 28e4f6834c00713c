"""The demo's lines of a policy show each thing that it does."""

from rich.console import Console

from bem.cli.demo_guard import SHOWN, show_guard


def test_something_is_allowed_flagged_refused_through_a_disguise_and_redacted(capsys):
    show_guard(Console(width=200))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [words[0] for words in lines] == ["allow", "flag", "refuse", "refuse", "redact"]
    assert len(lines) == len(SHOWN) and "[card]," in lines[-1]
