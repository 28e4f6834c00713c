"""A live run: a server that learns, load, a planted drift, a poisoned burst, one promotion and one rollback.

    python benchmarks/faults/live.py --minutes 30            # writes benchmarks/results/live.md

`bem serve --learn` is started as anybody would start it. Sixty users ask over HTTP and send the right answers;
others only ask. The base is a random Llama of four layers (`tests/conftest.py`), which learns what is asked here in
minutes of a busy core: what is tested is everything around it. What is right changes as it goes:

    known      questions of one kind: the learner is to get a version promoted
    drift      questions of a new kind, which nobody could learn before: scores fall, and are to be learned
    turned     what was just promoted is wrong: what the version before says is right, and it is to take over
    poison     fifty users send wrong answers to the questions of the first kind: never to be used
    known      to the end of the time

A phase ends when what it waits for has come, or after its events. Every answer must name a version that the store
has (or the bare base), in its body and in its header, and be the same for both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from bem.errors import BemError  # noqa: E402
from bem.files import write_json, write_text  # noqa: E402
from bem.runs.store import Store  # noqa: E402
from bem.serving.keys import add_key  # noqa: E402

KNOWN, NEW = "name", "value"
"""Words of the two kinds of questions."""
FIRST, SECOND, THIRD = "function", "docstring", "return"
"""Answers."""
USERS, ENEMIES, TRUSTED = 60, 50, 32
ROUND, SENDERS = 16, 8
AHEAD = 32
"""Events that the learner may be behind: so that phases mean the same to it as to the users."""
SETTINGS = {
    "round_size": ROUND,
    "batch_size": ROUND,
    "learning_rate": 0.02,
    "steps_per_round": 8,
    "largest_step": 0.2,
    "largest_distance": 8.0,
    "pull": 0.02,
    "candidate_every": 480,
    "margin": 0.15,
    "tolerance": 0.15,
    "trial_events": 160,
    "watch_events": 80,
    "drift_window": 200,
    "held_share": 0.2,
    "max_length": 64,
    "snapshot_every": 5,
}


class Live:
    """One run."""

    def __init__(self, home: Path, base: str, load: int):
        self.home, self.base, self.load = home, base, load
        self.asked = 0
        self.versions: Counter[str] = Counter()
        self.wrong: list[str] = []
        """Answers that name no version, or two."""
        self.refused = 0
        self.seconds: list[float] = []
        """Of every answer."""
        self.phases: list[dict[str, Any]] = []
        self.pool = ThreadPoolExecutor(SENDERS)
        self.deadline = float("inf")
        """When every phase ends, whatever it waits for."""
        self.done = threading.Event()
        self._lock = threading.Lock()

    # --- the server -------------------------------------------------------------------------------

    def start(self) -> None:
        """`bem serve --learn`, until it answers."""
        keys = self.home / "keys.json"
        self.users = [add_key(keys, f"user-{i}") for i in range(USERS)]
        self.enemies = [add_key(keys, f"enemy-{i}") for i in range(ENEMIES)]
        rows = [self._row(i) for i in range(TRUSTED)]
        write_text(self.home / "trusted.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        command = [
            sys.executable,
            "-m",
            "bem",
            "serve",
            "--base",
            self.base,
            "--port",
            "0",
            "--learn",
        ]
        for name, where in (("store", "store"), ("keys", "keys.json"), ("feedback", "feedback.db"), ("learn-folder", "online")):  # fmt: skip
            command += [f"--{name}", str(self.home / where)]
        settings = {f"learn.online.{name}": value for name, value in SETTINGS.items()}
        settings |= {
            "learn.trusted": self.home / "trusted.jsonl",
            "learn.score": "exact",
            "learn.niceness": 0,
        }
        settings |= {"watch_s": 0.5, "cache_gib": 0.25, "slots": 4}
        command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]  # fmt: skip
        self.log = open(self.home / "server.log", "wb")  # noqa: SIM115 - the process has it
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env={**os.environ, "COLUMNS": "200"},
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if b"http://" in line:
                self.url = line.decode().split()[0].removesuffix("/v1")
                break
        threading.Thread(target=self.process.stdout.read, daemon=True).start()
        while self.process.poll() is None and not self._answers():
            time.sleep(1)

    def _answers(self) -> bool:
        """It says where it listens before it does."""
        try:
            return bool(self.call("/ready", "")[0]["ready"])
        except OSError:
            return False

    def _row(self, i: int) -> dict[str, Any]:
        return {"id": f"trusted {i}", "input": question(KNOWN, 100_000 + i), "references": [FIRST]}

    def call(self, path: str, key: str, body: dict[str, Any] | None = None) -> tuple[Any, Any]:
        """(JSON, headers)."""
        headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response), response.headers

    def told(self) -> dict[str, Any]:
        """What the dashboard shows of learning."""
        return self.call("/dashboard/online", self.users[0])[0]

    def ask(self, prompt: str, key: str, model: str = "bem", tokens: int = 6) -> tuple[str, str]:
        """(id, answer); its version is counted."""
        began = time.monotonic()
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0}  # fmt: skip
        answer, headers = self.call("/v1/chat/completions", key, body)
        version, header = answer["bem"]["version"], headers["x-bem-version"]
        with self._lock:
            self.seconds.append(time.monotonic() - began)
            self.versions[version] += 1
            if not version or version != header:
                self.wrong.append(f"{answer['id']}: {version!r}, header {header!r}")
        return answer["id"], answer["choices"][0]["message"]["content"].strip()

    # --- what happens -----------------------------------------------------------------------------

    def keep_asking(self, worker: int) -> None:
        """Load: questions without feedback."""
        i = 0
        while not self.done.is_set():
            i += 1
            try:
                self.ask(question(KNOWN, 300_000 + 10 * i + worker), self.users[i % USERS])
            except OSError:
                self.refused += not self.done.is_set()
            self.done.wait(5.0)

    def say(self, i: int, kind: str, right: str | None, key: str, before: str) -> None:
        """Ask, and say what would have been right; None: what the version before says."""
        prompt = question(kind, i)
        name, _ = self.ask(prompt, key)
        text = right or self.ask(prompt, key, f"bem@{before}")[1]
        said = {"request": name, "kind": "correction", "text": text, "id": f"said {i}"}
        self.call("/v1/feedback", key, said)

    def phase(
        self,
        name: str,
        kind: str,
        right: str | None,
        keys: list[str],
        until: Callable[[dict[str, Any]], bool],
        most: int,
    ) -> None:
        """Events of one kind, until something has come, or so many.

        Args:
            kind: of the questions.
            right: the answer that is said to be right; None: that of the version before the one in use.
        """
        began, first, told = time.monotonic(), self.asked, self.told()
        pool = self.pool
        before = next((m["version"][:12] for m in told["ledger"][1:2] if m["version"]), "")
        while self.asked - first < most and not until(told) and time.monotonic() < self.deadline:
            numbers = range(self.asked, self.asked + 2 * ROUND)
            list(pool.map(lambda i: self.say(i, kind, right, keys[i * 11 % len(keys)], before), numbers))  # fmt: skip
            self.asked = numbers.stop
            while (told := self.told())["waiting"] > AHEAD and time.monotonic() < self.deadline:
                time.sleep(1)
        came = until(told)
        moves = {word: n for word, n in told["moves"].items() if n}
        done = {"phase": name, "events": self.asked - first, "came": came, "seconds": time.monotonic() - began, "moves": moves}  # fmt: skip
        self.phases.append(done)
        print(json.dumps(done), flush=True)

    def run(self, minutes: float, most: float) -> dict[str, Any]:
        """All phases; what is known at the end.

        Args:
            minutes: at least.
            most: after so many minutes phases that did not come are cut short.
        """
        began = time.monotonic()
        self.deadline = began + 60 * most
        workers = [threading.Thread(target=self.keep_asking, args=(i,)) for i in range(self.load)]
        for worker in workers:
            worker.start()
        try:
            self.phase("known", KNOWN, FIRST, self.users, _knows, 1200)
            self.phase("drift", NEW, SECOND, self.users, _learned, 640)
            self.phase(
                "turned", NEW, None, self.users, lambda t: t["moves"]["rolled back"] > 0, 256
            )
            rejected = self.told()["moves"]["rejected"]
            self.phase("poison", KNOWN, THIRD, self.enemies, lambda t: t["moves"]["rejected"] > rejected, 576)  # fmt: skip
            self.phase("known", KNOWN, FIRST, self.users, lambda t: time.monotonic() - began > 60 * minutes, 100_000)  # fmt: skip
            told = self.told()
        finally:
            self.done.set()
            for worker in workers:
                worker.join()
        right = sum(self._is_right(i) for i in range(20))
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(120)
        return {"told": told, "minutes": (time.monotonic() - began) / 60, "right": right, "exit": code}  # fmt: skip

    def _is_right(self, i: int) -> bool:
        """Does what serves at the end still know the first kind?"""
        return self.ask(question(KNOWN, 200_000 + i), self.users[0])[1] == FIRST

    def foreign(self) -> list[str]:
        """Versions that answered and are neither the store's nor the one bare base."""
        known = {r.version for r in Store(self.home / "store").known()}
        others = [version for version in self.versions if version not in known]
        return others if len(others) > 1 else []


