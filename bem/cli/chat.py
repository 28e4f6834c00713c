"""`bem chat`: a conversation in the terminal, with who speaks in each chunk as colours."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from bem.cli.console import Terminal

if TYPE_CHECKING:
    from bem.serving.client import Client

COLOURS = ("green", "cyan", "magenta", "yellow", "blue", "red", "bright_green", "bright_cyan")
BASE = "base"
HELP = """/route    who spoke in each chunk of the last answer
/why      what the router thought of each of them
/version  what is in use, and what can be asked for
/model M  ask another: bem, bem:base, bem:EXPERT, bem@VERSION
/system T a system message, for a new conversation
/new      begin anew
/history  what was said
/quit     leave"""


def chat(
    url: Annotated[
        str | None, typer.Option("--url", help="Of a server; default: one of its own, for --base.")
    ] = None,
    base: Annotated[str, typer.Option("--base", help="Base of a server of its own.")] = "bem-tiny",
    store: Annotated[
        Path | None, typer.Option("--store", help="Version store of a server of its own.")
    ] = None,
    model: Annotated[str, typer.Option("--model", help="bem, bem:EXPERT, bem@VERSION.")] = "bem",
    key: Annotated[
        str | None, typer.Option("--key", envvar="BEM_API_KEY", help="For the server at --url.")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="0: the likeliest.")] = 0.7,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Of an answer.")] = 256,
) -> int:
    """Talk to a base and its versions; /help says what else can be typed."""
    from bem.serving.client import Client

    options = {"temperature": temperature, "max_tokens": max_tokens}
    with _server(base, store) if url is None else contextlib.nullcontext(url) as address:
        client = Client(address.rstrip("/").removesuffix("/v1"), key)
        client.get("/v1/models")  # refused now rather than after the first question
        Chat(client, model, options, Terminal()).run()
    return 0


@contextlib.contextmanager
def _server(base: str, store: Path | None) -> Iterator[str]:
    """The address of a server in this process."""
    from bem.cli.serve import DEFAULT
    from bem.config.serving import serving_config
    from bem.serving.server import Server

    logging.getLogger("bem.serving").setLevel(logging.ERROR)
    folder = store or (DEFAULT if DEFAULT.is_dir() else None)
    values = {"base": base, "store": None if folder is None else str(folder), "port": 0}
    server = Server(serving_config(values)).start()
    try:
        yield server.url
    finally:
        server.stop()


@dataclass
class Chat:
    """One conversation."""

    client: Client
    model: str
    options: dict[str, Any]
    console: Terminal
    messages: list[dict[str, str]] = field(default_factory=list)
    answer: dict[str, Any] = field(default_factory=dict)
    """What the server said of the last answer."""
    _colours: dict[str, str] = field(default_factory=lambda: {BASE: "white"})

    def run(self) -> None:
        """Ask and answer until the end of the input."""
        self._say(f"{self.model}; /help says what can be typed.", "dim")
        while True:
            try:
                line = self.console.input(Text("> ", "bold")).strip()
            except (EOFError, KeyboardInterrupt):
                self.console.print()
                return
            if line in ("/quit", "/exit"):
                return
            if line:
                self.take(line)

    def take(self, line: str) -> None:
        """One line: a command, or what is said."""
        from bem.errors import BemError

        word, _, rest = line.partition(" ")
        commands = {
            "/route": self._route, "/why": self._why, "/version": self._version, "/new": self._new,
            "/history": self._history, "/help": lambda: self._say(HELP),
        }  # fmt: skip
        try:
            if word == "/model" and rest:
                self.model = rest.strip()
            elif word == "/system":
                self._new()
                self.messages = [{"role": "system", "content": rest}] if rest else []
            elif word in commands:
                commands[word]()
            elif word.startswith("/") and word[1:].isalpha():
                self._say(f"no command {word}\n{HELP}", "yellow")
            else:
                self.ask(line)
        except BemError as error:
            self._say(str(error), "red")

    def ask(self, text: str) -> None:
        """Say something and show the answer as it comes; Ctrl-C ends it."""
        asked = [*self.messages, {"role": "user", "content": text}]
        body = {"model": self.model, "messages": asked, **self.options}
        said, self.answer = "", {"actions": []}
        colour = self._colour(BASE)
        try:
            for piece in self.client.stream("/v1/chat/completions", body):
                choice = (piece["choices"] or [{}])[0]
                about = choice.get("bem") or {}
                colour = self._note(about, choice.get("finish_reason"), colour)
                delta = choice.get("delta") or {}
                new = delta.get("content") or delta.get("refusal") or ""
                self.console.print(Text(shown(new), colour), end="", soft_wrap=True)
                said += new
                self.answer.update(piece.get("bem") or {})
        except KeyboardInterrupt:
            self._say(" (stopped)", "yellow")
        self.console.print()
        self.messages = [*asked, {"role": "assistant", "content": said}]

    def _note(self, about: dict[str, Any], finished: str | None, colour: str) -> str:
        """Keep what a piece says of the route; returns the colour that its text has."""
        actions = about.get("actions") or []
        if finished:
            self.answer["actions"] = actions
        elif actions:
            self.answer["actions"] += actions
            return self._colour(actions[-1]["expert"])
        return colour

    def _colour(self, expert: str) -> str:
        if expert not in self._colours:
            self._colours[expert] = COLOURS[(len(self._colours) - 1) % len(COLOURS)]
        return self._colours[expert]

    # --- commands ---------------------------------------------------------------------------------

    def _route(self) -> None:
        actions = self.answer.get("actions")
        if not actions:
            self._say("no answer of a router yet: there is nothing to show.", "yellow")
            return
        for action in actions:
            name = action["expert"]
            how = "" if name == BASE else f"rank {action['rank']}, strength {action['strength']:g}"
            line = Text.assemble(
                f"from token {action['start']:>5}  ", (f"■ {name}", self._colour(name))
            )
            self.console.print(line.append(f"  {how}", "dim"), soft_wrap=True)

    def _why(self) -> None:
        if not self.answer:
            self._say("nothing was answered yet.", "yellow")
            return
        asked = {"model": self.model, "messages": self.messages}
        if version := self.answer.get("version"):
            asked["model"] = f"bem@{version}"
        for chunk in self.client.post("/v1/bem/explain", asked)["chunks"]:
            name = chunk["expert"]
            turn = ">" if chunk["turn"] else " "
            line = Text.assemble(f"{turn}{chunk['chunk']:>3} ", (f"■ {name}", self._colour(name)))
            self.console.print(line.append(f"  {chunk['why']}"), soft_wrap=True)
            self._say(f"      {chunk['text'][:70]!r}", "dim")

    def _version(self) -> None:
        used = self.answer.get("version")
        self._say(f"the last answer came from version {used[:12] if used else '-'}")
        for model in self.client.get("/v1/models")["data"]:
            mark = "*" if model["id"] == self.model else " "
            source = model["bem"].get("source", "")
            self._say(f"{mark} {model['id']}  {model['bem']['version'][:12]}  {source}")

    def _new(self) -> None:
        self.messages, self.answer = [], {}

    def _history(self) -> None:
        for message in self.messages:
            self.console.print(
                Text.assemble((f"{message['role']}: ", "bold"), shown(message["content"])),
                soft_wrap=True,
            )

    def _say(self, text: str, style: str = "") -> None:
        self.console.print(Text(text, style), soft_wrap=True)


def shown(text: str) -> str:
    """Text without what a terminal would obey: a model may write anything."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")
