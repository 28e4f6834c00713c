"""Kill a server in the middle of its load: nothing acknowledged is lost, and every answer is that of the version it names.

    python benchmarks/faults/serving_kills.py            # writes benchmarks/results/serving_kills.md

32 clients send requests to `bem serve`, half of them streamed; a tenth go away before the end. Behind every whole answer
they say something of it, until that is acknowledged. A version is promoted and another one gone back to meanwhile; the
server is killed (SIGKILL) half-way and started again. The queue is short, so that it is full at times. Then the log of
feedback must hold what was acknowledged, once each; and answers, asked for again of a fresh engine without a store of
chunks on the version that each of them names, must be the same to the letter.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import torch  # noqa: E402

import bem  # noqa: E402
from bem.engine.request import Request, Sampling  # noqa: E402
from bem.errors import Refused, Unreachable  # noqa: E402
from bem.online.feedback import FeedbackLog  # noqa: E402
from bem.runs.loading import attach_release  # noqa: E402
from bem.runs.release import read_content  # noqa: E402
from bem.runs.store import Store  # noqa: E402
from bem.serving.client import Client  # noqa: E402
from tests.routing.mounted import FREE, expert  # noqa: E402
from tests.runs.contents import make_grounds  # noqa: E402

CLIENTS = 32
SETTINGS = ("slots=8", "queue=16", "watch_s=0.2", "cache_gib=0.05")
"""Room for 24 of 32 clients, and a store of chunks that must throw some out."""


@dataclass
class Answer:
    """What a client got."""

    number: int
    id: str
    version: str
    text: str


@dataclass
class Seen:
    """What all clients saw; filled by many threads."""

    answers: list[Answer] = field(default_factory=list)
    acknowledged: dict[str, str] = field(default_factory=dict)
    """Id of what was said -> of the answer."""
    refused: Counter[str] = field(default_factory=Counter)
    no_retry: int = 0
    """Of the refusals for a full queue: those that did not say when to come again."""
    cancelled: int = 0
    broken: int = 0
    """Requests that the kill ended."""
    problems: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Load:
    """The clients."""

    def __init__(self, url: str, total: int, new: int):
        self.client, self.new, self.seen = Client(url), new, Seen()
        self.waiting = list(range(total))[::-1]

    def body(self, number: int) -> dict[str, Any]:
        return {**request_of(number, self.new), "stream": number % 2 == 0}

    def run(self) -> None:
        """One client, until nothing is left to ask."""
        while True:
            try:
                number = self.waiting.pop()
            except IndexError:
                return
            try:
                self.cancel(number) if number % 10 == 3 else self.ask(number)
            except Exception as error:
                with self.seen.lock:
                    self.seen.problems.append(f"request {number}: {type(error).__name__}: {error}")

    def ask(self, number: int) -> None:
        answer = self.insist(lambda: self.answered(number))
        said = {"request": answer.id, "kind": "score", "score": 0.5, "id": f"said-{number}"}
        self.insist(lambda: self.client.post("/v1/feedback", said))
        with self.seen.lock:
            self.seen.answers.append(answer)
            self.seen.acknowledged[said["id"]] = answer.id

    def answered(self, number: int) -> Answer:
        body = self.body(number)
        if not body["stream"]:
            whole = self.client.post("/v1/completions", body)
            return Answer(number, whole["id"], whole["bem"]["version"], whole["choices"][0]["text"])
        pieces = list(self.client.stream("/v1/completions", body))
        if not pieces or "bem" not in pieces[-1]:
            raise Unreachable("the stream broke off")
        text = "".join(piece["choices"][0]["text"] for piece in pieces)
        return Answer(number, pieces[-1]["id"], pieces[-1]["bem"]["version"], text)

    def insist(self, call: Any) -> Any:
        """Until it is done: after a refusal as long later as it says, after the kill when the server is back."""
        is_down = False
        while True:
            try:
                return call()
            except Refused as error:
                self.refused(error)
                time.sleep(min(error.retry_after_s or 1, 5))
            except Unreachable:
                with self.seen.lock:
                    self.seen.broken += not is_down
                is_down = True
                time.sleep(3)

    def refused(self, error: Refused) -> None:
        with self.seen.lock:
            self.seen.refused[f"{error.status} ({error.code})"] += 1
            self.seen.no_retry += error.status == 429 and not error.retry_after_s
        if error.code != "queue_full" and error.status != 503:
            raise error

    def cancel(self, number: int) -> None:
        """Ask for much, hear a little, go away."""
        body = {**self.body(number), "stream": True, "max_tokens": 40 * self.new}
        try:
            stream = self.client.stream("/v1/completions", body)
            next(stream)
            stream.close()
        except Refused as error:
            self.refused(error)
        except Unreachable:  # it was killed: nobody waits any more all the same
            pass
        with self.seen.lock:
            self.seen.cancelled += 1


def request_of(number: int, new: int) -> dict[str, Any]:
    """Prompts of 40 to 70 tokens; those of eight conversations begin alike."""
    draw, shared = random.Random(number), random.Random(number % 8)
    prompt = [shared.randrange(3, 4000) for _ in range(32)]
    prompt += [draw.randrange(3, 4000) for _ in range(draw.randrange(8, 38))]
    return {"prompt": prompt, "max_tokens": new, "seed": number, "temperature": 1.0}


class Served:
    """`bem serve` as a process, started again after it was killed."""

    def __init__(self, folder: Path, port: int):
        self.folder, self.port, self.memory = folder, port, []
        self.process: subprocess.Popen | None = None
        self.cpu: dict[int, float] = {}

    def start(self) -> None:
        settings = [word for setting in SETTINGS for word in ("--set", setting)]
        command = [sys.executable, "-m", "bem", "serve", "--base", "bem-tiny", "--port", str(self.port),
                   "--store", str(self.folder / "store"), "--feedback", str(self.folder / "feedback.db"), *settings]  # fmt: skip
        log = (self.folder / "server.log").open("ab")
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        client = Client(f"http://127.0.0.1:{self.port}")
        while True:
            try:
                client.get("/ready")
                return
            except (Unreachable, Refused):
                if self.process.poll() is not None:
                    sys.exit((self.folder / "server.log").read_text()[-2000:])
                time.sleep(0.5)

    def look(self, done: int, life: int) -> None:
        """Note memory (MiB) and CPU seconds."""
        assert self.process is not None
        watched = psutil.Process(self.process.pid)
        times = watched.cpu_times()
        self.cpu[life] = times.user + times.system
        self.memory.append((life, done, watched.memory_info().rss / (1 << 20)))

    def end(self, how: int) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        return self.process.wait()


def two_versions(folder: Path) -> list[str]:
    """Digests of two routers over experts that change the answers, both in a store; the first one is in use."""
    digests = []
    for seed in (0, 10):
        model, _ = bem.load_base("bem-tiny")
        experts = [expert(model, name, 4, seed + i) for i, name in enumerate("ab")]
        routed = bem.mount(model, experts, **{**FREE, "chunk_size": 16})
        routed.router.trained = True
        routed.router.available[0] = False
        content = read_content(routed.save(folder / f"router-{seed}"))
        store = Store(folder / "store")
        if digests:
            store.add(content, "second")
        else:
            store.promote(content, make_grounds(folder, "first"))
        digests.append(routed.version.digest)
    return digests


def under_load(folder: Path, options: argparse.Namespace) -> tuple[Seen, Served, float]:
    """Everything that is done to the server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = Served(folder, port)
    served.start()
    load = Load(f"http://127.0.0.1:{port}", options.requests, options.new)
    clients = [threading.Thread(target=load.run, daemon=True) for _ in range(CLIENTS)]
    began, life, marks = time.monotonic(), 1, [0.25, 0.5, 0.75]
    for client in clients:
        client.start()
    while any(client.is_alive() for client in clients):
        time.sleep(0.5)
        seen = load.seen
        done = len(seen.answers) + seen.cancelled
        served.look(done, life)
        if not marks or done < marks[0] * options.requests:
            continue
        mark = marks.pop(0)
        if mark == 0.25:
            second = read_content(folder / "router-10")
            Store(folder / "store").promote(second, make_grounds(folder, "second"))
        elif mark == 0.5:
            served.end(signal.SIGKILL)
            served.start()
            life = 2
        else:
            Store(folder / "store").rollback(reason="the load goes on")
    minutes = (time.monotonic() - began) / 60
    load.seen.problems += (
        [f"SIGTERM ended with {code}"] if (code := served.end(signal.SIGTERM)) else []
    )
    return load.seen, served, minutes


