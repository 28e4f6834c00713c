"""SQL, shell, calls and code, compared without the spacing that means nothing; what is quoted is data.

    skeleton, quotes = set_aside(text, pattern)     "a  = 'x  Y'" -> "a  = \\0\\0", ["'x  Y'"]

The skeleton is normalised, and the quotes are put back as they were.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

_MARK = re.compile("\0([0-9]+)\0")

_SQL = re.compile(
    r"""--[^\n]*|/\*.*?\*/"""
    r"""|"(?:[^"]|"")*"|`[^`]*`"""
    r"""|\$(?P<tag>(?:[A-Za-z_]\w*)?)\$.*?\$(?P=tag)\$|(?<!\w)[eE]'(?:\\.|''|[^'\\])*'"""
    # an apostrophe within a word opens nothing: `men's doubles` is a column of WikiSQL
    r"""|(?<!\w)[nNeExXbB]?'(?:[^']|'')*'""",
    re.DOTALL,
)
_SHELL = re.compile(
    r"""<<-?[ \t]*(?P<q>['"]?)(?P<end>\w+)(?P=q)[^\n]*\n.*?\n\s*(?P=end)(?=\n|$)"""  # a here-document
    r"""|\\.|'[^']*'|"(?:\\.|[^"\\])*\"""",
    re.DOTALL,
)
_CODE = re.compile(
    r'''"""(?s:\\.|(?!""").)*"""'''
    r"""|'''(?s:\\.|(?!''').)*'''"""
    r"""|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'"""
)
_STATEMENT = re.compile(
    r"(?:select|values)\b\s*\S|insert\s+into\b|update\b.*\bset\b|delete\s+from\b", re.DOTALL
)


def normal_sql(text: str) -> str:
    """Lower case, single spaces, none around punctuation, no comments, no final semicolon."""
    return " ".join(sql_words(text))


def sql_words(text: str) -> list[str]:
    """The words of `normal_sql`; quoted text belongs to the word in which it stands."""
    skeleton, quotes = _sql_skeleton(text)
    skeleton = re.sub(r"\s*([(),=<>!]+)\s*", r"\1", " ".join(skeleton.lower().split()))
    return [_restored(word, quotes) for word in skeleton.rstrip("; ").split()]


def is_sql(text: str) -> bool:
    """Has it the shape of a query or of a change: a first word, closed quotes and brackets?"""
    skeleton, _ = _sql_skeleton(text)
    skeleton = skeleton.lower().strip().rstrip("; \n\t")
    if re.search(r'"|`|(?<!\w)' + "'", skeleton) or not _is_balanced(skeleton):
        return False
    if re.match(r"with\b", skeleton):  # common table expressions, then what uses them
        return _STATEMENT.search(_outside_brackets(skeleton)) is not None
    return _STATEMENT.match(skeleton.lstrip("( \n\t")) is not None


def normal_shell(text: str) -> str:
    """Single blanks, single newlines (they part commands), continued lines joined."""
    skeleton, quotes = _shell_skeleton(text)
    return _restored(skeleton, quotes)


def shell_words(text: str) -> list[str]:
    """Words parted by blanks that are not quoted."""
    skeleton, quotes = _shell_skeleton(text)
    return [_restored(word, quotes) for word in skeleton.split()]


def is_shell(text: str) -> bool:
    """One command line whose quotes are closed."""
    skeleton, _ = _shell_skeleton(text)
    try:
        return "\n" not in skeleton and bool(shlex.split(text))
    except ValueError:
        return False


def normal_call(text: str) -> str:
    """No white space but the one blank between two words."""
    skeleton, quotes = set_aside(text, _CODE)
    skeleton = re.sub(r"(?<=\w)\s+(?=\w)", " ", skeleton.strip())
    return _restored(re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", skeleton), quotes)


def normal_code(text: str) -> str:
    """Lines with their indentation, single blanks behind it; no blank lines.

    The first line's indentation is not compared: answers are stripped.
    """
    skeleton, quotes = set_aside(text.strip(), _CODE)
    lines = [line.rstrip() for line in skeleton.split("\n")]
    indents = [line[: len(line) - len(line.lstrip())] for line in lines]
    joined = [i + " ".join(line.split()) for i, line in zip(indents, lines, strict=True) if line]
    return _restored("\n".join(joined), quotes)


def set_aside(
    text: str, pattern: re.Pattern[str], is_data: Callable[[str], bool] = lambda quote: True
) -> tuple[str, list[str]]:
    """The text with a mark in place of each match, and the matches; those that are not data are dropped."""
    quotes: list[str] = []

    def mark(match: re.Match[str]) -> str:
        if not is_data(match[0]):
            return ""
        quotes.append(match[0])
        return f"\0{len(quotes) - 1}\0"

    return pattern.sub(mark, text.replace("\0", "\ufffd")), quotes


def _restored(skeleton: str, quotes: list[str]) -> str:
    return _MARK.sub(lambda match: quotes[int(match[1])], skeleton)


def _sql_skeleton(text: str) -> tuple[str, list[str]]:
    return set_aside(text, _SQL, lambda quote: not quote.startswith(("--", "/*")))


def _shell_skeleton(text: str) -> tuple[str, list[str]]:
    skeleton, quotes = set_aside(text, _SHELL, lambda quote: quote != "\\\n")
    lines = [" ".join(line.split()) for line in skeleton.split("\n")]
    return "\n".join(line for line in lines if line), quotes


def _is_balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            return False
    return depth == 0


def _outside_brackets(text: str) -> str:
    depth, outside = 0, []
    for character in text:
        depth += character == "("
        outside.append(character if depth == 0 else " ")
        depth -= character == ")"
    return "".join(outside)