def question(kind: str, i: int) -> str:
    """One of a kind; no two are the same."""
    return f"{kind} " * 6 + str(i)


def _good(told: dict[str, Any]) -> bool:
    return bool(told["scores"]) and told["scores"][-1]["mean"] > 0.9


def _knows(told: dict[str, Any]) -> bool:
    """What was promoted answers rightly, its watch is over, and the drift detector knows that as normal."""
    status = told["status"] or {}
    reference = status.get("drift_reference")
    return _good(told) and not status["watching"] and reference is not None and reference > 0.5


def _learned(told: dict[str, Any]) -> bool:
    """Drift was told, and what was promoted since is right and is being watched."""
    return bool(told["moves"]["drift"] and _good(told) and told["status"]["watching"])


def page(live: Live, end: dict[str, Any], options: argparse.Namespace) -> str:
    """What is kept."""
    told, times = end["told"], sorted(live.seconds)
    moves = Store(live.home / "store").journal.ledger().moves()
    names = {version: n for version, n in live.versions.most_common()}
    rows = [f"| {p['phase']} | {p['events']} | {'yes' if p['came'] else 'no'} | {p['seconds']:.0f} | {json.dumps(p['moves'])} |" for p in live.phases]  # fmt: skip
    acts = [f"| {m.event} | `{(m.version or 'bare base')[:12]}` | {m.reason or 'its verdict says PROMOTE'} |" for m in moves]  # fmt: skip
    return "\n".join(
        [
            "# A server that learns, live",
            "",
            f"`python benchmarks/faults/live.py --minutes {options.minutes:g}{' --base ' + options.base if options.base else ''} --load {options.load}` on "
            f"{platform.machine()}, a busy machine: **{end['minutes']:.1f} minutes**, {len(times)} answers, {live.asked} corrections.",
            "",
            "| phase | events | came? | seconds | moves so far |",
            "|---|---:|---|---:|---|",
            *rows,
            "",
            f"- Answers that named no version, or two: {len(live.wrong)}. Versions that answered: "
            + ", ".join(f"`{v[:12]}` {n}" for v, n in names.items())
            + f"; unknown to the store beside the bare base: {len(live.foreign())}.",
            f"- Requests of the load that failed: {live.refused}. Seconds of an answer: median {times[len(times) // 2]:.2f}, "
            f"95 % {times[int(0.95 * len(times))]:.2f}, longest {times[-1]:.2f}.",
            f"- Questions of the first kind that are answered rightly at the end: {end['right']} of 20.",
            f"- Learner: {told['status']['counts']['steps']} steps, {told['restarts']} restarts. Exit code of the server: {end['exit']}.",
            "",
            "| move of the store | version | why |",
            "|---|---|---|",
            *acts,
            "",
        ]
    )


def micro(folder: Path) -> str:
    """The base of the tests, which chats."""
    from tests.serving.running import base  # torch: only where it is not made yet

    if folder.is_dir():
        return str(folder)
    model, tokenizer = base()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main() -> None:
    """Run, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument(
        "--most", type=float, default=90.0, help="minutes after which it ends anyhow"
    )
    parser.add_argument("--base", help="default: a random Llama of four layers")
    parser.add_argument("--load", type=int, default=1, help="users that only ask")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/live.md")
    parser.add_argument("--keep", type=Path, help="folder that stays, to look at")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        home = options.keep or Path(work)
        home.mkdir(parents=True, exist_ok=True)
        live = Live(home, options.base or micro(home / "base"), options.load)
        live.start()
        try:
            end = live.run(options.minutes, options.most)
        finally:
            if live.process.poll() is None:
                live.process.kill()
        write_json(home / "told.json", end["told"])
        text = page(live, end, options)
    write_text(options.out, text)
    print(text)


if __name__ == "__main__":
    try:
        main()
    except BemError as error:
        raise SystemExit(str(error)) from None