def lost(folder: Path, seen: Seen) -> list[str]:
    """What the log does not hold as it was acknowledged."""
    log = FeedbackLog(folder / "feedback.db")
    events = log.read(limit=10**6)
    wrong = [] if [e.sequence for e in events] == list(range(1, len(events) + 1)) else ["holes"]
    kept = Counter(event.feedback.id for event in events)
    by_id = {event.feedback.id: event for event in events}
    answers = {answer.id: answer for answer in seen.answers}
    for said, answer in seen.acknowledged.items():
        event = by_id.get(said)
        if event is None or kept[said] != 1:
            wrong.append(f"{said} is kept {kept[said]} times")
        elif event.request is None or event.request.id != answer:
            wrong.append(f"{said} is kept without its answer")
        elif (event.request.answer, event.request.version) != (
            answers[answer].text.replace("\0", "\ufffd"),
            answers[answer].version,
        ):
            wrong.append(f"{said}: another answer is on record")
    return wrong


def mixed(folder: Path, answers: list[Answer], new: int) -> list[str]:
    """Answers that a fresh engine does not give on the version that they name."""
    wrong, store = [], Store(folder / "store")
    for version in sorted({answer.version for answer in answers}):
        model, tokenizer = bem.load_base("bem-tiny")
        routed = attach_release(store, store.find(version), model)
        engine = bem.Engine(routed, tokenizer, slots=1, cache_gib=0)
        for answer in [a for a in answers if a.version == version]:
            asked = request_of(answer.number, new)
            sampling = Sampling(temperature=1.0, seed=answer.number)
            request = Request(asked["prompt"], max_new_tokens=new, sampling=sampling)
            (result,) = engine.generate([request])
            if result.text != answer.text:
                wrong.append(f"request {answer.number}: {answer.text!r} is not {result.text!r}")
    return wrong


