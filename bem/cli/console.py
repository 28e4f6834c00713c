"""Output that no terminal, pipe or encoding can stop: what was decided must not depend on who reads it."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys

from rich.console import Console
from rich.text import Text

PLAIN = {
    "\u2212": "-",  # a minus sign lost would turn a loss into a gain
    "\u2010": "-",
    "\u2011": "-",
    "\u2013": "-",
    "\u2014": "-",
    "\u2018": "'",
    "\u2019": "'",
    "\u201c": '"',
    "\u201d": '"',
    "\u2026": "...",
    "\u00b1": "+-",
    "\u00b7": "*",
    "\u00d7": "x",
    "\u2022": "*",
    "\u2190": "<-",
    "\u2192": "->",
    "\u2248": "~",
    "\u2264": "<=",
    "\u2265": ">=",
}
"""What stands for a character that the output's encoding lacks; others become an escape (\\u2603)."""


def accept_every_character() -> None:
    """From now on stdout and stderr write whatever they are given, in whatever encoding they have."""
    codecs.register_error("bem.plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="bem.plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    text = (PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in characters)
    return "".join(text), error.end


def read_by_nobody() -> None:
    """Whatever is still written to stdout goes nowhere, without an error at exit."""
    with contextlib.suppress(OSError, ValueError):  # no file behind it, or closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Terminal(Console):
    """A console that goes on when its reader leaves (`bem validate ... | head`), and knows no emoji
    codes: `acc:100:` is a name."""

    def __init__(self, stderr: bool = False):
        super().__init__(stderr=stderr, emoji=False, highlight=False)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        if not self.stderr:
            read_by_nobody()


def tell(head: str, message: str, colour: str) -> None:
    """One message on stderr, as it is: nothing in it is markup."""
    text = Text.assemble((head, f"bold {colour}"), " ", message)
    Terminal(stderr=True).print(text, soft_wrap=True)
