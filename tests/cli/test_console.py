import io
import sys

import pytest

from bem.cli.console import accept_every_character


@pytest.mark.parametrize(
    ("encoding", "text", "shown"),
    [
        ("ascii", "\u22125.0 \u2264 \u00b11 \u2192 \u2603 \u00e9", r"-5.0 <= +-1 -> \u2603 \xe9"),
        ("cp1252", "\u22125.0 \u2264 \u00b11 \u2603 \u00e9", "-5.0 <= \u00b11 \\u2603 \u00e9"),
        ("utf-8", "\u22125.0 \u2603 \udc80", "\u22125.0 \u2603 \\udc80"),
    ],
)
def test_a_character_that_the_encoding_lacks_is_replaced_and_no_minus_is_lost(
    monkeypatch, encoding, text, shown
):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    accept_every_character()
    print(text, end="", flush=True)
    assert raw.getvalue().decode(encoding) == shown