def growth(memory: list[tuple[int, int, float]]) -> list[str]:
    """A line for each life: MiB at its quarters."""
    lines = []
    for life in (1, 2):
        own = [(done, mib) for number, done, mib in memory if number == life]
        at = [own[min(int(share * len(own)), len(own) - 1)] for share in (0.1, 0.25, 0.5, 0.75, 1)]
        lines.append(f"| {life} | " + " | ".join(f"{mib:.0f} ({done})" for done, mib in at) + " |")
    return lines


def page(options: argparse.Namespace, seen: Seen, served: Served, found: dict[str, Any]) -> str:
    versions = Counter(answer.version[:12] for answer in seen.answers)
    told = (
        ", ".join(f"{count} times {what}" for what, count in sorted(seen.refused.items())) or "none"
    )
    wrong = found["lost"] + found["mixed"] + seen.problems
    return "\n".join([
        "# Kills of a server under load\n",
        f"`python benchmarks/faults/serving_kills.py --requests {options.requests} --new {options.new} --replay {options.replay}`\n",
        f"bem-tiny with two routed versions, {CLIENTS} clients, {', '.join(SETTINGS)}; SIGKILL half-way, a promotion at a quarter "
        f"and a rollback at three quarters of the requests. {found['minutes']:.1f} minutes by the clock of a busy machine, "
        f"{found['cpu']:.0f} CPU seconds of the two servers.\n",
        f"- {len(seen.answers)} whole answers, {seen.cancelled} given up by their clients, {seen.broken} calls broken off by the "
        f"kill and sent again. Refusals: {told}; those with 429 that named no time to come again: {found['no_retry']}.",
        f"- Feedback acknowledged: {len(seen.acknowledged)}; lost, doubled, or beside another answer than was given: "
        f"{len(found['lost'])}.",
        f"- Answers by version: {', '.join(f'{v}: {n}' for v, n in versions.items())}. Asked again of a fresh engine: "
        f"{found['replayed']}; different in any letter: {len(found['mixed'])}.",
        f"- Other failures: {len(seen.problems)}." + "".join(f"\n  - {w:.300}" for w in wrong[:8]),
        "\nMemory of the serving process, MiB (requests over by then), at 10, 25, 50, 75 and 100 % of each life:\n",
        "| life | 10 % | 25 % | 50 % | 75 % | end |\n|---|---|---|---|---|---|",
        *growth(served.memory),
    ]) + "\n"  # fmt: skip


def main() -> None:
    """Load, kill, examine, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--new", type=int, default=8, help="tokens of an answer")
    parser.add_argument("--replay", type=int, default=100, help="answers that are asked for again")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/serving_kills.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        two_versions(folder)
        seen, served, minutes = under_load(folder, options)
        chosen = random.Random(0).sample(seen.answers, min(options.replay, len(seen.answers)))
        found = {
            "minutes": minutes,
            "cpu": sum(served.cpu.values()),
            "lost": lost(folder, seen),
            "mixed": mixed(folder, chosen, options.new),
            "replayed": len(chosen),
            "no_retry": seen.no_retry,
        }
    options.out.write_text(page(options, seen, served, found), encoding="utf-8")
    print(json.dumps({k: v for k, v in found.items() if k in ("lost", "mixed", "minutes", "cpu")}))


if __name__ == "__main__":
    main()
